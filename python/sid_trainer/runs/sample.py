"""Continue a text with a trained language model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..network.language import LanguageModel
from .build import load_network


def encode(prompt: str, tokens: str, metadata: dict) -> list[int]:
    """Return the tokens of a prompt. Raises ValueError for a character that the model does not know."""
    if tokens == "bytes":
        return list(prompt.encode())
    if metadata["tokenizer"]:
        return load_tokenizer(metadata).encode(prompt, add_special_tokens=False).ids
    number = {character: i for i, character in enumerate(metadata["classes"])}
    if unknown := [character for character in prompt if character not in number]:
        raise ValueError(f"prompt must have characters of the training text only, not {unknown[0]!r}")
    return [number[character] for character in prompt]


def token_bytes(tokens: str, metadata: dict) -> list[bytes]:
    """Return the bytes that each token stands for."""
    classes = metadata["classes"]
    if tokens == "bytes":
        return [bytes([i]) for i in range(256)]
    if tokens == "characters":
        return [character.encode() for character in classes]
    # Byte-level BPE writes a byte as a character: printable ones as themselves, the others from 256 on, in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return [
        bytes(byte_of[character] for character in token) if byte_of.keys() >= {*token} else token.encode()  # special
        for token in classes
    ]


def load_tokenizer(metadata: dict) -> Any:
    """Return the tokenizer that a run was trained with."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(metadata["tokenizer"])


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
        ("seed", seed, "a number of 64 bits", -(2**63) <= seed < 2**63),
        ("exit", confidence, "in [0, 1]", confidence is None or 0 <= confidence <= 1),
    ):
        if not allowed:
            raise ValueError(f"{name} must be {limit}, not {value!r}")
    generator, bytes_of_token = torch.Generator().manual_seed(seed), token_bytes(run.tokens, metadata)
    tokens = encode(prompt, run.tokens, metadata)
    yield prompt.encode(), 0
    for _ in range(count):
        window = torch.tensor([tokens[-run.context :]])
        logits, stages = network.next_token(window, 2.0 if confidence is None else confidence)
        if temperature:
            scaled = (logits - logits.amax()).double() / temperature  # at most 0, however small the temperature
            token = int(torch.multinomial(scaled.softmax(0), 1, generator=generator))
        else:
            token = int(logits.argmax())
        tokens.append(token)
        yield bytes_of_token[token], stages
