"""Hand-written kernels for parameter-efficient fine-tuning."""

from .kernels.lora_linear.autograd import lora_linear

__all__ = ["lora_linear"]
