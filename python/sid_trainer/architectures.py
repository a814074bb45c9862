"""Networks by name. Only the reference network of the paper's public code is here so far."""

from torch import nn

from .network import BeliefHead, SIDNetwork, Stage

FEATURE_DIM = 128


def simple_cnn_extractor(in_channels: int) -> nn.Sequential:
    """Images (B, in_channels, H, W) of any H, W >= 4 -> features (B, 128).

    The reference puts each ReLU before its pooling. After it, the values and gradients are the same bits (the maximum
    commutes with it, and where they tie at zero no gradient passes either way) on a quarter of the elements.
    """

    def conv(before: int, after: int) -> nn.Conv2d:
        return nn.Conv2d(before, after, kernel_size=3, padding=1)

    return nn.Sequential(
        conv(in_channels, 32), nn.ReLU(inplace=True),
        conv(32, 64), nn.MaxPool2d(2), nn.ReLU(inplace=True),
        conv(64, 128), nn.ReLU(inplace=True),
        conv(128, 128), nn.MaxPool2d(2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, FEATURE_DIM),
    )  # fmt: skip


def simple_cnn_shared(num_classes: int, in_channels: int, depth: int) -> SIDNetwork:
    """The reference network: every stage reads the same features."""
    extractor = simple_cnn_extractor(in_channels)
    stages = [Stage(BeliefHead(FEATURE_DIM, num_classes)) for _ in range(depth)]
    return SIDNetwork(extractor, stages, num_classes)


NETWORKS = {("simple_cnn", "shared"): simple_cnn_shared}


def build_network(
    arch: str = "simple_cnn", layout: str = "shared", *, num_classes: int = 10, in_channels: int = 3, depth: int = 10
) -> SIDNetwork:
    """A network with freshly drawn parameters (PyTorch's defaults, from the global generator).

    Raises ValueError for a name that is not available and for sizes that make no network.
    """
    if (arch, layout) not in NETWORKS:
        available = ", ".join(f"arch={a!r} layout={b!r}" for a, b in NETWORKS)
        raise ValueError(f"no network with arch={arch!r} layout={layout!r}; available now: {available}")
    for name, value, least in (("num_classes", num_classes, 2), ("in_channels", in_channels, 1), ("depth", depth, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    return NETWORKS[arch, layout](num_classes, in_channels, depth)
