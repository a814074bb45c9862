"""The options of the stages' local losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sid_kernels.core.options import DIVERGENCES

Alpha = float | Tensor | Sequence[float | Tensor]  # a captured CUDA graph can change a 0-d tensor on its device


@dataclass(frozen=True)
class StageLossOptions:
    """What every stage minimizes. Raises ValueError for a value that is not allowed.

    Args:
        alpha: Weight of fidelity against consistency in [0, 1]; one number or one per stage.
        divergence: As in `sid_kernels.local_loss_and_grad`.
        label_smoothing: As there; one number or one per stage. Stages trained at once share one number.
        ignore_index: Examples, tokens or pixels with this label have no loss.
        class_weight: (C,), the weight of each class. The loss is the weighted mean over examples, as in
            `F.cross_entropy`. Class probabilities weigh as much as the classes do on average over them.
    """

    alpha: Alpha = 0.5
    divergence: str = "forward"
    label_smoothing: float | Sequence[float] = 0.0
    ignore_index: int = field(default=-100, kw_only=True)
    class_weight: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {self.divergence!r}")
        smoothing = self.label_smoothing
        for share in smoothing if isinstance(smoothing, Sequence) else [smoothing]:
            if not 0 <= share <= 1:
                raise ValueError(f"label_smoothing must be in [0, 1], not {share}")
        weight = self.class_weight
        if weight is not None and not (isinstance(weight, Tensor) and weight.dim() == 1 and bool((weight >= 0).all())):
            given = f"shape {tuple(weight.shape)}, {weight.tolist()}" if isinstance(weight, Tensor) else weight
            raise ValueError(f"class_weight must be a tensor (C,) of numbers of at least 0, not {given}")
        for alpha in self.alpha if isinstance(self.alpha, Sequence) else [self.alpha]:
            if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
                raise ValueError(f"alpha must be in [0, 1], not {alpha}")

    @property
    def loss(self) -> dict[str, Any]:
        """The keyword arguments of `local_loss_and_grad` for all stages. Raises ValueError if they differ by stage."""
        if isinstance(self.label_smoothing, Sequence):
            raise ValueError("label_smoothing must be one number for StackedHeads; build the network with fused=False")
        return self.loss_of_stage(0)

    def loss_of_stage(self, i: int) -> dict[str, Any]:
        """Return the keyword arguments of `local_loss_and_grad` for stage i, counted from 0."""
        smoothing = self.label_smoothing[i] if isinstance(self.label_smoothing, Sequence) else self.label_smoothing
        return {"divergence": self.divergence, "label_smoothing": smoothing, "ignore_index": self.ignore_index}

    def stage_alphas(self, depth: int) -> Sequence[float | Tensor]:
        """Return one alpha per stage. Raises ValueError if another number of alphas or label smoothings was given."""
        for name in ("alpha", "label_smoothing"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != depth:
                raise ValueError(f"{name} must be one number or one for each of the {depth} stages, not {len(value)}")
        return self.alpha if isinstance(self.alpha, Sequence) else [self.alpha] * depth

    def cascade_alpha(self, depth: int, features: Tensor) -> Tensor | list[float]:
        """Return one alpha per stage, as a tensor (L,) on the features' device if any of them is a tensor."""
        alphas = self.stage_alphas(depth)
        numbers = [alpha for alpha in alphas if not isinstance(alpha, Tensor)]
        if len(numbers) == depth:
            return numbers
        return torch.stack([a if isinstance(a, Tensor) else features.new_full((), a) for a in alphas])
