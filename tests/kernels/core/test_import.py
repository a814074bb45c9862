"""Tests of importing the package, with and without its compiled modules, and of `sid_kernels.info`."""

import os
import subprocess
import sys
import textwrap

import pytest

from sid_kernels.core import backends


def python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *(arguments or ("-c", textwrap.dedent(code)))], capture_output=True, text=True, timeout=120,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    (
        "from sid_kernels import fused_local_loss; call = fused_local_loss",
        "import sid_kernels; call = sid_kernels.fused_local_loss",
        "import sid_kernels.fused_local_loss; call = sid_kernels.fused_local_loss",
        "from sid_kernels.fused_local_loss import fused_local_loss as call",
        "import sid_kernels; import sid_kernels.fused_local_loss as call",
    ),
)
def test_import_leaves_the_function_callable(statement):
    done = python(
        f"""
        {statement}
        import torch
        loss, belief, fidelity, consistency = call(torch.zeros(2, 4), None, torch.tensor([0, 3]))
        print(round(loss.item(), 4), tuple(belief.shape))
        """
    )
    assert done.stdout.split(" ", 1) == ["0.6931", "(2, 4)\n"], done.stderr


WITHOUT = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name in ("sid_kernels._C", "sid_kernels._cuda"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Blocked())
"""


def test_without_the_compiled_modules_the_reference_runs():
    done = python(
        WITHOUT
        + """
    import torch
    from sid_kernels import fused_local_loss, local_loss_and_grad
    from sid_kernels.core import backends
    z, labels = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 5])
    assert backends.automatic("cpu") == "reference"
    one, two = (fused_local_loss(z, None, labels, backend=name) for name in ("auto", "reference"))
    assert torch.equal(one.loss, two.loss)
    one.loss.backward()
    assert torch.equal(z.grad, local_loss_and_grad(z, None, labels)[1])
    try:
        fused_local_loss(z, None, labels, backend="cpu")
    except RuntimeError as error:
        print(error)
    """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend 'cpu' cannot be used here: "), done.stdout
    assert "sid_kernels._C" in done.stdout


def test_info_says_which_backends_are_usable_and_why_not():
    done = python(None, "-m", "sid_kernels.info")
    assert done.returncode == 0, done.stderr
    lines = {line[:20].strip(): line[21:] for line in done.stdout.splitlines()}
    for name in backends.BACKENDS:
        reason = backends.unavailable(name)
        state = lines[f"backend {name}"]
        assert state.startswith("usable") if reason is None else state == f"not usable: {reason}"
    assert lines["auto on cpu"] == ("reference" if backends.unavailable("cpu") else "cpu")
    for name in ("sid_kernels", "python", "torch", "threads"):
        assert lines[name]


def test_info_without_the_compiled_modules():
    done = python(WITHOUT + "    import runpy; runpy.run_module('sid_kernels.info', run_name='__main__')")
    assert "backend cpu          not usable: " in done.stdout, done.stderr
    assert "backend reference    usable" in done.stdout


def test_import_reads_no_environment_it_should_not():
    """Each call reads SID_KERNELS_DEBUG; the import prints nothing and warns of nothing."""
    done = python("import sid_kernels", SID_KERNELS_DEBUG="1", PYTHONWARNINGS="error::UserWarning")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
