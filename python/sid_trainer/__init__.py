"""Training networks by synergistic information distillation, over `sid_kernels`."""

from .architectures import build_network, cut
from .capture import CapturedStep, capture
from .config import TrainConfig
from .data import load_data
from .methods import bp_step, deep_supervision_step
from .network import SIDNetwork, Stage, StageHead
from .stacked import StackedStages, stacked_stages
from .step import StepResult, sid_step
from .trainer import Trainer

__all__ = [
    "CapturedStep",
    "SIDNetwork",
    "Stage",
    "StageHead",
    "StackedStages",
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
    "stacked_stages",
]
