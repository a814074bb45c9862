"""Train with Lightning: the loss that `training_step` returns trains every stage."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sid_trainer import cut


class Classifier(lightning.LightningModule):
    """An ordinary LightningModule around a network that was cut into stages."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the sum of the stage losses; its backward pass gives every stage its own gradients."""
        images, labels = batch
        return self.network(images, labels).loss

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the accuracy of the last stage."""
        images, labels = batch
        accuracy = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one optimizer for all stages."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 4) -> float:
    """Train on handwritten digits and return the accuracy on images kept out of training."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float().unsqueeze(1), torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    network = cut(model, at=["1", "4", "6"], num_classes=10, example=images[:2])

    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip  # also: precision="bf16-mixed", strategy="ddp", accumulate_grad_batches, gradient_clip_val
    classifier = Classifier(network)
    trainer.fit(classifier, DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=64, shuffle=True))
    metrics = trainer.test(classifier, DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=297))
    return metrics[0]["accuracy"]


if __name__ == "__main__":
    main()
