"""Check that large outputs use freed memory again, and never memory that a tensor still has."""

import io
import sys
import threading
import weakref

import pytest
import torch

from sid_kernels import fused_local_loss, local_loss_and_grad, release_memory
from sid_kernels.core import cpu, memory

CPU = torch.device("cpu")
ROWS, CLASSES = 512, 1024  # 2 MiB in float32
pytestmark = pytest.mark.skipif(
    memory.LEAST_BYTES == sys.maxsize, reason="SID_KERNELS_KEEP_MEMORY=0, or no mmap.MAP_ANONYMOUS"
)


@pytest.fixture(autouse=True)
def nothing_kept():
    release_memory()
    yield
    release_memory()


def matrix(rows=ROWS, dtype=torch.float32):
    return memory.empty_matrix((rows, CLASSES), dtype, CPU)


def block_of(number):
    """Return a weak reference to the block that a request used."""
    return weakref.ref(memory._blocks[number])


def test_freed_memory_is_used_again():
    x = matrix()
    (number,) = memory._blocks
    block = block_of(number)
    del x
    y = matrix(ROWS - 1)
    (number,) = memory._blocks
    assert block() is memory._blocks[number]
    assert y.shape == (ROWS - 1, CLASSES) and y.is_contiguous() and not y._is_view()


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x[3:], lambda x: x.untyped_storage(), lambda x: x.numpy()])
def test_memory_in_use_is_not_given_away(keep):
    x = matrix().fill_(1.0)
    kept = keep(x)
    address = x.untyped_storage().data_ptr()
    del x
    others = [matrix() for _ in range(4)]
    for other in others:
        assert other.untyped_storage().data_ptr() // memory.PAGE != address // memory.PAGE
        other.fill_(2.0)
    assert not isinstance(kept, torch.Tensor) or bool((kept == 1.0).all())


def test_outputs_of_a_call_survive_the_next_calls():
    torch.manual_seed(0)
    prior, target = torch.rand(ROWS, CLASSES).softmax(1), torch.randint(CLASSES, (ROWS,))
    results = []
    for seed in range(6):
        torch.manual_seed(seed)
        logits = torch.randn(ROWS, CLASSES, requires_grad=True)
        loss, belief, _, _ = fused_local_loss(logits, prior, target)
        loss.backward()
        results.append((logits, belief))
    for logits, belief in results:
        expected, gradient = local_loss_and_grad(logits.detach(), prior, target, backend="reference")
        torch.testing.assert_close(belief, expected.belief, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(logits.grad, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.skipif(cpu.compiled is None, reason="the CPU kernels are not built")
def test_bits_do_not_depend_on_kept_memory(monkeypatch):
    torch.manual_seed(0)
    logits, prior = torch.randn(ROWS, CLASSES), torch.rand(ROWS, CLASSES).softmax(1)
    target = torch.randint(CLASSES, (ROWS,))

    def compute():
        (loss, belief, fidelity, consistency), gradient = local_loss_and_grad(logits, prior, target)
        return loss, belief, fidelity, consistency, gradient

    kept = [compute() for _ in range(3)][-1]
    monkeypatch.setattr(memory, "LEAST_BYTES", sys.maxsize)
    for a, b in zip(kept, compute(), strict=True):
        assert torch.equal(a, b)


def test_much_larger_memory_is_not_used_for_small_outputs():
    x = matrix(3 * ROWS)
    address = x.data_ptr() // memory.PAGE
    del x
    assert matrix().data_ptr() // memory.PAGE != address


def test_a_saved_output_takes_its_own_bytes():
    x = matrix(2 * ROWS)
    del x
    y = matrix(ROWS + 1)
    assert y.untyped_storage().nbytes() == 4 * y.numel()
    file = io.BytesIO()
    torch.save(y, file)
    assert file.tell() < 4 * y.numel() + 4096


def test_idle_memory_goes_back():
    x = matrix(4 * ROWS)
    (number,) = memory._blocks
    block = block_of(number)
    del x
    for _ in range(memory.MOST_IDLE):
        matrix()
        assert block() is not None
    matrix()
    assert block() is None


def test_release_memory():
    x, y = matrix(), matrix().fill_(3.0)
    blocks = [block_of(number) for number in memory._blocks]
    del x
    release_memory()
    assert [block() is None for block in blocks] == [True, False]
    assert bool((y == 3.0).all())


def test_outputs_beyond_the_limit_of_blocks_are_not_kept():
    outputs = [matrix(256) for _ in range(memory.MOST_BLOCKS + 3)]
    assert len({x.data_ptr() for x in outputs}) == len(outputs)
    assert len(memory._blocks) == memory.MOST_BLOCKS


def test_small_outputs_come_from_pytorch():
    assert matrix(4).shape == (4, CLASSES)
    assert not memory._blocks


def test_threads_never_share_memory():
    wrong, barrier = [], threading.Barrier(4)

    def work(value):
        barrier.wait()
        for _ in range(200):
            x = matrix(256).fill_(value)
            y = matrix(256).fill_(-value)
            if not bool((x == value).all()) or not bool((y == -value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i + 1),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_free_memory_in_large_pages(monkeypatch):
    lines = "Node 0, zone      DMA      0      0      0      0      0      0      0      0      1      1      3 \n"
    monkeypatch.setattr(memory.Path, "read_text", lambda self: lines)
    assert memory.free_in_large_pages() == (1 << 21) + 3 * (1 << 22)

    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "read_text", missing)
    assert memory.free_in_large_pages() == 0
