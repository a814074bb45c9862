"""Train a U-net with skip connections to classify every pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sid_trainer import cut


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Return a convolution with batch normalization and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """An ordinary U-net. Nothing in it knows about stages."""

    def __init__(self, width: int = 8, num_classes: int = 3):
        super().__init__()
        self.down1, self.down2 = block(1, width), block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up2, self.up1 = block(6 * width, 2 * width), block(3 * width, width)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C, H, W) for images (B, 1, H, W)."""
        fine = self.down1(images)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        middle = self.up2(torch.cat([F.interpolate(coarse, scale_factor=2), middle], dim=1))
        fine = self.up1(torch.cat([F.interpolate(middle, scale_factor=2), fine], dim=1))
        return self.classifier(fine)


def squares(count: int, size: int = 24) -> tuple[Tensor, Tensor]:
    """Return noisy images (B, 1, H, W) of a grey and a white square, and the class (B, H, W) of each pixel."""
    rows = torch.arange(size)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for label in (1, 2):
        top, left = torch.randint(0, size - 10, (2, count, 1))
        inside = (rows >= top) & (rows < top + 10), (rows >= left) & (rows < left + 10)  # (B, H), (B, W)
        labels[inside[0][:, :, None] & inside[1][:, None, :]] = label
    return labels.unsqueeze(1) / 2 + 0.4 * torch.randn(count, 1, size, size), labels


def main(steps: int = 50) -> float:
    """Train on synthetic images and return the accuracy on the pixels of the squares of new images."""
    torch.manual_seed(0)
    images, labels = squares(8)
    # Skip connections across cuts pass values, but no gradients.
    network = cut(
        UNet(), ["down1", "down2", "bottom", "up2"], num_classes=3, example=images, per_position=True,
        own_classifier=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(steps):
        images, labels = squares(8)
        optimizer.zero_grad()
        output = network(images, labels)
        output.loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}  loss of each stage {[round(loss, 3) for loss in output.stage_loss.tolist()]}")

    images, labels = squares(32)
    network.eval()
    with torch.no_grad():
        correct = network(images).argmax(dim=1) == labels
    accuracy = correct[labels > 0].float().mean().item()
    print(f"accuracy on the pixels of squares {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
