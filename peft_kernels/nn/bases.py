"""Which layers take LoRA's adapters: the dense ones of `base_linear`, and those over a 4-bit weight."""

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .base_linear import is_linear, refusal
from .dispatch import dispatch_refusal, replaced_forward
from .hooks import immovable
from .nf4_base import NAMES
from .nf4_linear import NF4Linear


def is_base(module: nn.Module) -> bool:
    """nn.Linear, Conv1D, NF4Linear, or a subclass of one (which may still be refused)."""
    return is_linear(module) or isinstance(module, NF4Linear)


def base_refusal(module: nn.Module, replaced: bool = True) -> str | None:
    """Why `module` cannot be wrapped; None when it can. replaced=False: it keeps its place and its hooks."""
    if not isinstance(module, NF4Linear):
        return refusal(module, replaced)
    if replaced_forward(module, NF4Linear):
        return f"{type(module).__qualname__} has a forward of its own, which a fused layer would replace"
    if is_traceable_wrapper_subclass(module.weight):
        return f"its weight is a {type(module.weight).__name__}, not a plain tensor: put the adapters in first"
    return dispatch_refusal(module) or (immovable(module, (*NAMES, "bias")) if replaced else None)
