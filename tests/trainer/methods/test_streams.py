"""Test the stages on their streams: what waits for what in the real step, and equal bits however they are placed.

On a CPU a backend that only keeps records stands in for CUDA: it knows, for every piece of work, the stream it was
queued on and what is certain to be done before it.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from sid_trainer import build_network, capture, sid_step
from sid_trainer.methods import step
from sid_trainer.methods.common import StepOptions
from sid_trainer.methods.factory import make_optimizers
from sid_trainer.methods.streams import StageHooks, StageStreams, stage_streams
from sid_trainer.network.cut import stagewise
from sid_trainer.network.heads import HeadOptions


class Stream:
    def __init__(self, name):
        self.name, self.before = name, set()  # the work that is done before the next work on this stream

    def record_event(self):
        return frozenset(self.before)

    def wait_event(self, event):
        self.before |= event

    def wait_stream(self, stream):
        self.before |= stream.before


class Backend:
    """The part of torch.cuda that StageStreams uses."""

    def __init__(self):
        self.caller = self.now = Stream("caller")
        self.made, self.work = 0, {}  # name -> (stream, the work before it)

    def Stream(self, device):
        self.made += 1
        return Stream(f"stage {self.made}")

    def current_stream(self, device):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def do(self, name):
        assert name not in self.work, f"{name} was done twice"
        self.work[name] = (self.now.name, self.now.record_event())
        self.now.before.add(name)

    def is_before(self, first, second):
        return first in self.work[second][1]


def make(layout, depth=3, fused=False):
    torch.manual_seed(0)
    network = build_network("mlp", layout, num_classes=5, in_channels=1, image_size=(4, 4), depth=depth, fused=fused)
    return network, torch.randn(6, 1, 4, 4), torch.randint(0, 5, (6,))


def tell(backend, network, optimizers, monkeypatch, prefix=lambda: ""):
    """Let the backend record every forward, loss, backward and update of a stage, and the extractor's."""

    def watch(module, name):
        module.register_forward_hook(lambda *_: backend.do(f"{prefix()}forward {name}"))

    losses = 0
    stage_loss = step.stage_loss

    def counted_loss(*args):
        nonlocal losses
        losses += 1
        backend.do(f"{prefix()}loss {(losses - 1) % len(network.stages) + 1}")
        return stage_loss(*args)

    monkeypatch.setattr(step, "stage_loss", counted_loss)
    modules = {"extractor": network.extractor} | {str(i): stage for i, stage in enumerate(network.stages, 1)}
    for optimizer, (name, module) in zip(optimizers, modules.items(), strict=True):
        watch(module, name)
        if optimizer is None:
            continue
        first = next(module.parameters())  # the last parameter whose gradient is computed
        first.register_post_accumulate_grad_hook(lambda _, name=name: backend.do(f"{prefix()}backward {name}"))
        optimizer.register_step_pre_hook(lambda *_, name=name: backend.do(f"{prefix()}update {name}"))


@pytest.mark.parametrize("schedule", ["one-pass", "two-phase"])
@pytest.mark.parametrize("layout", ["shared", "stagewise"])
def test_a_stage_waits_for_what_the_one_before_hands_on_and_for_nothing_else(layout, schedule, monkeypatch):
    network, inputs, targets = make(layout)
    backend = Backend()
    streams = StageStreams("cpu", 3, backend)
    optimizers = make_optimizers(network, "sid", step_schedule=schedule)
    teachers = step.teacher_beliefs

    def one_piece_of_work(*args):
        backend.do("teachers")
        with monkeypatch.context() as patch:
            patch.setattr(backend, "do", lambda name: None)
            return teachers(*args)

    monkeypatch.setattr(step, "teacher_beliefs", one_piece_of_work)
    tell(backend, network, optimizers, monkeypatch)
    sid_step(network, inputs, targets, 0.5, optimizers, schedule=schedule, streams=streams)

    placed = {name: stream for name, (stream, _) in backend.work.items()}
    for i in (1, 2, 3):
        own = [f"{what} {i}" for what in ("forward", "loss", "backward", "update")]
        assert [placed[name] for name in own] == [f"stage {i}"] * 4
        assert all(backend.is_before(a, b) for a, b in zip(own, own[1:], strict=False))
        assert backend.is_before("forward extractor", f"forward {i}")
    for i in (2, 3):
        handed_on, left_behind = ("forward", "loss"), ("backward", "update")
        assert all(backend.is_before(f"{what} {j}", f"forward {i}") for j in range(1, i) for what in handed_on)
        assert not any(backend.is_before(f"{what} {j}", f"update {i}") for j in range(1, i) for what in left_behind)
    if schedule == "two-phase":
        assert placed["teachers"] == "caller" and backend.is_before("teachers", "forward 1")
    if layout == "shared":
        assert placed["backward extractor"] == placed["update extractor"] == "caller"
        assert all(backend.is_before(f"backward {i}", "backward extractor") for i in (1, 2, 3))
    assert backend.caller.before == set(backend.work), "the caller's stream does not wait for all stages"


def test_the_next_step_comes_after_the_whole_of_this_one(monkeypatch):
    network, inputs, targets = make("stagewise")
    backend = Backend()
    streams = StageStreams("cpu", 3, backend)
    optimizers = make_optimizers(network, "sid")
    prefix = "0 "
    tell(backend, network, optimizers, monkeypatch, prefix=lambda: prefix)
    sid_step(network, inputs, targets, 0.5, optimizers, streams=streams)
    prefix = "1 "
    sid_step(network, inputs, targets, 0.5, optimizers, streams=streams)
    assert backend.made == 3  # streams are made once
    first = {name for name in backend.work if name.startswith("0 ")}
    for name, (_, before) in backend.work.items():
        if name.startswith("1 forward"):
            assert first <= before, f"{name} does not wait for {first - before}"


def test_nothing_of_a_stage_runs_outside_its_stream():
    """Check every operator that PyTorch dispatches from the first stage's start to the last one's end."""
    backend, seen = Backend(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((backend.now.name, function))
            return function(*args, **(kwargs or {}))

    class Marked(StageStreams):
        def step_started(self):
            super().step_started()
            seen.clear()

        def step_finished(self):
            super().step_finished()
            self.between = list(seen)

    streams = Marked("cpu", 3, backend)
    network, inputs, targets = make("stagewise")
    optimizers = make_optimizers(network, "sid")
    with Watch():
        sid_step(network, inputs, targets, 0.5, optimizers, streams=streams)
    on_caller = {function for name, function in streams.between if name == "caller"}
    assert on_caller == {torch.ops.aten.detach.default}  # which computes nothing
    by_stage = [{str(function) for name, function in streams.between if name == f"stage {i}"} for i in (1, 2, 3)]
    assert by_stage[0] == by_stage[1] == by_stage[2]
    for what in ("addmm.default", "threshold_backward.default", "_fused_adam_.default"):  # forward, backward, update
        assert f"aten.{what}" in by_stage[0]


def test_what_adds_up_the_gradients_of_shared_features_is_made_before_the_first_stage_and_serves_all():
    """Check where the node is made that sums shared gradients: it runs on that stream."""
    network, inputs, targets = make("shared")
    seen = []

    class Marked(StageStreams):
        def step_started(self):
            super().step_started()
            get_gradient_edge(features).node.metadata["made"] = "before the stages"

    def look(stage, arguments):
        seen.append(get_gradient_edge(arguments[0]).node.metadata.get("made"))

    for stage in network.stages:
        stage.register_forward_pre_hook(look)
    features = network.extractor(inputs).detach().requires_grad_()
    streams = Marked("cpu", 3, Backend())
    step.stage_by_stage(network, features, targets, StepOptions(), hooks=streams)
    assert seen == ["before the stages"] * 3 and features.grad is not None


@pytest.mark.parametrize("schedule", ["one-pass", "two-phase"])
@pytest.mark.parametrize(("layout", "fused"), [("shared", False), ("shared", True), ("stagewise", False)])
def test_streams_that_only_order_change_no_bit(layout, fused, schedule):
    actual = []
    for streams in (None, StageHooks(), StageHooks(defer_updates=True), StageStreams("cpu", 3, Backend())):
        network, inputs, targets = make(layout, fused=fused)
        optimizers = make_optimizers(network, "sid", step_schedule=schedule)
        for _ in range(3):
            result = sid_step(
                network, inputs, targets, 0.5, optimizers, schedule=schedule, fused=False, streams=streams
            )
        actual.append([*result, *network.parameters()])
    for other in actual[1:]:
        assert all(torch.equal(a, b) for a, b in zip(actual[0], other, strict=True))


def test_only_cuda_gets_streams():
    assert type(stage_streams(torch.device("cpu"), 4)) is StageHooks


# ---------------------------------------------------------------- on a GPU


def residual_network(depth=4):
    """Return convolutions with batch-norm and a skip, as in ResNet's blocks; stages have unequal work."""

    class Residual(nn.Module):
        def __init__(self, before, after):
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))
            self.two = nn.Sequential(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))

        def forward(self, inputs):
            hidden = self.one(inputs)
            return (hidden + self.two(hidden.relu())).relu()

    widths = [3, 64, 16, 64, 32][: depth + 1]
    blocks = [Residual(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return stagewise(blocks, 10, torch.zeros(1, 3, 32, 32), HeadOptions())


def shared_network(depth=4):
    return build_network("simple_cnn", "shared", depth=depth, head_depth=2)  # deeper heads are not stacked


@pytest.fixture(params=[residual_network, shared_network], ids=["residual", "shared"])
def on_gpu(request):
    """Return a network on the GPU and 6 batches, without autotuning and atomic additions: only order differs."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        torch.manual_seed(0)
        network = request.param().to("cuda", memory_format=torch.channels_last)
        images = torch.randn(6, 64, 3, 32, 32, device="cuda")
        yield network, list(zip(images, torch.randint(0, 10, (6, 64), device="cuda"), strict=True))


def trained(network, batches, streams, captured=False, dtype=torch.float32):
    """Return every tensor that some steps of a copy of the network leave, and every step's result."""
    network = copy.deepcopy(network)
    # A graph reads the rate as float32: this one is the same number in float64.
    optimizers = make_optimizers(network, "sid", lr=2**-10)

    def one(inputs, targets):
        return sid_step(network, inputs, targets, 0.5, optimizers, streams=streams, dtype=dtype)

    call = one
    results = []
    for i, batch in enumerate(batches):
        if captured and i == 1:  # after one step, as the Trainer does it
            own = [optimizer for optimizer in optimizers if optimizer]
            call = capture(one, batch, network=network, optimizers=own)
        results += [tensor.clone() for tensor in call(*batch)]
    return [*results, *network.state_dict().values()]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_on_and_off_give_equal_bits(on_gpu, dtype):
    network, batches = on_gpu
    off = trained(network, batches, None, dtype=dtype)
    for _ in range(3):  # a race may not show at once
        streams = stage_streams(torch.device("cuda"), len(network.stages))
        assert type(streams) is StageStreams
        on = trained(network, batches, streams, dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))


@pytest.mark.gpu
def test_a_graph_of_the_step_on_streams_replays_to_the_bits_of_the_eager_step(on_gpu):
    network, batches = on_gpu
    eager = trained(network, batches, None)
    streams = stage_streams(torch.device("cuda"), len(network.stages))
    replayed = trained(network, batches, streams, captured=True)
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
