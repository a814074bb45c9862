"""Distil one large-vocabulary head into another without ever holding a (tokens, vocabulary) tensor."""

import torch

from sid_kernels import BeliefHead


def main(tokens: int = 512, vocabulary: int = 20_000, steps: int = 5) -> list[float]:
    """Train the student on random features and return the loss of each step."""
    torch.manual_seed(0)
    student, teacher = BeliefHead(64, vocabulary), BeliefHead(32, vocabulary)
    hidden = torch.randn(tokens, 64, requires_grad=True)  # stands for the output of a trunk
    teacher_hidden, targets = torch.randn(tokens, 32), torch.randint(0, vocabulary, (tokens,))
    optimizer = torch.optim.AdamW([hidden, *student.parameters()], lr=1e-2)

    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        prior = teacher.as_prior(teacher_hidden)  # the teacher's belief; the loss computes it chunk by chunk
        result = student(hidden, prior, targets, alpha=0.5, return_belief=False)
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
        print(f"step {step}  loss {losses[-1]:.4f}")
    logits = student.logits(hidden[:4])  # (4, vocabulary), for inference
    print(f"most likely tokens of the first four rows: {logits.argmax(dim=1).tolist()}")
    return losses


if __name__ == "__main__":
    main()
