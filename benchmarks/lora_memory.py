"""LoRA's rows in the memory tables and in step.py: with this package's layers, and with HF PEFT's."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import peft_kernels as pk

from .environment import version
from .memory_methods import NEEDS_CUDA, Method, Options, lora_estimate, targeted
from .step_peers import with_cce, with_liger


def _fused(model: nn.Module, options: Options, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    config = pk.LoraConfig(r=options.rank, target_modules=list(targeted(model, options)))
    return pk.inject(model, config, adapter_dtype=adapter_dtype)


def _fused_like_base(model: nn.Module, options: Options) -> nn.Module:
    return _fused(model, options, options.dtype)


def _peft(model: nn.Module, options: Options, autocast_adapter_dtype: bool = True) -> nn.Module:
    import peft  # a peer: only here when it is installed

    config = peft.LoraConfig(r=options.rank, target_modules=list(targeted(model, options)))
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


_NO_PEFT = "" if version("peft") != "none" else "not installed: pip install peft"


def _missing(package: str) -> str:
    if version(package) == "none":
        return f"not installed: pip install {package}"
    return _NO_PEFT or ("" if torch.cuda.is_available() else NEEDS_CUDA)


def _over_peft(suffix: str, package: str, patch: Callable[[nn.Module], nn.Module], why: str) -> list[Method]:
    """What users put over a PEFT model: one row with PEFT's fp32 adapters, one with adapters in the base's dtype."""

    def adapt(model: nn.Module, options: Options, autocast_adapter_dtype: bool) -> nn.Module:
        return patch(_peft(model, options, autocast_adapter_dtype))

    return [
        Method(
            f"peft-lora-{suffix}{ending}",
            lora_estimate,
            partial(adapt, autocast_adapter_dtype=autocast),
            missing=_missing(package),
            unpredicted=why,
            cuda_only=True,
            implementation=f"{package} {version(package)}",
        )
        for ending, autocast in (("", True), ("-bf16", False))
    ]


METHODS = (
    Method("lora", lora_estimate, _fused),
    Method("peft-lora", lora_estimate, _peft, missing=_NO_PEFT),
    # Adapters in the base's dtype: PEFT at its fastest.
    Method("lora-bf16", lora_estimate, _fused_like_base),
    Method("peft-lora-bf16", lora_estimate, partial(_peft, autocast_adapter_dtype=False), missing=_NO_PEFT),
    *_over_peft(
        "liger",
        "liger-kernel",
        with_liger,
        "Liger's kernels are launched from Python, outside of any operator: they need real tensors",
    ),
    *_over_peft(
        "cce",
        "cut-cross-entropy",
        with_cce,
        "Cut Cross Entropy's kernels are launched from Python, outside of any operator, on as many tokens as have "
        "labels: they need real tensors",
    ),
)
