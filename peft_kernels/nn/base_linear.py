"""Which modules can carry an adapter: nn.Linear, transformers' Conv1D, and why any other can not."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def conv1d_class(module: nn.Module) -> type | None:
    """transformers' Conv1D (GPT-2; weight [K, N]) among the module's classes, without importing transformers."""
    for cls in type(module).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return cls
    return None


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, Conv1D, or a subclass of one (which may still be refused)."""
    return isinstance(module, nn.Linear) or conv1d_class(module) is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to run when the module is called, which a fused layer does not do with its parts."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def refusal(module: nn.Module) -> str | None:
    """Why `module` cannot be wrapped; None when it can."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    base = nn.Linear if isinstance(module, nn.Linear) else conv1d_class(module)
    if base is None:
        return f"{name} is neither nn.Linear nor transformers' Conv1D"
    if type(module).forward is not base.forward or "forward" in vars(module):
        return f"{name} has a forward of its own, which a fused layer would replace"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed at each call (parametrize, weight_norm or pruning)"
    if is_lazy(weight):
        return "its weight has no shape yet (lazy module): run one batch first"
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}; expected one of {', '.join(map(str, _DTYPES))}"
    if has_hooks(module):
        return "it has forward or backward hooks, which would be lost: register them after the adapters are in"
    return None


def read_by_parents(model: nn.Module) -> dict[int, str]:
    """id -> reason, for linears whose parent reads their weight itself instead of calling them.

    An adapter there would be left out of the result without a word.
    """
    reasons = {}
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            reasons[id(parent.out_proj)] = "nn.MultiheadAttention reads its weight and never calls it"
        elif isinstance(parent, nn.TransformerEncoderLayer):
            for child in (parent.linear1, parent.linear2):
                reasons[id(child)] = "nn.TransformerEncoderLayer reads its weight on the inference fast path"
    return reasons
