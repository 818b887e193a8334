"""The configuration: frozen dataclasses, read once from defaults, YAML files and flags, in that order."""

from slope_megatron.config.model import ModelConfig
from slope_megatron.config.optimizer import OptimizerConfig
from slope_megatron.config.parallel import ParallelConfig
from slope_megatron.config.reader import Config, add_config_arguments, read_config
from slope_megatron.config.run import DataConfig, TrainConfig
from slope_megatron.config.slope import SlopeConfig, parse_nm
from slope_megatron.config.watch import WatchConfig

__all__ = [
    "Config",
    "add_config_arguments",
    "read_config",
    "SlopeConfig",
    "ModelConfig",
    "ParallelConfig",
    "OptimizerConfig",
    "DataConfig",
    "TrainConfig",
    "WatchConfig",
    "parse_nm",
]
