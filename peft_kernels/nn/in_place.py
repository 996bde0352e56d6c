"""Layers that come to run our kernels by a change of class: Parameters, names, hooks and holders stay as they are."""

import importlib

from torch import nn

from .base_linear import conv1d_class, is_linear, unfit
from .bias_linear import BiasLinear
from .dispatch import dispatch_refusal, give_dispatch, replaced_forward, take_dispatch
from .layer_norm import FusedLayerNorm, FusedRMSNorm

_FUSED = {nn.Linear: BiasLinear, nn.LayerNorm: FusedLayerNorm}
_NORMS = (FusedLayerNorm, FusedRMSNorm)


def _conv1d() -> type[nn.Module]:
    """Ours over transformers' Conv1D, which is not imported for a model that has none."""
    return importlib.import_module(".bias_conv1d", __package__).BiasConv1D


def _runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """A subclass may have a forward of its own, which may compute something else."""
    return isinstance(module, cls) and type(module).forward is cls.forward


def is_bias_linear(module: nn.Module) -> bool:
    """A layer that runs our forward and has an attribute `activation`: BiasLinear, or the same over Conv1D."""
    return _runs(module, BiasLinear) or (conv1d_class(module) is not None and _runs(module, _conv1d()))


def is_norm(module: nn.Module) -> bool:
    return any(_runs(module, cls) for cls in _NORMS)


def fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that a layer of exactly this class can become (its own, where it is one of ours)."""
    if is_bias_linear(module) or is_norm(module):
        return type(module)
    if conv1d_class(module) is type(module):
        return _conv1d()
    return _FUSED.get(type(module))


def keeps_class(module: nn.Module) -> str | None:
    """Why a layer stays what it is, and its biases train through Torch; None when it can become `fused_class`."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if fused_class(module) is None:
        if is_linear(module) or isinstance(module, nn.LayerNorm):
            base = "nn.LayerNorm" if isinstance(module, nn.LayerNorm) else "a linear layer"
            return f"{name} is a subclass of {base}, which may compute something else"
        return f"no kernel here for {name}"
    if replaced_forward(module, type(module)):
        return f"this {name} has a forward of its own, which the change of class would not reach"
    if "activation" in vars(module) and not is_bias_linear(module):
        return "it has an attribute `activation`, which would be taken for the kernel's"
    if module._backward_hooks and not module._is_full_backward_hook:
        return (
            "its register_backward_hook hook is given the gradients of the layer's last operation, which would be "
            "another one: use register_full_backward_hook"
        )
    if any(parameter.numel() == 0 for parameter in module.parameters(recurse=False)):
        return "it is empty"
    return unfit(module, matrix=is_linear(module)) or dispatch_refusal(module)


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make it a `cls`, with HF accelerate's hook around the forward of that class."""
    hook = take_dispatch(module)
    module.__class__ = cls
    give_dispatch(module, hook)
