"""Test calls with targets on a GPU: gradients, half precision, memory over depth, cut networks, captured loops."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sid_trainer import StageLossOptions, build_network, capture, cut, sid_step

pytestmark = pytest.mark.gpu
SMOOTHED = StageLossOptions(0.5, label_smoothing=[0.5, 0.25, 0.125, 0.0625])


def batch(count=16, size=16, classes=10):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, size, size, generator=generator)
    return inputs.cuda(), torch.randint(classes, (count,), generator=generator).cuda()


def make(arch="simple_cnn", layout="stagewise", size=16, **settings):
    torch.manual_seed(0)
    return build_network(arch, layout, image_size=(size, size), **settings).cuda()


def error(network, other):
    """Return the largest error of a gradient, relative to that gradient's norm."""
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    return max(float((a.grad - b.grad.to(a.grad)).norm() / b.grad.norm().clamp_min(1e-9)) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("arch", "layout", "settings"),
    [
        ("simple_cnn", "shared", {"fused": True}),
        ("simple_cnn", "shared", {"fused": False}),
        ("simple_cnn", "stagewise", {"norm": True, "tail": 1}),
        ("resnet18", "stagewise", {"tail": 1, "prior_input": False}),
        ("vit_tiny", "stagewise", {}),
    ],
)
def test_gradients_are_those_of_the_step(arch, layout, settings, dtype):
    network, (inputs, targets) = make(arch, layout, **settings), batch()
    other = copy.deepcopy(network)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        result = sid_step(network, inputs, targets, dtype=dtype)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            output = other(inputs, targets)
        output.loss.backward()
    torch.testing.assert_close(output.stage_loss, result.stage_loss, rtol=1e-5, atol=1e-6)
    assert error(other, network) <= (1e-5 if dtype is torch.float32 else 1e-2)


def test_label_smoothing_by_stage_is_that_of_the_cpu():
    network, (inputs, targets) = make(prior_input=False), batch()
    network.loss_options = SMOOTHED
    other = copy.deepcopy(network).cpu()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        network(inputs, targets).loss.backward()
    other(inputs.cpu(), targets.cpu()).loss.backward()
    assert error(network, other) <= 1e-4


def test_float16_with_a_scaler_learns():
    network, (inputs, targets) = make(norm=True, tail=1), batch(64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    scaler, losses = torch.amp.GradScaler("cuda"), []
    for _ in range(30):
        with torch.autocast("cuda", torch.float16):
            output = network(inputs, targets)
        scaler.scale(output.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0] and all(parameter.isfinite().all() for parameter in network.parameters())


def test_float16_gradients_are_near_those_of_float32():
    network, (inputs, targets) = make(), batch(64)
    other = copy.deepcopy(network)
    network(inputs, targets).loss.backward()
    with torch.autocast("cuda", torch.float16):
        loss = other(inputs, targets).loss
    (loss * 2.0**10).backward()
    for parameter in other.parameters():
        parameter.grad /= 2.0**10
    assert error(other, network) <= 6e-2


def peak_bytes(depth, train):
    """Return the memory of one training pass beyond what was allocated before it and what its gradients take."""
    network = make("mlp", depth=depth, size=8)
    inputs, targets = batch(32768, size=8)
    train(network, inputs, targets)
    gradients = sum(parameter.numel() * 4 for parameter in network.parameters())
    network.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(network, inputs, targets)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - gradients


def test_peak_memory_does_not_grow_with_depth():
    def local(network, inputs, targets):
        network(inputs, targets).loss.backward()

    def backpropagation(network, inputs, targets):
        F.cross_entropy(network(inputs), targets).backward()

    shallow, deep = peak_bytes(4, local), peak_bytes(32, local)
    print(f"peak bytes of a local pass: depth 4 {shallow}, depth 32 {deep}, ratio {deep / shallow:.3f}")
    assert deep <= 1.1 * shallow
    assert peak_bytes(32, backpropagation) >= 4 * peak_bytes(4, backpropagation)


def test_a_cut_resnet_learns():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    inputs, targets = batch(32, size=32)
    network = cut(models.resnet18(num_classes=10).cuda(), ["layer1", "layer2", "layer3", "layer4"], 10, inputs[:2])
    network.cuda()
    optimizer, losses = torch.optim.SGD(network.parameters(), lr=0.05), []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            output = network(inputs, targets)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_captured_loop_is_the_loop():
    network, (inputs, targets) = make(), batch()
    other = copy.deepcopy(network)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9, fused=True) for n in (network, other)]

    def step(network, optimizer, inputs, targets):
        optimizer.zero_grad(set_to_none=True)
        output = network(inputs, targets)
        output.loss.backward()
        optimizer.step()
        return output.stage_loss

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        captured = capture(
            lambda x, y: step(network, optimizers[0], x, y), (inputs, targets), network=network,
            optimizers=[optimizers[0]],
        )  # fmt: skip
        for _ in range(3):
            losses = captured(inputs, targets)
            expected = step(other, optimizers[1], inputs, targets)
            torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
