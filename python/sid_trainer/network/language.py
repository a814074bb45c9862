"""Language models: a decoder cut into stages, each of which predicts the next token by a readout.

Every token is an example of its own: with tokens (B, T), logits are (B * T, V) and targets (B * T,).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .local_pass import LocalOutput, uniform_belief
from .modules import Prediction, SIDNetwork, Stage

READOUTS = ("private", "shared")


class RotaryPositions(nn.Module):
    """Rotate queries and keys (B, heads, T, D) by their positions (RoFormer, arXiv 2104.09864)."""

    cos: Tensor  # (context, D / 2), of the angles
    sin: Tensor

    def __init__(self, dim: int, context: int):
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.outer(torch.arange(context), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > len(self.cos):
            raise ValueError(f"inputs must have at most {len(self.cos)} tokens, the context, not {x.shape[2]}")
        cos, sin = (table[: x.shape[2]].to(x.dtype) for table in (self.cos, self.sin))
        lower, upper = x.chunk(2, dim=-1)
        return torch.cat((lower * cos - upper * sin, lower * sin + upper * cos), dim=-1)


class DecoderBlock(nn.Module):
    """A pre-norm block: causal attention with rotary positions, then SwiGLU, each added to its input (B, T, D)."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        hidden_dim = -(-8 * width // 3 // 16) * 16
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.rotary = RotaryPositions(width // heads, context)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_and_up, self.down = (
            nn.Linear(width, 2 * hidden_dim, bias=False),
            nn.Linear(hidden_dim, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.rotary(query), self.rotary(key), value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_and_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Readout(nn.Module):
    """The head of a stage: blocks of its own, a norm, and a linear layer to the tokens; it reads no prior.

    The prior is part of the loss only: as an input, V numbers per token would cost more than the features.
    """

    def __init__(self, width: int, tokens: int, blocks: Sequence[nn.Module] = ()):
        super().__init__()
        self.blocks, self.norm = nn.Sequential(*blocks), nn.RMSNorm(width)
        self.logits = nn.Linear(width, tokens, bias=False)

    @property
    def weight(self) -> Tensor:
        """Return the weight (V, D) of the linear layer."""
        return self.logits.weight

    def forward(self, features: Tensor, prior: Tensor | None) -> Tensor:
        """Return the logits (B * T, V) of the next tokens for features (B, T, D).

        For a prior of None, return what the linear layer reads, (B * T, D), so that logits need not be held.
        """
        hidden = self.norm(self.blocks(features)).flatten(0, 1)
        return hidden if prior is None else F.linear(hidden, self.weight)


class SharedReadout(nn.Module):
    """A readout with a read-only copy of the last stage's weight, and a temperature of its own.

    The copy is made at the start of every `refresh`-th call in training, so it is the weight after the step before. No
    gradient reaches the last stage from here (SOLO, arXiv 2609.35440).
    """

    weight: Tensor  # (V, D)

    def __init__(self, last: nn.Linear, blocks: Sequence[nn.Module] = (), refresh: int = 1):
        super().__init__()
        self.blocks, self.norm = nn.Sequential(*blocks), nn.RMSNorm(last.in_features)
        self.scale = nn.Parameter(torch.ones(()))  # the inverse temperature
        self.source, self.refresh = (last,), refresh  # a tuple: the last stage owns the layer
        self.register_buffer("weight", last.weight.detach().clone())
        self.calls = 0  # in training; a number, so that a GPU is not waited for

    def forward(self, features: Tensor, prior: Tensor | None) -> Tensor:
        """Return the logits (B * T, V), or for a prior of None what the copied layer reads, as in `Readout`."""
        if self.training and torch.is_grad_enabled():
            if self.calls % self.refresh == 0 and not self.source[0].weight.is_meta:  # else the last rank has sent it
                self.weight.copy_(self.source[0].weight.detach())
            self.calls += 1
        hidden = (self.norm(self.blocks(features)) * self.scale).flatten(0, 1)
        return hidden if prior is None else F.linear(hidden, self.weight)

    def get_extra_state(self) -> Tensor:
        """Return the number of calls, which a checkpoint keeps."""
        return torch.tensor(self.calls, device=self.weight.device)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the number of calls from a checkpoint; other processes know that of a readout on the meta device."""
        if not state.is_meta:
            self.calls = int(state)


class LanguageModel(SIDNetwork):
    """A `SIDNetwork` on tokens (B, T), int64, whose stages see every token as an example of its own."""

    def uniform(self, features: Tensor) -> Tensor:
        """Return p_0, every entry 1/V: (B * T, V) for tokens (B, T) and features (B, T, D), (N, V) for logits."""
        rows = math.prod(features.shape[:-1]) if features.is_floating_point() else features.numel()
        return uniform_belief((rows, self.num_classes), features)

    def forward(
        self, inputs: Tensor, targets: Tensor | None = None, *, labels: Tensor | None = None
    ) -> Tensor | LocalOutput:
        """Return the last stage's logits (B, T, V), or with targets, the next tokens (B, T), a `LocalOutput`."""
        targets = labels if targets is None else targets
        if targets is None:
            return self.stage_logits(inputs)[-1].unflatten(0, inputs.shape)
        return self.learn(inputs, targets.flatten())

    def predict(self, inputs: Tensor, confidence: float = 0.9) -> Prediction:
        """Raise ValueError: tokens leave the stages one by one, by `next_token`."""
        raise ValueError("predict is for images, not for tokens; call next_token(tokens, confidence)")

    @torch.no_grad()
    def next_token(self, tokens: Tensor, confidence: float = 1.0) -> tuple[Tensor, int]:
        """Return the logits (V,) of the token after `tokens` (1, T), and the number of stages that ran.

        The last stage to run is the first whose belief has an entry of at least `confidence`; above 1, all run.
        """
        features = self.extractor(tokens)
        prior = self.uniform(features)
        logits, ran = prior[-1], 0
        for stage in self.local_stages():
            features, stage_logits = stage(features, prior)
            logits, ran = stage_logits[-1].float(), ran + 1
            if logits.softmax(0).amax() >= confidence:
                break
        return logits, ran


def build_language_model(
    tokens: int, context: int, stages: int = 2, *, layers: int = 6, width: int = 192, attention_heads: int = 6,
    plain: bool = False, readout: str = "private", readout_blocks: int = 0, readout_refresh: int = 1,
) -> LanguageModel:  # fmt: skip
    """Build a decoder with new parameters: `layers` blocks in `stages` stages, each with a readout.

    Args:
        tokens, context: Number of tokens V, and the longest input T.
        plain: One stage, for backpropagation, whatever `stages` is.
        readout: "private" gives each stage a readout of its own; with "shared", all except the last use a copy of the
            last one's weight, which is made every `readout_refresh` steps.
        readout_blocks: Number of blocks before the readout of every stage except the last.

    Raises ValueError for sizes that are not allowed.
    """
    for name, size, least in (
        ("tokens", tokens, 1), ("context", context, 1), ("width", width, 1), ("attention_heads", attention_heads, 1),
        ("readout_blocks", readout_blocks, 0), ("readout_refresh", readout_refresh, 1),
    ):  # fmt: skip
        if size < least:
            raise ValueError(f"{name} must be at least {least}, not {size}")
    if not 1 <= stages <= layers:
        raise ValueError(f"depth must be at most the number of layers, {layers}, for gpt, not {stages}")
    if width % (2 * attention_heads):
        raise ValueError(f"width must be a multiple of twice attention_heads, {2 * attention_heads}, not {width}")
    if readout not in READOUTS:
        raise ValueError(f"readout must be one of {', '.join(READOUTS)}, not {readout!r}")

    def blocks(number: int) -> list[nn.Module]:
        return [DecoderBlock(width, attention_heads, context) for _ in range(number)]

    bounds = [round(layers * i / stages) for i in range(stages + 1)]
    embedding, trunk, last = nn.Embedding(tokens, width), blocks(layers), Readout(width, tokens)
    if plain:
        network = LanguageModel(nn.Sequential(embedding, *trunk), [Stage(last)], tokens)
    else:
        bodies = [nn.Sequential(*trunk[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
        bodies[0].insert(0, embedding)
        heads: list[nn.Module] = []
        for _ in range(stages - 1):
            own, shared = blocks(readout_blocks), readout == "shared"
            heads.append(SharedReadout(last.logits, own, readout_refresh) if shared else Readout(width, tokens, own))
        network = LanguageModel(nn.Identity(), map(Stage, [*heads, last], bodies), tokens)
    initialize(network, layers)
    return network


@torch.no_grad()
def initialize(network: nn.Module, layers: int) -> None:
    """Draw weights as GPT-2 does: deviation 0.02, divided by sqrt(2 * layers) in layers that add to a block's input."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            adds = name.endswith(("attention_out", "down"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)
    for module in network.modules():
        if isinstance(module, SharedReadout):
            module.weight.copy_(module.source[0].weight)
