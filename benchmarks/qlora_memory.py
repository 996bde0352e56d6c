"""QLoRA's rows in the memory tables and in step.py: this package's, with Adam's moments on the host, and the peer's."""

import torch
from torch import nn

import peft_kernels as pk

from .bitsandbytes_layers import with_linear4bit
from .environment import version
from .memory_methods import Estimate, Method, Options, qlora_estimate, targeted


def _fused(model: nn.Module, options: Options, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    config = pk.LoraConfig(r=options.rank, target_modules=list(targeted(model, options)), base="nf4", double_quant=True)
    return pk.inject(model, config, adapter_dtype=adapter_dtype)


def _fused_like_base(model: nn.Module, options: Options) -> nn.Module:
    return _fused(model, options, options.dtype)


def _peft(model: nn.Module, options: Options) -> nn.Module:
    """PEFT's layers over bitsandbytes' on the same bytes, with PEFT's default, fp32 adapters."""
    import peft  # a peer: only here when it is installed

    config = peft.LoraConfig(r=options.rank, target_modules=list(targeted(model, options)))
    return peft.get_peft_model(with_linear4bit(pk.quantize(model, double_quant=True), options.dtype), config)


def _offloaded_estimate(model: nn.Module, options: Options) -> Estimate:
    found = qlora_estimate(model, options)
    return Estimate(found.trained, found.weights, found.gradients, 0.0)


_ABSENT = [name for name in ("peft", "bitsandbytes") if version(name) == "none"]
_MISSING = f"not installed: pip install {' '.join(_ABSENT)}" if _ABSENT else ""

METHODS = (
    Method("qlora", qlora_estimate, _fused, base="nf4"),
    Method("qlora-bf16", qlora_estimate, _fused_like_base, base="nf4"),
    Method("qlora-offloaded", _offloaded_estimate, _fused, base="nf4", optimizer="adamw-offloaded"),
    Method(
        "peft-qlora",
        qlora_estimate,
        _peft,
        missing=_MISSING,
        unpredicted="bitsandbytes' parameters are a kind of tensor that cannot be without memory",
        base="nf4",
        implementation=f"peft {version('peft')}, bitsandbytes {version('bitsandbytes')}",
    ),
)
