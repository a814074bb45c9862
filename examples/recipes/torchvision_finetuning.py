"""Fine-tune a torchvision model whose own classifier is the head of the last stage."""

import argparse

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import interpolate

from sid_trainer import cut


def main(pretrained: bool = False, steps: int = 50) -> float:
    """Train on handwritten digits and return the accuracy on images kept out of training.

    With `pretrained`, torchvision downloads pretrained weights. Otherwise the weights are random.
    """
    torch.manual_seed(0)
    digits = load_digits()
    images = interpolate(torch.tensor(digits.images / 16).float().unsqueeze(1), size=(32, 32))
    images, labels = images.expand(-1, 3, -1, -1), torch.tensor(digits.target)

    model = torchvision.models.shufflenet_v2_x0_5(weights="DEFAULT" if pretrained else None)
    model.fc = nn.Linear(1024, 10)  # a new classifier for the classes of this task
    if pretrained:
        model.conv1.requires_grad_(False)  # freezing parameters needs nothing else

    # The first two stages get new heads. The rest of the model, with its own classifier, is the third stage.
    network = cut(
        model, ["stage2", "stage3"], num_classes=10, example=images[:2], channels="first", grid=2, own_classifier=True
    )
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        batch = torch.randint(0, 1500, (32,))
        optimizer.zero_grad()
        output = network(images[batch], labels[batch])
        output.loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}  loss {output.loss.item():.3f}")

    trained = network.model.eval()  # the torchvision model itself; the heads are no longer needed
    with torch.no_grad():
        accuracy = (trained(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    print(f"test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", action="store_true", help="download and start from torchvision's weights")
    main(parser.parse_args().pretrained)
