"""Cut your own network into local stages and train it with the Trainer."""

from torch import nn

from sid_trainer import TrainConfig, Trainer, cut, load_data


def main(epochs: int = 5) -> float:
    """Train on handwritten digits and return the test accuracy of the last stage."""
    data = load_data("digits")  # 8x8 grey images from scikit-learn; needs no download
    trunk = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    example = data.train.images[:1].permute(0, 3, 1, 2).float()  # (1, C, H, W)
    network = cut(trunk, at=[2, 5], num_classes=10, example=example)  # stages begin at layers 0, 2 and 5
    rows = Trainer(network, data, TrainConfig(epochs=epochs, lr=3e-3), quiet=True).fit()
    for stage, accuracy in enumerate(rows[-1]["stage_accuracy"], 1):
        print(f"stage {stage}  test accuracy {accuracy:.1%}")
    return rows[-1]["test_accuracy"]


if __name__ == "__main__":
    main()
