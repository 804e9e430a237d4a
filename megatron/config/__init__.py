"""Configuration: a command line goes in, frozen dataclasses come out; every flag is a field, said once.

`RunConfig` is all that a training run was asked for; tools declare small dataclasses of their own with `option`.
"""

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig, TokenizerConfig
from megatron.config.entry import interrupt_on_sigterm, run_entry
from megatron.config.errors import CommonError, PeerError, UsageError
from megatron.config.families import FAMILIES
from megatron.config.log import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron.config.option import option
from megatron.config.parallel import KernelConfig, ParallelConfig
from megatron.config.parser import build, parse_command, parse_flags
from megatron.config.preprocess import PreprocessConfig
from megatron.config.resolve import parse_run, resolve_run
from megatron.config.run import RunConfig
from megatron.config.training import PrecisionConfig, RecomputeConfig, TrainingConfig

__all__ = [
    "FAMILIES",
    "CheckpointConfig",
    "CommonError",
    "DataConfig",
    "KernelConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PeerError",
    "PrecisionConfig",
    "PreprocessConfig",
    "RecomputeConfig",
    "RunConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "UsageError",
    "build",
    "interrupt_on_sigterm",
    "option",
    "parse_command",
    "parse_flags",
    "parse_run",
    "resolve_run",
    "run_entry",
]
