"""Modules: they hold Parameters and call the kernels' public functions."""

from .bias_linear import BiasLinear
from .layer_norm import FusedLayerNorm, FusedRMSNorm
from .lora_linear import FusedLoRALinear
from .nf4_linear import NF4Linear

__all__ = ["BiasLinear", "FusedLayerNorm", "FusedLoRALinear", "FusedRMSNorm", "NF4Linear"]
