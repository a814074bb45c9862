"""Tests of DTensors in two and four processes: the values and gradients of one process, for every placement."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import finish, start
from sid_kernels import BeliefHead, CascadeWeights, PriorHead, fused_belief_head, fused_local_loss, refine_cascade

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
ROWS, CLASSES, HIDDEN_DIM = 7, 11, 6  # divided by neither two nor four


def call_as_a_rank(function: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function()
    dist.destroy_process_group()


def draw():
    """Return logits, prior, labels, soft target, alpha by row, hidden, weight and bias."""
    torch.manual_seed(0)
    z, q, y = (torch.randn(ROWS, CLASSES) for _ in range(3))
    labels = torch.randint(0, CLASSES, (ROWS,))
    labels[:3] = -100  # more ignored rows in one process than in another
    z[0, 0] = z[4, 1] = -torch.inf
    layer = torch.randn(ROWS, HIDDEN_DIM), torch.randn(CLASSES, HIDDEN_DIM), torch.randn(CLASSES)
    q[0, 0] = q[4, 1] = -torch.inf
    return z, q.softmax(1), labels, y.softmax(1), torch.rand(ROWS), *layer


def compare(actual, expected, name):
    actual = actual.full_tensor() if hasattr(actual, "full_tensor") else actual
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


def loss_of_every_placement():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    meshes = {"one": init_device_mesh("cpu", (dist.get_world_size(),))}
    if dist.get_world_size() == 4:
        meshes = {"two": init_device_mesh("cpu", (2, 2))}
    z, q, labels, soft, alpha, *_ = draw()
    for mesh in meshes.values():
        choices = (Replicate(), Shard(0), Shard(1), Shard(-1))
        layouts = [(a,) for a in choices] if mesh.ndim == 1 else [(Shard(0), Shard(1)), (Shard(1), Replicate())]
        for layout in layouts:
            rows = [p if p == Shard(0) else Replicate() for p in layout]
            for options in (
                {}, {"reduction": "sum", "label_smoothing": 0.1}, {"reduction": "none"},
                {"divergence": "reverse", "label_smoothing": 0.1},
            ):  # fmt: skip
                for target, given, prior in ((labels, alpha, q), (labels, 0.3, None), (soft, 0.3, q)):
                    leaf = z.clone().requires_grad_()
                    expected = fused_local_loss(leaf, prior, target, given, **options)
                    sharded = distribute_tensor(z, mesh, layout).requires_grad_()
                    place = layout if target is soft else rows
                    actual = fused_local_loss(
                        sharded,
                        None if prior is None else distribute_tensor(prior, mesh, layout),
                        distribute_tensor(target, mesh, place),
                        distribute_tensor(given, mesh, rows) if given is alpha else given,
                        **options,
                    )
                    name = f"{layout} {options} soft={target is soft}"
                    for field in actual._fields:
                        compare(getattr(actual, field), getattr(expected, field).detach(), f"{name} {field}")
                    incoming = torch.linspace(0.1, 1.0, expected.loss.numel()).view(expected.loss.shape)
                    (expected.loss * incoming).sum().backward()
                    if actual.loss.dim():
                        incoming = distribute_tensor(incoming, mesh, rows)
                    (actual.loss * incoming).sum().backward()
                    assert sharded.grad.placements == tuple(Shard(p.dim % 2) if p != Replicate() else p for p in layout)
                    compare(sharded.grad, leaf.grad, f"{name} gradient")


def head_of_every_placement():
    """Check a head with rows sharded, replicated, or the vocabulary sharded, as of tensor-parallel models."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    _, q, labels, _, _, *layer = draw()
    teacher = PriorHead(layer[0].flip(0), layer[1].flip(0), layer[2].flip(0))
    for of_hidden, of_weight in ((Shard(0), Replicate()), (Replicate(), Replicate()), (Replicate(), Shard(0))):
        for prior in (None, q, teacher):
            leaves = [x.clone().requires_grad_() for x in layer]
            expected = fused_belief_head(*leaves, prior, labels, 0.3)
            expected.loss.backward()
            places = (of_hidden, of_weight, of_weight)
            sharded = [distribute_tensor(x, mesh, [p]).requires_grad_() for x, p in zip(layer, places, strict=True)]
            if prior is teacher:
                given = PriorHead(*(distribute_tensor(x, mesh, [p]) for x, p in zip(prior, places, strict=True)))
            else:
                given = None if prior is None else distribute_tensor(prior, mesh, [Replicate()])
            actual = fused_belief_head(*sharded, given, distribute_tensor(labels, mesh, [Replicate()]), 0.3)
            actual.loss.backward()
            compare(actual.loss, expected.loss.detach(), (of_hidden, of_weight))
            for a, b in zip(sharded, leaves, strict=True):
                compare(a.grad, b.grad, (of_hidden, of_weight))

    module = torch.nn.Sequential(BeliefHead(HIDDEN_DIM, CLASSES))
    fully_shard(module, mesh=mesh)
    with pytest.raises(TypeError, match=r"^weight is a DTensor .* hidden is a plain tensor; .* module.unshard\(\)$"):
        module[0](layer[0], None, labels)
    module.unshard()
    module[0](layer[0], None, labels).loss.backward()
    with pytest.raises(TypeError, match="^logits is a DTensor .* target is a plain tensor"):
        fused_local_loss(distribute_tensor(q, mesh, [Shard(0)]), None, labels)
    weights = CascadeWeights(torch.randn(1, 2, 17), torch.randn(1, 2), torch.randn(1, 11, 2), torch.randn(1, 11))
    with pytest.raises(TypeError, match="refine_cascade takes no DTensor"):
        refine_cascade(distribute_tensor(layer[0], mesh, [Shard(0)]), weights, labels)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("function", "count"),
    [(loss_of_every_placement, 2), (loss_of_every_placement, 4), (head_of_every_placement, 2)],
)
def test_of_ranks(function, count):
    """Run a function in every rank; what a rank raises is printed with the captured output."""
    assert finish(start([(call_as_a_rank, (function,))] * count)) == [0] * count
