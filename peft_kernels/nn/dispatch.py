"""Layers that HF accelerate dispatched to devices: their forward is wrapped in its hook, which can change layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

OFFLOADED = (
    "accelerate offloads its weights, which are on no device between two calls, so that an adapter could neither be "
    "computed nor trained there: keep it on a device (device_map, max_memory) or leave it out (exclude_modules, "
    "exclude_terms)"
)


def _hooks(hook: Any) -> list[Any]:
    """Accelerate's hooks one by one: those of a SequentialHook for itself."""
    if hook is None:
        return []
    return [one for part in hook.hooks for one in _hooks(part)] if _is_accelerates(hook, "SequentialHook") else [hook]


def _is_accelerates(hook: Any, name: str) -> bool:
    """Whether it is of this very class, which is looked up without importing accelerate."""
    return (type(hook).__module__, type(hook).__name__) == ("accelerate.hooks", name)


def _offloads(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", None) is True for hook in _hooks(vars(module).get("_hf_hook")))


def offloaded(model: nn.Module) -> set[int]:
    """ids of the modules whose own tensors accelerate loads for a call only, by a hook on them or around them."""
    found = set()
    for module in model.modules():
        if _offloads(module):
            hooks = _hooks(vars(module)["_hf_hook"])
            whole = any(getattr(hook, "place_submodules", False) for hook in hooks)
            found.update(map(id, module.modules() if whole else (module,)))
    return found


def replaced_forward(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling `module` runs another forward than `cls.forward` (inside accelerate's hook, if it has one)."""
    own = vars(module)
    forward = own.get("forward")
    if "_hf_hook" in own and getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks":
        forward = own.get("_old_forward")
    plain = getattr(forward, "__func__", None) is cls.forward and forward.__self__ is module
    return type(module).forward is not cls.forward or not (forward is None or plain)


def dispatch_refusal(module: nn.Module) -> str | None:
    """Why accelerate's hook on a layer cannot go over to another one; None when it can, or when there is none."""
    for hook in _hooks(vars(module).get("_hf_hook")):
        if not _is_accelerates(hook, "AlignDevicesHook"):
            return f"accelerate's hook {type(hook).__name__} on it may do with its weights what does not fit adapters"
        if hook.offload or any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            return OFFLOADED
    return None


def take_dispatch(module: nn.Module) -> Any:
    """Take accelerate's hook off a layer that `dispatch_refusal` lets pass, and return it (None: there was none)."""
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
    vars(module).pop("forward", None)  # accelerate leaves the class's own forward behind, bound
    return hook


def give_dispatch(module: nn.Module, hook: Any) -> None:
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)


def through_dispatch(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x) in place of `module`'s own, with what accelerate's hook does before and after it."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return forward(x)
    (x,), _ = hook.pre_forward(module, x)
    return hook.post_forward(module, forward(x))
