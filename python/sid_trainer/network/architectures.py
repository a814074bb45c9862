"""Build networks by name.

A backbone is a trunk of blocks. In the layout `stagewise` each block is the body of its own stage. In `shared` the
trunk is the extractor, and all stages read the same features. A plain network is the trunk and a linear classifier.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from .cut import block_features, make_head, stagewise
from .heads import FeaturePooling, HeadOptions, LinearClassifier, StackedHeads, StageHead
from .modules import SIDNetwork, Stage

SHARED_DEPTH = 10  # belief stages, as in the public implementation
# (in_channels, image_size, stages, norm) -> blocks; trunks that always normalize ignore `norm`
Trunk = Callable[[int, tuple[int, int], int, bool], Sequence[nn.Module]]


# ---------------------------------------------------------------- trunks


def simple_cnn(in_channels: int, image_size: tuple[int, int], stages: int, norm: bool) -> list[nn.Module]:
    """Return the convolutions of the public implementation, one per block: 32, 64 (pooled), 128, 128 (pooled) channels.

    Each ReLU follows its pooling and so runs on a quarter of the elements. The results have the same bits as in the
    other order: the maximum commutes with ReLU, and at ties of zero no gradient passes either way.
    """
    height, width = image_size
    if min(image_size) < 4:
        raise ValueError(f"image_size must be at least 4x4 for simple_cnn, which pools twice, not {height}x{width}")

    def block(before: int, after: int, pooled: bool) -> nn.Sequential:
        pooling = [nn.MaxPool2d(2)] if pooled else []
        batch_norm = [nn.BatchNorm2d(after)] if norm else []
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), *batch_norm, *pooling, nn.ReLU(inplace=True))

    return [block(in_channels, 32, False), block(32, 64, True), block(64, 128, False), block(128, 128, True)]


def vgg11(in_channels: int, image_size: tuple[int, int], stages: int, norm: bool) -> list[nn.Module]:
    """Return torchvision's VGG-11 features with batch-norm, one block per pooling; it rounds up, so 8x8 images fit."""
    from torchvision.models.vgg import cfgs, make_layers

    layers = make_layers(cfgs["A"], batch_norm=True)
    layers[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
    blocks: list[list[nn.Module]] = [[]]
    for layer in layers:
        blocks[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
            blocks.append([])
    for conv in (layer for layer in layers if isinstance(layer, nn.Conv2d)):  # initialized as in torchvision's VGG
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    return [nn.Sequential(*block) for block in blocks if block]


def resnet18(in_channels: int, image_size: tuple[int, int], stages: int, norm: bool) -> list[nn.Module]:
    """Return torchvision's ResNet-18 in 4 or 8 blocks, with a 3x3 stem and no first pooling, for small images."""
    from torchvision.models import resnet18

    net = resnet18()
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # initialized as in torchvision
    stem, layers = nn.Sequential(net.conv1, net.bn1, net.relu), [net.layer1, net.layer2, net.layer3, net.layer4]
    blocks = layers if stages == 4 else [block for layer in layers for block in layer]
    return [nn.Sequential(stem, blocks[0]), *blocks[1:]]


class PatchEmbedding(nn.Module):
    """Turn images (B, channels, H, W) into tokens (B, T, D): projected patches plus learned positions."""

    def __init__(self, in_channels: int, patch: int, tokens: int, dim: int):
        super().__init__()
        self.project = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, tokens, dim).normal_(std=0.02))

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).flatten(2).transpose(1, 2) + self.position


def vit_tiny(in_channels: int, image_size: tuple[int, int], stages: int, norm: bool) -> Sequence[nn.Module]:
    """Return 12 of torchvision's encoder blocks (dimension 192, 3 heads, about 8x8 patches) in `stages` groups.

    The stage heads read the mean of the tokens; there is no class token.
    """
    from torchvision.models.vision_transformer import EncoderBlock

    height, width = image_size
    if height != width:
        raise ValueError(f"image_size must be square for vit_tiny, not {height}x{width}")
    patch = min((p for p in range(1, height + 1) if height % p == 0), key=lambda p: abs(p - height / 8))
    dim, depth = 192, 12
    embedding = PatchEmbedding(in_channels, patch, (height // patch) ** 2, dim)
    blocks = [EncoderBlock(3, dim, 4 * dim, 0.0, 0.0) for _ in range(depth)]
    size = depth // stages
    groups = [nn.Sequential(*blocks[i : i + size]) for i in range(0, depth, size)]
    groups[0].insert(0, embedding)
    return groups


def mlp(in_channels: int, image_size: tuple[int, int], stages: int, norm: bool) -> Sequence[nn.Module]:
    """Return hidden layers of 256 units, one per block."""
    dims = [in_channels * image_size[0] * image_size[1]] + [256] * stages
    blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU(inplace=True)) for a, b in pairwise(dims)]
    for block in blocks if norm else ():
        block.insert(1, nn.BatchNorm1d(256))
    blocks[0].insert(0, nn.Flatten())
    return blocks


# Name -> trunk, and the numbers of stages it can be cut into, the default first.
TRUNKS: dict[str, tuple[Trunk, Sequence[int]]] = {
    "simple_cnn": (simple_cnn, (4,)),
    "vgg11": (vgg11, (5,)),
    "resnet18": (resnet18, (4, 8)),
    "vit_tiny": (vit_tiny, (4, 1, 2, 3, 6, 12)),
    "mlp": (mlp, (4, *range(1, 4), *range(5, 129))),
}
ARCHITECTURES = (*TRUNKS, "gpt")  # gpt: `build_language_model`
LAYOUTS = ("shared", "stagewise")
CLASSIFIERS = ("linear", "mlp")


def stage_count(arch: str, layout: str, depth: int | None = None) -> int:
    """Return `depth`, or the default number of stages. Raises ValueError for a depth that the network cannot have."""
    for name, value, table in (("arch", arch, ARCHITECTURES), ("layout", layout, LAYOUTS)):
        if value not in table:
            raise ValueError(f"{name} must be one of {', '.join(table)}, not {value!r}")
    if arch == "gpt" and layout == "shared":
        raise ValueError("layout must be 'stagewise' for gpt, not 'shared'")
    depths = (2, 1, *range(3, 129)) if arch == "gpt" else TRUNKS[arch][1]
    if depth is None:
        return SHARED_DEPTH if layout == "shared" else depths[0]
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    if layout == "stagewise" and depth not in depths:
        allowed = ", ".join(map(str, sorted(depths))) if len(depths) < 9 else f"{min(depths)}..{max(depths)}"
        raise ValueError(f"depth must be {allowed} for a stagewise {arch}, not {depth}")
    return depth


def build_network(
    arch: str = "simple_cnn", layout: str = "shared", *, num_classes: int = 10, in_channels: int = 3,
    image_size: tuple[int, int] = (32, 32), depth: int | None = None, plain: bool = False, head_depth: int = 1,
    hidden_dim: int = 256, grid: int = 4, fused: bool = True, norm: bool = False, tail: int = 0,
    prior_input: bool = True, prior_dropout: float = 0.0, classifier: str = "linear",
) -> SIDNetwork:  # fmt: skip
    """Build a network. Its parameters are drawn from the global generator, as PyTorch and torchvision do.

    Args:
        arch: Name of the backbone, one of `TRUNKS`.
        layout: "shared" (an extractor and `depth` belief stages) or "stagewise" (the trunk cut into `depth` stages).
        num_classes: Number of classes C.
        in_channels, image_size: Channels, and height and width, of the images.
        depth: Number of stages. Default: 10 for the shared layout, otherwise the backbone's first in `TRUNKS`.
        plain: Build the backbone with one linear classifier for backpropagation, instead of the stagewise network.
        head_depth, hidden_dim: Number and size of the hidden layers of each head.
        grid: Stagewise heads and the plain classifier read image features pooled to grid x grid cells.
        fused: Build the shared layout's heads as `StackedHeads` if `head_depth` is 1. Otherwise `network.stages` is a
            ModuleList of `Stage(StageHead(...))`. The drawn parameters are the same.
        norm: Add batch-norm to the trunks that have none (simple_cnn, mlp) and to the hidden layers of stagewise heads.
        tail: Number of blocks through which each stagewise head reads its features. They are built like the trunk's
            next blocks, so later stages have fewer and the last one has none.
        prior_input, prior_dropout: As in `HeadOptions`, for stagewise heads.
        classifier: Classifier of a plain stagewise network: "linear", or "mlp" like the last stage's head, without a
            belief.

    Raises ValueError for an unknown name and for sizes that are not allowed.
    """
    depth = stage_count(arch, layout, depth)
    trunk, depths = TRUNKS[arch]
    for name, value, least in (("num_classes", num_classes, 2), ("in_channels", in_channels, 1), ("tail", tail, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier must be one of {', '.join(CLASSIFIERS)}, not {classifier!r}")
    options = HeadOptions(head_depth, hidden_dim, grid, norm, prior_input, prior_dropout)
    if layout == "shared" and (tail or prior_dropout or not prior_input):
        raise ValueError("tail, prior_input and prior_dropout are for layout 'stagewise', not for 'shared'")
    example = torch.zeros(1, in_channels, *image_size)
    blocks = trunk(in_channels, image_size, depth if layout == "stagewise" else depths[0], norm)
    if layout == "stagewise" and not plain:
        tails = [trunk(in_channels, image_size, depth, norm)[i + 1 :][:tail] if tail else () for i in range(depth)]
        return stagewise(blocks, num_classes, example, options, tails)
    shape = block_features(blocks, example)[-1].tensor.shape[1:]
    pooling = FeaturePooling(tuple(shape), grid if layout == "stagewise" else 1)
    if layout == "stagewise":
        head: nn.Module = LinearClassifier(pooling.dim, num_classes, pooling)
        if classifier == "mlp":
            channels = "first" if len(shape) > 2 else "last"
            head = make_head(tuple(shape), channels, num_classes, replace(options, prior_input=False))
        return SIDNetwork(nn.Sequential(*blocks), [Stage(head)], num_classes)
    if arch == "simple_cnn":  # the public implementation ends its extractor with a linear layer
        pooling.append(nn.Linear(pooling.dim, pooling.dim))
    extractor = nn.Sequential(*blocks, pooling)
    if fused and head_depth == 1:
        return SIDNetwork(extractor, StackedHeads(depth, pooling.dim, num_classes, hidden_dim), num_classes)
    heads = [StageHead(pooling.dim, num_classes, hidden_dim, depth=head_depth) for _ in range(depth)]
    return SIDNetwork(extractor, [Stage(head) for head in heads], num_classes)
