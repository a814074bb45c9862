"""Train a timm ResNet, ConvNeXt or ViT in local stages: `python timm_models.py --model vit`."""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from sid_trainer import cut

SETTINGS = {  # options of small variants; without them timm creates the full models
    "resnet18": {"channels": (16, 24, 32, 48), "layers": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "patch_size": 2},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3},
}
CUTS = {  # the last submodule of each stage
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "convnext_atto": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "vit_tiny_patch16_224": ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
}


def main(name: str = "resnet18", steps: int = 80) -> float:
    """Train on handwritten digits and return the accuracy of the last stage on images kept out of training."""
    torch.manual_seed(0)
    digits = load_digits()
    images = interpolate(torch.tensor(digits.images / 16).float().unsqueeze(1), size=(32, 32))
    labels = torch.tensor(digits.target)

    model = timm.create_model(name, in_chans=1, num_classes=10, **SETTINGS[name])
    network = cut(model, at=CUTS[name], num_classes=10, example=images[:2], grid=2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(steps):
        batch = torch.randint(0, 1500, (32,))
        optimizer.zero_grad()
        output = network(images[batch], labels[batch])
        output.loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}  loss of each stage {[round(loss, 3) for loss in output.stage_loss.tolist()]}")

    network.eval()
    with torch.no_grad():
        accuracy = (network(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    print(f"{name}  test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18", help=f"a part of one of {', '.join(CUTS)}")
    choice = parser.parse_args().model
    main(next(name for name in CUTS if choice in name))
