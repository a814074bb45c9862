"""Test that denormal numbers, whose arithmetic is slow, are zero while a trainer trains, and only then."""

import platform

import pytest
import torch

from helpers.processes import forked
from sid_trainer import TrainConfig, Trainer, build_network
from sid_trainer.data.datasets import ImageData, Split
from sid_trainer.training.cpu import denormals_as_zero, dtype_advice

SMALLEST = torch.finfo(torch.float32).tiny  # the smallest number that is not denormal

pytestmark = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot flush denormals")


def flushed() -> bool:
    return bool((torch.full((5,), SMALLEST) / 2 == 0).all())


def test_denormals_are_zero_within_and_as_before_after():
    for before in (False, True):
        torch.set_flush_denormal(before)
        with pytest.raises(KeyError), denormals_as_zero():
            assert flushed()
            raise KeyError
        assert flushed() is before


THREADS = """
import torch
torch.set_num_threads(3)
{call}
small = torch.full((3_000_000,), torch.finfo(torch.float32).tiny)  # the first operation of three threads
print((small / 2).count_nonzero().item())
"""


@pytest.mark.parametrize(("call", "left"), [("torch.set_flush_denormal(True)", 0), ("", 3_000_000)])
def test_a_process_that_only_trains_flushes_in_all_threads(call, left):
    assert int(forked(THREADS.format(call=call)).stdout) == left


@pytest.mark.parametrize("method", ["sid", "bp"])
def test_a_dead_unit_leaves_no_denormals_in_adam(method):
    """Check that Adam's averages reach zero for a gradient that has become zero.

    They shrink by 0.9 per step, and rounding would hold them at the smallest denormals, which are ten times as slow as
    other numbers.
    """
    images = torch.randint(0, 256, (12, 2, 2, 1), dtype=torch.uint8)
    data = ImageData(*[Split(images, torch.arange(12) % 3)] * 2, ["a", "b", "c"])
    network = build_network(
        "mlp", "stagewise", num_classes=3, in_channels=1, image_size=(2, 2), depth=1, plain=method == "bp"
    )
    trainer = Trainer(network, data, TrainConfig(method=method, epochs=1, batch_size=12, device="cpu"), quiet=True)
    trainer.fit()
    layer = next(layer for layer in network.modules() if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():
        layer.weight[0], layer.bias[0] = 0.0, -100.0  # never above zero again
    optimizer = next(one for one in trainer.strategy.optimizers if one)
    average = optimizer.state[layer.weight]["exp_avg"]
    average[0] = 2 * SMALLEST
    trainer.epoch, trainer.config = 2, TrainConfig(method=method, epochs=9, batch_size=12, device="cpu")
    trainer.fit()
    assert (average[0] == 0).all() and (average[1:] != 0).any()
    assert not flushed()


@pytest.mark.parametrize(
    ("units", "dtype", "advice"),
    [
        ("_is_amx_tile_supported", "float32", "this processor has AMX: --dtype bfloat16 may train faster"),
        ("_is_avx512_bf16_supported", "float32", "this processor has AVX-512 BF16: --dtype bfloat16 may train faster"),
        ("_is_amx_tile_supported", "bfloat16", None),
        (None, "float32", None),
        (None, "bfloat16", "this processor has no units for bfloat16 matrices: --dtype float32 trains faster"),
    ],
)
def test_the_dtype_that_suits_the_processor(monkeypatch, units, dtype, advice):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == units)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert dtype_advice(dtype) == advice
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")  # whose units PyTorch does not name
    assert dtype_advice(dtype) in (None, advice) and (units or dtype_advice(dtype) is None)
