"""Which modules can carry an adapter: nn.Linear, transformers' Conv1D, and why any other can not."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .dispatch import OFFLOADED, dispatch_refusal, offloaded, replaced_forward
from .hooks import immovable

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def conv1d_class(module: nn.Module) -> type | None:
    """transformers' Conv1D (GPT-2; weight [K, N]) among the module's classes, without importing transformers."""
    for cls in type(module).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return cls
    return None


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, Conv1D, or a subclass of one (which may still be refused)."""
    return isinstance(module, nn.Linear) or conv1d_class(module) is not None


def unfit(module: nn.Module, matrix: bool = True) -> str | None:
    """Why its weight or bias cannot be run by the kernels. matrix: a weight [N, K] must be there; else it need not."""
    parameters = module._parameters
    computed = "its {} is computed at each call (parametrize, weight_norm or pruning)"
    for name in ("weight", "bias"):
        if name not in parameters and (matrix or hasattr(module, name)):
            return computed.format(name)
    weight = parameters["weight"]
    if weight is None:
        return computed.format("weight") if matrix else None
    if is_lazy(weight):
        return "its weight has no shape yet (lazy module): run one batch first"
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}; expected one of {', '.join(map(str, _DTYPES))}"
    if (matrix and weight.dim() != 2) or "_hf_tp_plan" in vars(module):
        return f"its weight, of shape {list(weight.shape)}, is one rank's part of the layer: put the adapters in first"
    return None


def refusal(module: nn.Module, replaced: bool = True) -> str | None:
    """Why `module` cannot be wrapped; None when it can. replaced=False: it keeps its place and its hooks."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    base = nn.Linear if isinstance(module, nn.Linear) else conv1d_class(module)
    if base is None:
        return f"{name} is neither nn.Linear nor transformers' Conv1D"
    if replaced_forward(module, base):
        return f"{name} has a forward of its own, which a fused layer would replace"
    return unfit(module) or dispatch_refusal(module) or (immovable(module) if replaced else None)


def never_called(model: nn.Module) -> dict[int, str]:
    """id -> reason, for linears whose parent always reads their weight and bias itself."""
    reason = "nn.MultiheadAttention reads its weight and never calls it"
    return {id(parent.out_proj): reason for parent in model.modules() if isinstance(parent, nn.MultiheadAttention)}


def read_by_parents(model: nn.Module) -> dict[int, str]:
    """id -> reason, for linears whose parent reads their weight itself instead of calling them, or loads it.

    An adapter there would be left out of the result without a word, or not be there when it is needed.
    """
    reasons = {**dict.fromkeys(offloaded(model), OFFLOADED), **never_called(model)}
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoderLayer):
            for child in (parent.linear1, parent.linear2):
                reasons[id(child)] = "nn.TransformerEncoderLayer reads its weight on the inference fast path"
    return reasons
