"""Under TRITON_INTERPRET=1: apply the corrections to Triton's interpreter before a kernel runs."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from helpers import triton_interpreter  # noqa: F401
