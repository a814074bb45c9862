"""Training networks by synergistic information distillation, over `sid_kernels`."""

from .data.datasets import load_data
from .methods.baselines import bp_step, deep_supervision_step
from .methods.capture import CapturedStep, capture
from .methods.common import StepResult
from .methods.step import sid_step
from .network.architectures import build_network, cut
from .network.heads import StackedHeads, StageHead
from .network.modules import SIDNetwork, Stage
from .training.config import TrainConfig
from .training.trainer import Trainer

__all__ = [
    "CapturedStep",
    "SIDNetwork",
    "Stage",
    "StageHead",
    "StackedHeads",
    "StepResult",
    "TrainConfig",
    "Trainer",
    "bp_step",
    "build_network",
    "capture",
    "cut",
    "deep_supervision_step",
    "load_data",
    "sid_step",
]
