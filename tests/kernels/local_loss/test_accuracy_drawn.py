"""Tests of the error budget on shapes, values and options drawn by hypothesis, for every backend."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws these cases and is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.grids import DTYPES
from helpers.local_loss import run
from helpers.oracle import make_case

SMALL = st.one_of(st.integers(1, 70), st.sampled_from((127, 128, 129, 255, 257)))
LARGE = st.one_of(st.integers(900, 3000), st.sampled_from((1023, 1024, 1025, 2047, 2048, 2049)))
OPTIONS = dict(
    dtype=st.sampled_from(DTYPES),
    prior_dtype=st.sampled_from(DTYPES),
    prior=st.sampled_from((True, True, True, False)),
    soft=st.booleans(),
    alpha=st.sampled_from((0.0, 1.0, 0.5, 1e-3, "rows", "scalar")),
    divergence=st.sampled_from(("forward", "reverse")),
    label_smoothing=st.sampled_from((0.0, 1e-6, 0.1, 1.0)),
    reduction=st.sampled_from(("none", "mean", "sum")),
    scale=st.sampled_from((0.0, 1e-3, 1.0, 3.0, 30.0, 1e4)),
    ignored=st.sampled_from((0.0, 0.3, 1.0)),
    ignore_index=st.sampled_from((-100, -1, 0, 5)),
    seed=st.integers(0, 10_000),
)


def check(backend, rows, classes, divergence, soft, label_smoothing, **kinds):
    if divergence == "reverse" and not soft and label_smoothing == 0.0:
        label_smoothing = 0.1  # the divergence is infinite without
    case = make_case(rows, classes, divergence=divergence, soft=soft, label_smoothing=label_smoothing, **kinds)
    run(case, backend)


@settings(max_examples=250)
@given(rows=st.integers(0, 9), classes=SMALL, **OPTIONS)
def test_small_rows(backend, **drawn):
    check(backend, **drawn)


@settings(max_examples=60)
@given(rows=st.integers(1, 4), classes=LARGE, **OPTIONS)
def test_large_rows(backend, **drawn):
    check(backend, **drawn)


values = st.floats(-60, 60, width=32)


@settings(max_examples=120)
@given(data=st.data(), classes=st.integers(1, 40), divergence=st.sampled_from(("forward", "reverse")))
def test_drawn_logits_with_masked_classes(backend, data, classes, divergence):
    """Draw finite logits, some of them masked where prior and target are 0."""
    case = make_case(2, classes, soft=True, divergence=divergence, reduction="none")
    case.logits = torch.tensor(data.draw(st.lists(values, min_size=2 * classes, max_size=2 * classes))).view(2, classes)
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=classes, max_size=classes)))
    masked[data.draw(st.integers(0, classes - 1))] = False  # keep one class
    case.logits[:, masked] = -torch.inf
    case.prior = case.prior * ~masked
    case.target = case.target * ~masked
    result, dlogits = run(case, backend)
    assert result.loss.isfinite().all()
    assert (dlogits[:, masked] == 0).all() and (result.belief[:, masked] == 0).all()
