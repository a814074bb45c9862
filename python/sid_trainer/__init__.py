"""Train networks by synergistic information distillation (SID), with the kernels of `sid_kernels`."""

from .data.datasets import load_data
from .data.own import OwnData
from .data.text import load_text
from .methods.baselines import bp_step, deep_supervision_step
from .methods.capture import CapturedStep, capture
from .methods.common import StepResult
from .methods.step import sid_step
from .network.architectures import build_network
from .network.cut import cut
from .network.cut_language import CutLanguageModel, cut_language_model
from .network.cut_network import CutNetwork
from .network.heads import StackedHeads, StageHead
from .network.language import build_language_model
from .network.local_pass import LocalOutput, add_stage_loss
from .network.loss_options import StageLossOptions
from .network.modules import SIDNetwork, Stage
from .training.config import TrainConfig
from .training.trainer import Trainer

__all__ = [
    "CapturedStep",
    "CutLanguageModel",
    "CutNetwork",
    "LocalOutput",
    "OwnData",
    "SIDNetwork",
    "Stage",
    "StageHead",
    "StageLossOptions",
    "StackedHeads",
    "StepResult",
    "TrainConfig",
    "Trainer",
    "add_stage_loss",
    "bp_step",
    "build_language_model",
    "build_network",
    "capture",
    "cut",
    "cut_language_model",
    "deep_supervision_step",
    "load_data",
    "load_text",
    "sid_step",
]
