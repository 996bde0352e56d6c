"""Hand-written kernels for parameter-efficient fine-tuning."""

import importlib

from .formats.nf4 import NF4Weight
from .interop.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from .kernels.bias_grad.autograd import bias_linear
from .kernels.lora_linear.autograd import lora_linear
from .kernels.nf4.autograd import nf4_dequantize, nf4_quantize
from .kernels.nf4_linear.autograd import nf4_linear
from .kernels.norm.autograd import layer_norm, rms_norm
from .kernels.qlora_linear.autograd import qlora_linear
from .memory.offload import offloaded_adamw
from .memory.predict import predict_memory
from .methods.adapters import delete_adapter, disable_adapter, set_adapter, trainable_parameters
from .methods.bitfit_config import BitFitConfig
from .methods.coverage import coverage
from .methods.inject import inject
from .methods.lora_config import LoraConfig
from .methods.merging import merge, unmerge
from .methods.quantise import dequantize, quantize
from .nn import BiasLinear, FusedLayerNorm, FusedLoRALinear, FusedRMSNorm, NF4Linear

__all__ = [
    "BiasLinear",
    "BitFitConfig",
    "FusedLayerNorm",
    "FusedLoRALinear",
    "FusedRMSNorm",
    "LoraConfig",
    "NF4Linear",
    "NF4Weight",
    "accelerate",
    "bias_linear",
    "coverage",
    "delete_adapter",
    "dequantize",
    "disable_adapter",
    "from_bitsandbytes",
    "inject",
    "layer_norm",
    "load_adapter",
    "load_quantized",
    "lora_linear",
    "merge",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "offloaded_adamw",
    "predict_memory",
    "quantize",
    "qlora_linear",
    "rms_norm",
    "save_adapter",
    "save_quantized",
    "set_adapter",
    "to_bitsandbytes",
    "trainable_parameters",
    "unmerge",
]

# Names that need an optional package, imported when first used: name -> (module, package to install).
_OPTIONAL = {
    "save_adapter": (".interop.peft", "safetensors"),
    "load_quantized": (".interop.checkpoints", "safetensors"),
    "save_quantized": (".interop.checkpoints", "safetensors"),
    "load_adapter": (".interop.peft", "safetensors"),
    "accelerate": (".interop.peft_layers", "peft"),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name not in _OPTIONAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, package = _OPTIONAL[name]
    try:
        return getattr(importlib.import_module(module, __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"peft_kernels.{name} needs {package}: pip install {package}") from error
