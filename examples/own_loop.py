"""Train a stack of local stages in your own loop: one fused loss per stage, and no gradient between stages."""

import torch
from torch import nn

from sid_kernels import fused_local_loss


def main(steps: int = 150) -> float:
    """Train on a synthetic task and return the training accuracy of the last stage."""
    torch.manual_seed(0)
    num_classes, inputs = 10, torch.randn(512, 20)
    targets = (inputs @ torch.randn(20, num_classes)).argmax(dim=1)  # a linear rule, which a network can learn
    bodies = [nn.Sequential(nn.Linear(dim, 64), nn.ReLU()) for dim in (20, 64, 64)]
    heads = [nn.Linear(64 + num_classes, num_classes) for _ in bodies]
    parameters = [p for module in (*bodies, *heads) for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)

    for step in range(steps):
        features, belief = inputs, torch.full((len(inputs), num_classes), 1 / num_classes)
        optimizer.zero_grad()
        for body, head in zip(bodies, heads, strict=True):
            features = body(features.detach())  # detach: each stage has a graph of its own
            logits = head(torch.cat((features, belief), dim=1))
            result = fused_local_loss(logits, belief, targets, alpha=0.5)
            result.loss.backward()  # the gradient of the logits is already computed; frees the stage's graph
            belief = result.belief  # the prior of the next stage, without a graph
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            accuracy = (belief.argmax(dim=1) == targets).float().mean().item()
            print(f"step {step:3d}  loss of the last stage {result.loss.item():.4f}  accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
