"""Export of a trained network for use without this package: from pixels to logits, as a PyTorch program or as ONNX."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import write_atomically
from ..network.modules import SIDNetwork
from .build import trained_network

FORMATS = ("torch", "onnx")


class PixelClassifier(nn.Module):
    """A network that normalises its inputs: images (B, C, H, W), float32 in [0, 1], to logits (B, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: SIDNetwork, mean: Tensor, std: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("mean", (mean / 255).view(-1, 1, 1).clone())
        self.register_buffer("std", (std / 255).view(-1, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def export_network(
    network: SIDNetwork, mean: Tensor, std: Tensor, image_size: tuple[int, int]
) -> torch.export.ExportedProgram:
    """Return the network as an exported program on the CPU, for batches of any size.

    Its `.module()` is a plain `nn.Module` of PyTorch operators and parameters. mean and std (C,) are those of the
    training pixels in 0..255, as `pixel_statistics` returns them.
    """
    classifier = PixelClassifier(network, mean, std).cpu().eval()
    example = torch.rand(2, len(mean), *image_size)
    with torch.no_grad():
        return torch.export.export(classifier, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_program(program: torch.export.ExportedProgram, classes: Sequence[str], file: Path, form: str) -> None:
    """Write the program and the names of the classes to `file`, whole or not at all.

    form: "torch" for `torch.export.load`, or "onnx", which needs the packages onnx and onnxscript.
    """
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {form!r}")
    buffer, names = io.BytesIO(), json.dumps(list(classes))
    if form == "torch":
        torch.export.save(program, buffer, extra_files={"classes.json": names})
    else:
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        assert exported is not None  # only None with dynamo=False
        model = exported.model
        model.metadata_props["classes"] = names
        import onnx_ir

        buffer.write(onnx_ir.serde.serialize_model(model).SerializeToString())
    write_atomically(file, lambda out: out.write(buffer.getvalue()))


def export_run(place: Path, file: Path | None, form: str) -> Path:
    """Export the network of a checkpoint to `file`, by default beside the checkpoint, and return the file."""
    network, _, metadata = trained_network(place)
    file = file or (place if place.is_dir() else place.parent) / ("network.onnx" if form == "onnx" else "network.pt2")
    mean, std = map(torch.tensor, (metadata["pixel_mean"], metadata["pixel_std"]))
    program = export_network(network, mean, std, tuple(metadata["image_size"]))
    write_program(program, metadata["classes"], file, form)
    return file
