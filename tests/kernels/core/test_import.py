"""Tests of importing the package, with and without its compiled modules, and of `sid_kernels.info`."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from helpers.processes import PATIENCE, forked
from sid_kernels.core import backends, native


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
    done = forked(
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
    done = forked(
        WITHOUT
        + """
    import torch
    from sid_kernels import fused_local_loss, local_loss_and_grad
    from sid_kernels.core import backends, native
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
    done = forked("import runpy; runpy.run_module('sid_kernels.info', run_name='__main__')")
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
    done = forked(WITHOUT + "    import runpy; runpy.run_module('sid_kernels.info', run_name='__main__')")
    assert "backend cpu          not usable: " in done.stdout, done.stderr
    assert "backend reference    usable" in done.stdout


def test_import_reads_no_environment_it_should_not():
    """Check that each call reads SID_KERNELS_DEBUG, and that the import prints nothing and gives no warning."""
    done = subprocess.run(
        [sys.executable, "-c", "import sid_kernels"], capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"SID_KERNELS_DEBUG": "1", "PYTHONWARNINGS": "error::UserWarning"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


CALL = """
    import torch, sid_kernels
    z, labels = torch.randn(4, 6), torch.tensor([0, 1, 2, 5])
    for _ in range(3):
        sid_kernels.fused_local_loss(z, None, labels)
"""


def copy_package(folder, compiled=None):
    """Copy the Python files of the package to `folder`; compiled: the source of a module _C."""
    shutil.copytree(
        native.FOLDER, folder / "sid_kernels", ignore=shutil.ignore_patterns("_C*", "_cuda*", "__pycache__")
    )
    if compiled is not None:
        (folder / "sid_kernels/_C.py").write_text(compiled)
    return folder


def warned(*folders):
    """Return the lines of warnings if `folders` come first on the path, without the hooks of editable installations."""
    done = forked(
        f"import sys; sys.path[:0] = {[str(x) for x in folders]}\n"
        "sys.meta_path[:] = [x for x in sys.meta_path if 'editable' not in str(x)]" + textwrap.dedent(CALL)
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]


def test_a_checkout_that_was_not_built_says_so_once(tmp_path):
    """Check that an unbuilt checkout warns once; it used to compute with the reference silently."""
    (line,) = warned(copy_package(tmp_path / "checkout"), copy_package(tmp_path / "installed", "interface = 0"))
    assert "slow backend 'reference'" in line and f"hides the package installed in {tmp_path}/installed" in line


def test_a_package_that_was_not_built_says_so_once(tmp_path):
    (line,) = warned(copy_package(tmp_path))
    assert f"sid_kernels._C is not in {tmp_path}/sid_kernels" in line


@pytest.mark.parametrize("source", ["", "interface = 1", "interface = 10**6"])
def test_a_compiled_module_of_another_version_asks_to_build_again(tmp_path, source):
    """Check the message for modules older than `git pull`; the first call used to end in a TypeError of pybind11."""
    (line,) = warned(copy_package(tmp_path, source))
    assert "sid_kernels/_C.py has interface 1" in line and "build again" in line


def test_bindings_have_the_version_of_their_arguments():
    """Compare the digest of the bindings with the one for INTERFACE.

    If this fails: raise INTERFACE in native.py and kInterface in arguments.h, and put the new digest here.
    """
    csrc = native.FOLDER.parent / "csrc/bindings"
    if not csrc.is_dir():
        pytest.skip("installed without sources")
    code = re.sub(r"//[^\n]*|\s+", "", "".join(path.read_text() for path in sorted(csrc.iterdir())))
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    assert (native.INTERFACE, digest) == (2, "6d183da64c8ac847")
    assert f"kInterface={native.INTERFACE};" in code
