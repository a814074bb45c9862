"""Training networks by synergistic information distillation, over `sid_kernels`."""

from .architectures import build_network
from .capture import CapturedStep, capture
from .data import load_data
from .network import BeliefHead, SIDNetwork, Stage
from .stacked import StackedStages, stacked_stages
from .step import StepResult, bp_step, reference_step, sid_step
from .trainer import TrainConfig, Trainer

__all__ = [
    "BeliefHead",
    "CapturedStep",
    "SIDNetwork",
    "Stage",
    "StackedStages",
    "StepResult",
    "TrainConfig",
    "Trainer",
    "bp_step",
    "build_network",
    "capture",
    "load_data",
    "reference_step",
    "sid_step",
    "stacked_stages",
]
