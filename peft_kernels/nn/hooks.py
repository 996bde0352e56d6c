"""Hooks of a layer that another one replaces: which can go over to it, and the move."""

import functools
import weakref
from collections import OrderedDict

from torch import nn

_AT_CALLS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_AT_STATE = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to run when the module is called, which a fused layer does not do with its parts."""
    return any(getattr(module, hooks) for hooks in _AT_CALLS)


def immovable(module: nn.Module, own: tuple[str, ...] = ("weight", "bias")) -> str | None:
    """Why the hooks of a linear layer cannot go over to the fused layer in its place; None when they can.

    own: what the fused layer holds of it.
    """
    hooks = [hook for name in (*_AT_CALLS, *_AT_STATE) for hook in getattr(module, name).values()]
    if not hooks:
        return None
    if module._backward_hooks and not module._is_full_backward_hook:
        return (
            "its register_backward_hook hook is given the gradients of the layer's last operation, which is another "
            "one in a fused layer: use register_full_backward_hook"
        )
    for hook in hooks:
        hook = getattr(hook, "hook", hook)  # Torch wraps those that run before a load
        while isinstance(hook, functools.partial):
            hook = hook.func
        if getattr(hook, "__self__", None) is module:
            return f"its hook {hook.__name__} is a method of the layer itself and would go on with the one replaced"
    held = [*module._parameters, *module._buffers, *module._modules]
    more = ", ".join(name for name in held if name not in own)
    return f"it has hooks and, beside weight and bias, {more}, which a fused layer would not hold" if more else None


def move_call_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let `target`, which has none, run the hooks on calls of `source`, which is left without.

    The dicts themselves change hands: the handle of a hook refers to its dict, and removes the hook from there.
    """
    for name in (*_AT_CALLS, *_FLAGS):
        vars(target)[name], vars(source)[name] = vars(source)[name], OrderedDict()
    target._is_full_backward_hook, source._is_full_backward_hook = source._is_full_backward_hook, None


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let `target`, which has no hooks yet, run those of `source`, which is left without.

    Plain attributes that were set on `source`, which a hook may read from the module it is given, are set on `target`
    too.
    """
    move_call_hooks(source, target)
    for name in _AT_STATE:
        vars(target)[name], vars(source)[name] = vars(source)[name], OrderedDict()
    for hook in target._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(target)
    for name, value in vars(source).items():
        if not hasattr(target, name):
            vars(target)[name] = value
