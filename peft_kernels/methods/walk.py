"""What every method asks of a model: its modules outside wrappers, those that train whole, and putting wrappers in."""

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from ..nn.dispatch import OFFLOADED, offloaded
from ..nn.lora_linear import FusedLoRALinear
from ..nn.nf4_base import NF4Base
from ..nn.trainable_copy import TrainableCopy


class SavesModules(Protocol):
    """The part of a config that says what trains whole; `heads` are those that the task type adds."""

    modules_to_save: list[str] | None
    heads: tuple[str, ...]


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile(model) runs: the wrapper has other names for everything, and not our marks."""
    while type(model).__module__ == "torch._dynamo.eval_frame" and "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]
    return model


def is_peft_layer(module: nn.Module) -> bool:
    """HF PEFT's wrapper around one layer, recognised without importing peft."""
    return "base_layer" in module._modules and any(c.__module__.startswith("peft.tuners") for c in type(module).__mro__)


def refuse_peft(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_peft_layer(module):
            raise ValueError(f"{name or 'the model'} is HF PEFT's {type(module).__name__}: use peft_kernels.accelerate")


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the model itself: not what lies inside wrappers. Shared modules come once per name."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, FusedLoRALinear | TrainableCopy) or is_peft_layer(module):
            inside += (name + ".",)
        yield name, module


def check_saved_exist(config: SavesModules, names: list[str]) -> None:
    """A misspelt name would otherwise be left out without a word; heads of a task type need not be there."""
    asked = [name for name in config.modules_to_save or () if name not in config.heads]
    unknown = [name for name in asked if not any(other.endswith(name) for other in names)]
    if unknown:
        raise ValueError(f"modules_to_save {unknown} match no module of this model")


def choose_saved(model: nn.Module, config: SavesModules) -> dict[str, nn.Module]:
    """The modules that train whole, by name: every one whose name ends in a wanted one."""
    wanted = [*(config.modules_to_save or ()), *config.heads]
    chosen = {name: module for name, module in walk(model) if any(name.endswith(entry) for entry in wanted)}
    for name in chosen:
        outer = next((other for other in chosen if name.startswith(other + ".")), None)
        if outer is not None:
            raise ValueError(f"modules_to_save chooses {name!r} and {outer!r}, which contains it: name only one")
        if any(isinstance(part, NF4Base) and part.quantised is not None for part in chosen[name].modules()):
            raise ValueError(f"modules_to_save chooses {name!r}, which is in 4 bits and cannot train: dequantise it")
    return chosen


def saved_trained(saved: dict[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """What `check_present` is to look at for these modules."""
    return {f"modules_to_save chooses {name}": list(module.modules()) for name, module in saved.items()}


def check_present(model: nn.Module, trained: dict[str, list[nn.Module]]) -> None:
    """What trains in place must be there to be trained: an offloaded tensor is a new one at each call.

    trained: what it is, in words -> the modules that own it.
    """
    absent = offloaded(model)
    for what, modules in trained.items():
        if any(id(module) in absent for module in modules):
            raise ValueError(f"{what}: {OFFLOADED}")


def new_copies(
    saved: dict[str, nn.Module], replaced: dict[nn.Module, nn.Module]
) -> dict[str, tuple[TrainableCopy, nn.Module]]:
    """Name -> (wrapper, the copy it will train); `replaced` learns which wrapper stands for which module.

    A module that is there under several names gets one copy, under its first.
    """
    copies, seen = {}, set()
    for name, module in saved.items():
        if module in seen:
            continue
        seen.add(module)
        wrapper = module
        if not isinstance(module, TrainableCopy):
            wrapper = replaced[module] = TrainableCopy(module).train(module.training)
        copies[name] = wrapper, wrapper.new_copy()
    return copies


def replace_modules(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Put each new module everywhere the old one stands: a shared module has several parents."""
    wrappers = set(replaced.values())
    for parent in list(model.modules()):
        if parent in wrappers:
            continue
        for child_name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, child_name, replaced[child])
