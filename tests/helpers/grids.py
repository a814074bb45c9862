"""The grid of loss options that the local loss, the belief head and the cascade are all tested on."""

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# For interpreted kernels, which take a second or more per case: the half types are `slow`.
INTERPRETED_DTYPES = (torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:]))
TARGETS = {  # options of `make_case`
    "hard": dict(ignored=0.3),
    "hard smoothed": dict(ignored=0.3, label_smoothing=0.1),
    "soft": dict(soft=True),
    "soft smoothed": dict(soft=True, label_smoothing=0.2),
}
# (divergence, target): the reverse divergence of hard labels without smoothing is infinite.
KINDS = [(d, t) for d in ("forward", "reverse") for t in TARGETS if (d, t) != ("reverse", "hard")]
