"""Train the same network by SID, by greedy stages with graded labels and by backpropagation, and compare them."""

import torch

from sid_trainer import TrainConfig, Trainer, build_network, load_data


def main(epochs: int = 3) -> dict[str, float]:
    """Train on handwritten digits and return the test accuracy of each method."""
    data, accuracies = load_data("digits"), {}
    for method in ("sid", "greedy", "bp"):
        torch.manual_seed(0)
        heads = {"norm": True, "tail": 1, "prior_input": False, "classifier": "mlp"}
        shape = {"in_channels": 1, "image_size": (8, 8)}
        network = build_network("simple_cnn", "stagewise", plain=method == "bp", **shape, **heads)
        config = TrainConfig(
            method=method, epochs=epochs, optimizer="adamw", lr=5e-3, lr_schedule="one-cycle",
            label_smoothing="graded" if method == "greedy" else 0.0,  # 1/2, 1/4, 1/8, 1/16 over depth
        )  # fmt: skip
        rows = Trainer(network, data, config, quiet=True).fit()
        accuracies[method] = rows[-1]["test_accuracy"]
        held = rows[-1]["activation_bytes"] / 2**20
        print(f"{method:7s} test accuracy {accuracies[method]:.1%}   held for backward {held:.2f} MiB")
    return accuracies


if __name__ == "__main__":
    main()
