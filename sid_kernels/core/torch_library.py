"""The library that holds the operators `torch.ops.sid_kernels.*`."""

import torch

library = torch.library.Library("sid_kernels", "DEF")
