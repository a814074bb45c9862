"""Export a trained network for use without this package: from pixels to logits, as a PyTorch program or as ONNX."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import write_atomically
from ..network.language import LanguageModel
from ..network.modules import SIDNetwork
from ..network.own import Network
from .build import load_network

FORMATS = {"torch": "network.pt2", "onnx": "network.onnx"}  # format: default name of the file


class PixelClassifier(nn.Module):
    """A network that normalizes its inputs: images (B, C, H, W), float32 in [0, 1], to logits (B, classes)."""

    mean: Tensor  # (C, 1, 1), in [0, 1]
    std: Tensor  # (C, 1, 1)

    def __init__(self, network: Network, mean: Tensor, std: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("mean", (mean / 255).view(-1, 1, 1).clone())
        self.register_buffer("std", (std / 255).view(-1, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def export_network(
    network: Network, mean: Tensor, std: Tensor, image_size: tuple[int, int]
) -> torch.export.ExportedProgram:
    """Return a network as an exported program on the CPU, for batches of any size.

    Its `.module()` is an `nn.Module` of PyTorch operators and parameters only. mean and std (C,) are those of the
    training pixels in 0..255, as `pixel_statistics` returns them.
    """
    classifier = PixelClassifier(network, mean, std).cpu().eval()
    example = torch.rand(2, len(mean), *image_size)
    with torch.no_grad():
        return torch.export.export(classifier, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def export_language_model(network: LanguageModel, context: int) -> torch.export.ExportedProgram:
    """Return a language model as an exported program on the CPU: tokens (B, T), T <= context, to logits (B, T, V)."""
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = torch.zeros(2, max(context // 2, 2), dtype=torch.int64)
    with torch.no_grad():
        return torch.export.export(network.cpu().eval(), (example,), dynamic_shapes=(sizes,))


def write_program(program: torch.export.ExportedProgram, classes: Sequence[str], file: Path, format: str) -> None:
    """Write a program and the names of its classes to a file, completely or not at all.

    format: "torch" for `torch.export.load`, or "onnx", which needs the packages onnx and onnxscript. Raises ValueError
    for any other.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    buffer, names = io.BytesIO(), json.dumps(list(classes))
    if format == "torch":
        torch.export.save(program, buffer, extra_files={"classes.json": names})
    else:
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        assert exported is not None  # it is None only with dynamo=False
        import onnx_ir

        exported.model.metadata_props["classes"] = names
        buffer.write(onnx_ir.serde.serialize_model(exported.model).SerializeToString())
    write_atomically(file, lambda out: out.write(buffer.getvalue()))


def export_run(path: Path, file: Path | None, format: str, *, plain: bool = False) -> Path:
    """Export the network of a saved run to `file`, by default into the run's folder, and return that file.

    With `plain` it is the trunk and the last head alone. Raises ValueError if the network cannot be split like that.
    """
    network, _, metadata = load_network(path)
    if plain:
        if not isinstance(network, SIDNetwork):
            raise ValueError("plain is for the networks of --arch; of a network cut by names export `network.model`")
        network = network.plain()
    file = file or (path if path.is_dir() else path.parent) / FORMATS.get(format, "")
    if isinstance(network, LanguageModel):
        program = export_language_model(network, *metadata["image_size"])
    else:
        mean, std = (torch.tensor(metadata[name]) for name in ("pixel_mean", "pixel_std"))
        program = export_network(network, mean, std, tuple(metadata["image_size"]))
    write_program(program, metadata["classes"], file, format)
    return file
