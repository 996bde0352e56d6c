"""Modules: they hold Parameters and call the kernels' public functions."""

from .lora_linear import FusedLoRALinear

__all__ = ["FusedLoRALinear"]
