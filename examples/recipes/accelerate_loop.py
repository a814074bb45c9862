"""Train with Accelerate and gradient accumulation; `accelerate launch accelerate_loop.py` runs several processes."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sid_trainer import cut


def main(epochs: int = 4, mixed_precision: str = "no") -> float:
    """Train on handwritten digits and return the accuracy on images kept out of training."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float().unsqueeze(1), torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    network = cut(model, at=["1", "4", "6"], num_classes=10, example=images[:2])
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)

    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    for epoch in range(epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(network):
                output = network(inputs, targets)
                accelerator.backward(output.loss)
                accelerator.clip_grad_norm_(network.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}  loss {output.loss.item():.3f}")

    network.eval()
    with torch.no_grad():
        logits = network(images[1500:].to(accelerator.device))
    accuracy = (logits.argmax(1).cpu() == labels[1500:]).float().mean().item()
    accelerator.print(f"test accuracy {accuracy:.1%}")
    accelerator.end_training()
    return accuracy


if __name__ == "__main__":
    main()
