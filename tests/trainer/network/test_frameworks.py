"""Test that loops, optimizers and frameworks train the networks as they train any module, in one process.

Expected weights come from `sid_step`, which needs no `loss.backward()`, or from a plain loop on whole batches.
`test_frameworks_ranks.py` does the same with two processes.
"""

import copy
import itertools

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from helpers.drop_in import BATCH, STEPS, assert_same_weights, data, make, train
from sid_trainer import sid_step

KINDS = ["names", "indices"]  # CutNetwork, SIDNetwork


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def loader() -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch_size=BATCH)


def sgd(network, lr=0.1):
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)


# ---------------------------------------------------------------- loops and optimizers of PyTorch


def step_loss(network, inputs, targets) -> torch.Tensor:
    """Set every gradient by `sid_step` and return the sum of the stages' losses."""
    return sid_step(network, inputs, targets).stage_loss.sum()


def call_loss(network, inputs, targets) -> torch.Tensor:
    loss = network(inputs, targets).loss
    loss.backward()
    return loss.detach()


def by_kind(network, matrices, others):
    """Return one optimizer for the weight matrices and one for the other parameters."""
    parameters = list(network.parameters())
    return [matrices([p for p in parameters if p.dim() == 2]), others([p for p in parameters if p.dim() != 2])]


OPTIMIZERS = {
    "AdamW and SGD": lambda n: by_kind(n, torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1)),
    "Muon and AdamW": lambda n: by_kind(n, lambda p: torch.optim.Muon(p, lr=0.02), torch.optim.AdamW),
    "clipped SGD": lambda n: [sgd(n)],
    "schedule-free AdamW": lambda n: [AdamWScheduleFree(n.parameters(), lr=0.01)],
    "LBFGS": lambda n: [torch.optim.LBFGS(n.parameters(), lr=0.1, max_iter=3)],
}


def run_optimizers(network, optimizers, loss_and_gradients, clip=False) -> None:
    for optimizer in optimizers:
        if hasattr(optimizer, "train"):  # schedule-free
            optimizer.train()
    for inputs, targets in zip(*(part.split(BATCH) for part in data()), strict=True):

        def closure(inputs=inputs, targets=targets):
            for optimizer in optimizers:
                optimizer.zero_grad()
            return loss_and_gradients(network, inputs, targets)

        if isinstance(optimizers[0], torch.optim.LBFGS):
            optimizers[0].step(closure)
        else:
            closure()
            if clip:
                norm = nn.utils.clip_grad_norm_(network.parameters(), 0.01)
                assert norm > 0.01
            for optimizer in optimizers:
                optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    if name.startswith("Muon") and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon needs a newer PyTorch")
    network, other = make("indices"), make("indices")
    before = network(*data()).loss
    run_optimizers(network, OPTIMIZERS[name](network), call_loss, clip="clipped" in name)
    run_optimizers(other, OPTIMIZERS[name](other), step_loss, clip="clipped" in name)
    assert_same_weights(network, other, exact=True)
    assert network(*data()).loss < before


def test_sharpness_aware_minimization():
    """Run two passes per step; the second one is at weights to which the first one's gradients lead."""
    networks = make("indices"), make("indices")
    for network, loss_and_gradients in zip(networks, (call_loss, step_loss), strict=True):
        optimizer = sgd(network)
        for inputs, targets in zip(*(part.split(BATCH) for part in data()), strict=True):
            optimizer.zero_grad()
            loss_and_gradients(network, inputs, targets)
            gradients = [parameter.grad for parameter in network.parameters()]
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            ascent = [gradient * (0.05 / norm) for gradient in gradients]
            with torch.no_grad():
                torch._foreach_add_(list(network.parameters()), ascent)
            optimizer.zero_grad()
            loss_and_gradients(network, inputs, targets)
            with torch.no_grad():
                torch._foreach_sub_(list(network.parameters()), ascent)
            optimizer.step()
    assert_same_weights(*networks, exact=True)


def test_accumulation_over_4_micro_batches(kind):
    network, other = make(kind), make(kind)
    train(network, sgd(network), parts=4)
    train(other, sgd(other))
    assert_same_weights(network, other)


def test_autocast_of_the_caller(kind):
    """Check that matrix products run in bfloat16, and that losses, gradients and updates stay in float32."""
    network, other = make(kind), make(kind)
    dtypes = set()
    linear = next(module for module in network.modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    train(network, sgd(network), dtype=torch.bfloat16)
    train(other, sgd(other))
    assert dtypes == {torch.bfloat16}
    assert_same_weights(network, other, rtol=0.05)


def test_grad_scaler_with_float16(kind):
    network, other = make(kind), make(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
    train(network, sgd(network), dtype=torch.float16, scaler=scaler)
    train(other, sgd(other))
    assert_same_weights(network, other, rtol=0.02)
    assert scaler.get_scale() == 2.0**14 * 2 ** (STEPS // 2)  # no step was skipped


def test_grad_scaler_skips_steps_whose_gradients_overflow(kind):
    network, other = make(kind), make(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)

    def overflow(inputs, targets):
        output = network(inputs, targets)
        return output._replace(loss=output.loss * 2.0**20)

    train(network, sgd(network), dtype=torch.float16, scaler=scaler, call=overflow)
    assert scaler.get_scale() == 2.0 ** (120 - STEPS)
    for own, its in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, its)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_bodies(kind, backend):
    network, other = make(kind), make(kind)
    blocks = [network.model[i] for i in (0, 2, 4)] if kind == "names" else [stage.body for stage in network.stages]
    for block in itertools.chain(blocks, network.heads if kind == "names" else []):
        block.compile(backend=backend)
    train(network, sgd(network))
    train(other, sgd(other))
    assert_same_weights(network, other)
    torch.compiler.reset()


# ---------------------------------------------------------------- Lightning


def lightning_module(network, manual=False):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network
            self.automatic_optimization = not manual

        def training_step(self, batch, index):
            loss = self.network(*batch).loss
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

        def configure_optimizers(self):
            return sgd(self.network)

    return Module()


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("precision, dtype", [("32-true", None), ("bf16-mixed", torch.bfloat16)])
def test_lightning(kind, loader, manual, precision, dtype):
    lightning = pytest.importorskip("lightning", reason="needs lightning: pip install -e '.[recipes]'")
    network, other = make(kind), make(kind)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, precision=precision, **QUIET)
    trainer.fit(lightning_module(network, manual), loader)
    train(other, sgd(other), dtype=dtype)
    assert_same_weights(network, other, exact=True)


def test_lightning_accumulates_and_clips(kind):
    lightning = pytest.importorskip("lightning", reason="needs lightning: pip install -e '.[recipes]'")
    network, other = make(kind), make(kind)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, accumulate_grad_batches=4, gradient_clip_val=0.1, **QUIET
    )
    trainer.fit(lightning_module(network), DataLoader(TensorDataset(*data()), batch_size=BATCH // 4))
    train(other, sgd(other), clip=0.1)
    assert_same_weights(network, other)


# ---------------------------------------------------------------- Accelerate


@pytest.fixture
def accelerator():
    """Yield the class; its state, one per process, is new before and after the test."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install -e '.[recipes]'")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield accelerate.Accelerator
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("precision, dtype", [("no", None), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("parts", [1, 4])
def test_accelerate(kind, accelerator, precision, dtype, parts):
    network, other = make(kind), make(kind)
    accelerator = accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=parts)
    loader = DataLoader(TensorDataset(*data()), batch_size=BATCH // parts)
    prepared, optimizer, loader = accelerator.prepare(network, sgd(network), loader)
    for inputs, targets in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(inputs, targets).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    train(other, sgd(other), clip=0.1, dtype=dtype)
    assert_same_weights(accelerator.unwrap_model(prepared), other, rtol=0.05 if dtype else 1e-4)


# ---------------------------------------------------------------- transformers


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, i):
        inputs, targets = data()
        return {"inputs": inputs[i], "labels": targets[i]}


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_trainer_of_transformers(kind, tmp_path, accelerator, parts, bf16):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[recipes]'")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(Rows())

    network, other = make(kind), make(kind)
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=STEPS, per_device_train_batch_size=BATCH // parts, gradient_accumulation_steps=parts,
        max_grad_norm=0.1, remove_unused_columns=False, use_cpu=True, bf16=bf16, report_to=[], save_strategy="no",
        lr_scheduler_type="constant", disable_tqdm=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = InOrder(network, arguments, train_dataset=Rows(), eval_dataset=Rows(), optimizers=(sgd(network), None))
    trainer.train()
    train(other, sgd(other), clip=0.1, dtype=torch.bfloat16 if bf16 else None)
    assert_same_weights(network, other, rtol=0.05 if bf16 else 1e-4)
    predicted = trainer.predict(Rows())
    assert predicted.metrics["test_loss"] < 10  # the mean over the batches of the sum over the stages


def test_copies_and_state_dicts(kind):
    """Copy a network as an average of weights does, and save it as a checkpoint of a framework does."""
    network, other = make(kind), make(kind)
    train(network, sgd(network))
    other.load_state_dict(network.state_dict())
    assert_same_weights(copy.deepcopy(network), other, exact=True)
    average = torch.optim.swa_utils.AveragedModel(network)
    average.update_parameters(network)
    inputs, _ = data()
    assert torch.equal(average(inputs), other(inputs))
