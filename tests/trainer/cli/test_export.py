"""Test that exported programs and ONNX files give the same logits without this package."""

import importlib.util
import json
import os

import numpy as np
import pytest
import torch

from helpers.image_sets import write_image_folder
from helpers.processes import forked
from sid_trainer import build_network
from sid_trainer.cli import main
from sid_trainer.data.datasets import load_digits
from sid_trainer.runs.build import load_network
from sid_trainer.runs.export import export_network, write_program

ODD_NAMES = ["a", "b c", 'quo"te', "ü ☃", "back\\slash", "<b>", ""]
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

WITHOUT_US = """
import sys
sys.modules.update(sid_trainer=None, sid_kernels=None)  # importing either raises ImportError
import json, numpy, torch
names = {"classes.json": ""}
network = torch.export.load(sys.argv[1], extra_files=names).module()
pixels = torch.from_numpy(numpy.load(sys.argv[2]))
found = {str(size): network(pixels[:size]).detach().numpy() for size in (1, 2, 7, len(pixels))}
assert all(parameter.requires_grad for parameter in network.parameters())  # training can continue
numpy.savez(sys.argv[3], **found)
print(json.dumps([json.loads(names["classes.json"]), sorted(name for name in sys.modules if name.startswith("sid_"))]))
"""


def pixels():
    """Return test digits as an application would read them, (B, 1, 8, 8) in [0, 1]."""
    return load_digits().test.images[:40].permute(0, 3, 1, 2).float() / 255


def expected(folder, images):
    network, _, about = load_network(folder)
    mean, std = (torch.tensor(about[f"pixel_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return network((255 * images - mean) / std)


RUNS = {
    "mlp-stagewise": "--arch mlp --layout stagewise --train-images 300 --epochs 3",
    "cnn-shared": "--arch simple_cnn --layout shared --depth 3 --train-images 300 --epochs 2",
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory, blank_pictures):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert main(["train", *RUNS[request.param].split(), "--out", str(folder)]) == 0
    return folder


def test_a_program_runs_without_this_package(run, tmp_path, capsys):
    assert main(["export", str(run)]) == 0
    assert capsys.readouterr().out == f"written: {run / 'network.pt2'}\n"
    images = pixels()
    np.save(tmp_path / "pixels.npy", images.numpy())
    arguments = [str(run / "network.pt2"), str(tmp_path / "pixels.npy"), str(tmp_path / "logits.npz")]
    elsewhere = forked(WITHOUT_US, *arguments, cwd=tmp_path)
    assert elsewhere.returncode == 0, elsewhere.stderr
    classes, ours = json.loads(elsewhere.stdout.splitlines()[-1])
    assert classes == [str(i) for i in range(10)]
    assert ours == ["sid_kernels", "sid_trainer"]  # only the blocked entries, and no submodule
    logits = expected(run, images)
    actual = np.load(tmp_path / "logits.npz")
    assert actual.files == ["1", "2", "7", "40"]
    for size in actual.files:
        torch.testing.assert_close(torch.from_numpy(actual[size]), logits[: int(size)], rtol=1e-4, atol=1e-5)


@needs_onnx
def test_onnx(run, tmp_path, capsys):
    import onnxruntime

    file = tmp_path / "digits.onnx"
    assert main(["export", str(run), "--format", "onnx", "--out", str(file)]) == 0
    assert os.listdir(tmp_path) == ["digits.onnx"]  # one file that contains the weights
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == [str(i) for i in range(10)]
    (takes,), images = session.get_inputs(), pixels()
    logits = expected(run, images)
    for size in (1, 2, 7, 40):
        (actual,) = session.run(None, {takes.name: images[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), logits[:size], rtol=1e-3, atol=1e-4)


def test_a_program_has_the_accuracy_of_the_run(run):
    """Check that the test accuracy of a program equals that of the last epoch."""
    test = load_digits().test
    main(["export", str(run)])
    program = torch.export.load(run / "network.pt2").module()
    right = program(test.images.permute(0, 3, 1, 2).float() / 255).argmax(1) == test.labels
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert right.double().mean().item() == pytest.approx(last["test_accuracy"], abs=1.5 / len(test.labels))


@pytest.fixture(scope="module")
def program():
    network = build_network("mlp", "stagewise", num_classes=len(ODD_NAMES), in_channels=3, image_size=(4, 5), depth=2)
    return network, export_network(network, torch.tensor([0.0, 100.0, 255.0]), torch.tensor([1.0, 50.0, 255.0]), (4, 5))


def test_pixels_are_normalized_per_channel(program):
    network, exported_ = program
    images = torch.rand(3, 3, 4, 5)
    normal = torch.stack([images[:, 0] * 255, (images[:, 1] * 255 - 100) / 50, images[:, 2] - 1], dim=1)
    torch.testing.assert_close(exported_.module()(images), network(normal), rtol=1e-4, atol=1e-4)
    assert len(list(exported_.parameters())) == len(list(network.parameters()))


@pytest.mark.parametrize("arch", [pytest.param("vgg11", marks=pytest.mark.slow), "resnet18", "vit_tiny"])
def test_other_networks_with_any_batch_size(arch):
    """Export networks with batch-norm after one batch, and with learned positions."""
    network = build_network(arch, "stagewise", num_classes=3, in_channels=1, image_size=(4, 4))
    with torch.no_grad():
        network(torch.randn(8, 1, 4, 4))
    program = export_network(network.eval(), torch.tensor([100.0]), torch.tensor([50.0]), (4, 4)).module()
    images = torch.rand(5, 1, 4, 4)
    expected = network((255 * images - 100) / 50)
    for size in (1, 5):
        torch.testing.assert_close(program(images[:size]), expected[:size], rtol=1e-4, atol=1e-4)


def test_odd_class_names(program, tmp_path):
    _, exported_ = program
    write_program(exported_, ODD_NAMES, tmp_path / "odd.pt2", "torch")
    names = {"classes.json": ""}
    torch.export.load(tmp_path / "odd.pt2", extra_files=names)
    assert json.loads(names["classes.json"]) == ODD_NAMES
    with pytest.raises(ValueError, match="format must be one of torch, onnx, not 'tflite'"):
        write_program(exported_, ODD_NAMES, tmp_path / "odd.tflite", "tflite")
    assert os.listdir(tmp_path) == ["odd.pt2"]


@needs_onnx
def test_odd_class_names_in_onnx(program, tmp_path):
    import onnx

    write_program(program[1], ODD_NAMES, tmp_path / "odd.onnx", "onnx")
    model = onnx.load(tmp_path / "odd.onnx")
    onnx.checker.check_model(model)
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["classes"]) == ODD_NAMES


@pytest.mark.usefixtures("blank_pictures")
def test_names_of_class_folders_are_exported(tmp_path):
    data = write_image_folder(tmp_path / "set", classes=("$(touch gone)", "ü 'x'"))
    where = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    assert main(["train", *where, "--arch", "mlp", "--layout", "stagewise", "--depth", "1", "--epochs", "1"]) == 0
    assert main(["export", str(tmp_path / "run" / "last.pt")]) == 0
    names = {"classes.json": ""}
    torch.export.load(tmp_path / "run" / "network.pt2", extra_files=names)
    assert json.loads(names["classes.json"]) == ["$(touch gone)", "ü 'x'"]


@pytest.mark.parametrize("run", ["mlp-stagewise"], indirect=True)
def test_failed_exports_give_one_line(tmp_path, run, capsys):
    def refused(*words):
        assert main(["export", *map(str, words)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "no such file" in refused(tmp_path / "nowhere")
    assert "No such file or directory" in refused(run, "--out", tmp_path / "no" / "folder" / "x.pt2")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("run", ["mlp-stagewise"], indirect=True)
def test_a_missing_onnx_package_is_named(tmp_path, run):
    code = "import sys; sys.modules.update(onnxscript=None); from sid_trainer.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["export", str(run), "--format", "onnx", "--out", str(tmp_path / "x.onnx")]
    without = forked(code, *words)
    assert without.returncode == 2 and os.listdir(tmp_path) == []
    assert without.stderr.endswith(
        "sid export: error: 'onnxscript' cannot be imported; install it: pip install -e \".[onnx]\"\n"
    )
