"""LoRA's rows in the memory tables: with this package's layers, and with HF PEFT's."""

from torch import nn

import peft_kernels as pk

from .environment import version
from .memory_methods import Method, Options, lora_estimate, targeted


def _fused(model: nn.Module, options: Options) -> nn.Module:
    return pk.inject(model, pk.LoraConfig(r=options.rank, target_modules=list(targeted(model, options))))


def _peft(model: nn.Module, options: Options) -> nn.Module:
    import peft  # a peer: only here when it is installed

    config = peft.LoraConfig(r=options.rank, target_modules=list(targeted(model, options)))
    return peft.get_peft_model(model, config)


_NO_PEFT = "" if version("peft") != "none" else "not installed: pip install peft"

METHODS = (
    Method("lora", lora_estimate, _fused),
    Method("peft-lora", lora_estimate, _peft, missing=_NO_PEFT),
)
