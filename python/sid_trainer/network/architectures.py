"""Networks by name, and the cut that makes stages of any `nn.Sequential`.

A backbone is a trunk of blocks. `stagewise`: each block is the body of a stage of its own. `shared`: the whole trunk is
the extractor, and every stage reads the same features. Plain, for backpropagation: the trunk and a linear classifier.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .modules import PlainHead, Reader, SIDNetwork, Stage, StageHead

SHARED_DEPTH = 10  # belief stages, the reference's number
Trunk = Callable[[int, tuple[int, int], int], list[nn.Module]]  # of input channels, image size, stages


def cut(
    trunk: nn.Sequential,
    at: Sequence[int],
    num_classes: int,
    example: Tensor,
    *,
    head_depth: int = 1,
    hidden_dim: int = 256,
    grid: int = 4,
) -> SIDNetwork:
    """Cut any trunk into local stages, no gradient crossing a cut: `cut(trunk, [3, 6], 10, images[:1])`.

    Args:
        trunk: the backbone without its classifier; its layers become the bodies of the stages (they are not copied).
        at: the layers, counted from 0, that begin stages 2, 3, ...; increasing.
        num_classes: C, of the belief heads that are made for the stages.
        example: inputs (1 or more, ...), which are run through once to see the features' shapes.
        head_depth, hidden_dim: hidden layers of each head, and their width.
        grid: image features are pooled to grid x grid cells for the heads.

    Raises ValueError for cuts that leave a stage without layers.
    """
    if list(at) != sorted(set(at)) or (at and not (0 < at[0] and at[-1] < len(trunk))):
        raise ValueError(f"at must be increasing numbers of layers in 1..{len(trunk) - 1}, not {list(at)}")
    edges = [0, *at, len(trunk)]
    bodies = [trunk[start:end] for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return stagewise(bodies, num_classes, example, head_depth=head_depth, hidden_dim=hidden_dim, grid=grid)


def stagewise(
    blocks: Sequence[nn.Module], num_classes: int, example: Tensor, *, head_depth: int = 1, hidden_dim: int = 256,
    grid: int = 4,
) -> SIDNetwork:  # fmt: skip
    """A stage for each block; the arguments are those of `cut`."""
    stages = []
    for block, shape in zip(blocks, feature_shapes(blocks, example), strict=True):
        reader = Reader(shape, grid)
        stages.append(Stage(StageHead(reader.dim, num_classes, hidden_dim, depth=head_depth, reader=reader), block))
    return SIDNetwork(nn.Identity(), stages, num_classes)


@torch.no_grad()
def feature_shapes(blocks: Sequence[nn.Module], example: Tensor) -> list[tuple[int, ...]]:
    """The shape of one example's features after each block. On copies: no statistics are kept of the example."""
    shapes = []
    for block in blocks:
        example = copy.deepcopy(block).eval()(example)
        shapes.append(tuple(example.shape[1:]))
    return shapes


# ---------------------------------------------------------------- trunks


def simple_cnn(in_channels: int, image_size: tuple[int, int], stages: int) -> list[nn.Module]:
    """The reference's convolutions, one a block: 32, 64 (pooled), 128, 128 (pooled).

    The reference puts each ReLU before its pooling. After it, the values and gradients are the same bits (the maximum
    commutes with it, and where they tie at zero no gradient passes either way) on a quarter of the elements.
    """

    height, width = image_size
    if min(image_size) < 4:
        raise ValueError(f"image_size must be at least 4x4 for simple_cnn, which pools twice, not {height}x{width}")

    def block(before: int, after: int, pooled: bool) -> nn.Sequential:
        pooling = [nn.MaxPool2d(2)] if pooled else []
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), *pooling, nn.ReLU(inplace=True))

    return [block(in_channels, 32, False), block(32, 64, True), block(64, 128, False), block(128, 128, True)]


def vgg11(in_channels: int, image_size: tuple[int, int], stages: int) -> list[nn.Module]:
    """torchvision's VGG-11 features with batch-norm, cut after each pooling. Poolings round up, so 8x8 images pass."""
    from torchvision.models.vgg import cfgs, make_layers

    layers = make_layers(cfgs["A"], batch_norm=True)
    layers[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
    blocks: list[list[nn.Module]] = [[]]
    for layer in layers:
        blocks[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
            blocks.append([])
    for conv in (layer for layer in layers if isinstance(layer, nn.Conv2d)):  # as torchvision's VGG draws them
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.bias)
    return [nn.Sequential(*block) for block in blocks if block]


def resnet18(in_channels: int, image_size: tuple[int, int], stages: int) -> list[nn.Module]:
    """torchvision's ResNet-18 with a 3x3 stem and no first pooling, as small images need it; 4 or 8 stages."""
    from torchvision.models import resnet18

    net = resnet18()
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision draws it
    stem, layers = nn.Sequential(net.conv1, net.bn1, net.relu), [net.layer1, net.layer2, net.layer3, net.layer4]
    blocks = layers if stages == 4 else [block for layer in layers for block in layer]
    return [nn.Sequential(stem, blocks[0]), *blocks[1:]]


class PatchEmbedding(nn.Module):
    """Images (B, channels, H, W) -> tokens (B, T, D): patches, projected, plus a learned position each."""

    def __init__(self, in_channels: int, patch: int, tokens: int, dim: int):
        super().__init__()
        self.project = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, tokens, dim).normal_(std=0.02))

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).flatten(2).transpose(1, 2) + self.position


def vit_tiny(in_channels: int, image_size: tuple[int, int], stages: int) -> list[nn.Module]:
    """12 of torchvision's encoder blocks, width 192, 3 heads, about 8x8 patches, in as many groups as stages.

    The heads read the mean of the tokens; there is no class token.
    """
    from torchvision.models.vision_transformer import EncoderBlock

    height, width = image_size
    if height != width:
        raise ValueError(f"vit_tiny takes square images, not {height}x{width}")
    patch = min((p for p in range(1, height + 1) if height % p == 0), key=lambda p: abs(p - height / 8))
    dim, depth = 192, 12
    embedding = PatchEmbedding(in_channels, patch, (height // patch) ** 2, dim)
    blocks = [EncoderBlock(3, dim, 4 * dim, 0.0, 0.0) for _ in range(depth)]
    size = depth // stages
    groups = [nn.Sequential(*blocks[i : i + size]) for i in range(0, depth, size)]
    groups[0].insert(0, embedding)
    return groups


def mlp(in_channels: int, image_size: tuple[int, int], stages: int) -> list[nn.Module]:
    """Hidden layers of 256, one a block."""
    dims = [in_channels * image_size[0] * image_size[1]] + [256] * stages
    blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU(inplace=True)) for a, b in zip(dims, dims[1:], strict=False)]
    blocks[0].insert(0, nn.Flatten())
    return blocks


TRUNKS: dict[str, tuple[Trunk, Sequence[int]]] = {  # and the numbers of stages it can be cut into, the default first
    "simple_cnn": (simple_cnn, (4,)),
    "vgg11": (vgg11, (5,)),
    "resnet18": (resnet18, (4, 8)),
    "vit_tiny": (vit_tiny, (4, 1, 2, 3, 6, 12)),
    "mlp": (mlp, (4, *range(1, 4), *range(5, 129))),
}
LAYOUTS = ("shared", "stagewise")


def stage_count(arch: str, layout: str, depth: int | None = None) -> int:
    """The stages of a network that is not plain, `depth` if it is given. Raises ValueError for one it cannot have."""
    for name, value, table in (("arch", arch, TRUNKS), ("layout", layout, LAYOUTS)):
        if value not in table:
            raise ValueError(f"{name} must be one of {', '.join(table)}, not {value!r}")
    depths = TRUNKS[arch][1]
    if depth is None:
        return SHARED_DEPTH if layout == "shared" else depths[0]
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    if layout == "stagewise" and depth not in depths:
        allowed = ", ".join(map(str, sorted(depths))) if len(depths) < 9 else f"{min(depths)}..{max(depths)}"
        raise ValueError(f"depth must be {allowed} for a stagewise {arch}, not {depth}")
    return depth


def build_network(
    arch: str = "simple_cnn",
    layout: str = "shared",
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: tuple[int, int] = (32, 32),
    depth: int | None = None,
    plain: bool = False,
    head_depth: int = 1,
    hidden_dim: int = 256,
    grid: int = 4,
) -> SIDNetwork:
    """A network with freshly drawn parameters (the libraries' defaults, from the global generator).

    Args:
        arch: one of `TRUNKS`. layout: "shared" (extractor and `depth` belief stages, 10 by default) or "stagewise" (the
            trunk itself cut into `depth` stages).
        num_classes, in_channels, image_size: of the data; image_size is (H, W).
        plain: in place of the stagewise network its backbone with one linear classifier, what backpropagation trains.
        head_depth, hidden_dim: hidden layers of each head, and their width.
        grid: stagewise heads, and the plain backbone's classifier, read image features pooled to grid x grid cells.

    Raises ValueError for a name that is not available and for sizes that make no network.
    """
    depth = stage_count(arch, layout, depth)
    trunk, depths = TRUNKS[arch]
    least = (
        ("num_classes", num_classes, 2), ("in_channels", in_channels, 1), ("head_depth", head_depth, 0),
        ("hidden_dim", hidden_dim, 1), ("grid", grid, 1),
    )  # fmt: skip
    for name, value, lowest in least:
        if value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, not {value}")
    example = torch.zeros(1, in_channels, *image_size)
    blocks = trunk(in_channels, image_size, depth if layout == "stagewise" else depths[0])
    if layout == "stagewise" and not plain:
        return stagewise(blocks, num_classes, example, head_depth=head_depth, hidden_dim=hidden_dim, grid=grid)
    reader = Reader(feature_shapes(blocks, example)[-1], grid if layout == "stagewise" else 1)
    if layout == "stagewise":
        head = PlainHead(reader.dim, num_classes, reader)
        return SIDNetwork(nn.Sequential(*blocks), [Stage(head)], num_classes)
    dim = reader.dim
    if arch == "simple_cnn":  # the reference ends its extractor with a linear layer
        reader.append(nn.Linear(dim, dim))
    heads = [StageHead(dim, num_classes, hidden_dim, depth=head_depth) for _ in range(depth)]
    return SIDNetwork(nn.Sequential(*blocks, reader), [Stage(head) for head in heads], num_classes)
