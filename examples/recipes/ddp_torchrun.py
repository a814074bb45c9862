"""Train with DistributedDataParallel: `torchrun --standalone --nproc-per-node=2 ddp_torchrun.py`."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from sid_trainer import cut


def main(epochs: int = 4) -> float:
    """Train on handwritten digits and return the accuracy on images kept out of training."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float().unsqueeze(1), torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    network = cut(model, at=["1", "4", "6"], num_classes=10, example=images[:2])

    wrapped = DistributedDataParallel(network)  # reduces the gradients in loss.backward(), as for any module
    data = TensorDataset(images[:1500], labels[:1500])
    sampler: DistributedSampler = DistributedSampler(data)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=3e-3)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in DataLoader(data, batch_size=32, sampler=sampler):
            optimizer.zero_grad()
            output = wrapped(inputs, targets)
            output.loss.backward()
            optimizer.step()

    network.eval()
    with torch.no_grad():
        accuracy = (network(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    checksum = sum(parameter.detach().double().sum() for parameter in network.parameters())
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}  test accuracy {accuracy:.1%}  weights {checksum:.9f}")
    dist.destroy_process_group()
    return accuracy


if __name__ == "__main__":
    main()
