"""Continue a text with a trained language model."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ..network.language import LanguageModel
from .build import load_network


def encode(prompt: str, classes: list[str], tokens: str) -> list[int]:
    """Return the tokens of a prompt. Raises ValueError for a character that the model does not know."""
    if tokens == "bytes":
        return list(prompt.encode())
    number = {character: i for i, character in enumerate(classes)}
    if unknown := [character for character in prompt if character not in number]:
        raise ValueError(f"prompt must have characters of the training text only, not {unknown[0]!r}")
    return [number[character] for character in prompt]


@torch.no_grad()
def sample(
    path: Path, prompt: str = "\n", *, count: int = 400, temperature: float = 0.8, confidence: float | None = None,
    seed: int = 0,
) -> Iterator[tuple[bytes, int]]:  # fmt: skip
    """Yield (bytes, number of stages that ran): of the prompt, with 0 stages, then of each of `count` new tokens.

    Args:
        path: Folder of a run of a language model, or one of its checkpoints.
        temperature: Divides the logits before a token is drawn; 0 takes the most likely one.
        confidence: The last stage to run is the first whose belief has an entry this large; None runs all.

    Raises ValueError for other networks and for values that are not allowed.
    """
    network, run, metadata = load_network(path)
    if not isinstance(network, LanguageModel):
        raise ValueError(f"{path}: holds no language model to sample from, but {run.arch} for {run.dataset}")
    for name, value, limit, allowed in (
        ("prompt", prompt, "a text of at least one character", bool(prompt)),
        ("tokens", count, "at least 0", count >= 0),
        ("temperature", temperature, "at least 0", temperature >= 0),
        ("exit", confidence, "in [0, 1]", confidence is None or 0 <= confidence <= 1),
    ):
        if not allowed:
            raise ValueError(f"{name} must be {limit}, not {value!r}")
    classes, generator = metadata["classes"], torch.Generator().manual_seed(seed)
    tokens = encode(prompt, classes, run.tokens)
    yield prompt.encode(), 0
    for _ in range(count):
        window = torch.tensor([tokens[-run.context :]])
        logits, stages = network.next_token(window, 2.0 if confidence is None else confidence)
        if temperature:
            token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
        else:
            token = int(logits.argmax())
        tokens.append(token)
        yield bytes([token]) if run.tokens == "bytes" else classes[token].encode(), stages
