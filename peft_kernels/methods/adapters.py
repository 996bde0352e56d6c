"""What is done with the adapters of a whole model: choose, switch off, delete, count."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

from torch import nn

from ..nn.adapter import name_list
from ..nn.lora_linear import FusedLoRALinear
from ..nn.nf4_base import NAMES, NF4Base
from ..nn.trainable_copy import TrainableCopy
from .bias_adapter import BiasAdapter, bias_adapter
from .bitfit_config import BitFitConfig
from .lora_config import LoraConfig
from .walk import replace_modules, uncompiled

Config = LoraConfig | BitFitConfig
_CONFIGS = "peft_kernels_configs"  # attribute of the model: adapter name -> Config


def configs(model: nn.Module) -> dict[str, Config]:
    """The adapters that were injected into the model: name -> config."""
    return dict(getattr(model, _CONFIGS, {}))


def register(model: nn.Module, adapter_name: str, config: Config | None) -> None:
    """Remember an adapter's config on the model; None forgets it."""
    present = {**configs(model), adapter_name: config}
    setattr(model, _CONFIGS, {name: value for name, value in present.items() if value is not None})


def fused_layers(model: nn.Module) -> list[tuple[str, FusedLoRALinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)]


def trainable_copies(model: nn.Module) -> list[tuple[str, TrainableCopy]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TrainableCopy)]


def layers_or_error(model: nn.Module) -> list[tuple[str, FusedLoRALinear]]:
    layers = fused_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no FusedLoRALinear: inject adapters first")
    return layers


def check_known(model: nn.Module, names: list[str]) -> None:
    layers = [] if bias_adapter(model) is not None else layers_or_error(model)
    known = sorted({*configs(model)}.union(*(layer.specs for _, layer in layers)))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no adapter {unknown} in this model; there are {known}")


def biases_to(model: nn.Module, what: str) -> BiasAdapter | None:
    """The model's BitFit adapter, None where it has none; RuntimeError while it is disabled.

    In a copy of the model made inside a `disable_adapter` block, no block will put the trained biases back: this does.
    """
    biases = bias_adapter(model)
    if biases is not None and biases.withdrawn and not biases.held:
        biases.reinstate(model)
        for _, wrapper in trainable_copies(model):
            wrapper.disabled = False
    if biases is not None:
        biases.refuse_withdrawn(what)
    return biases


def refuse_merged(model: nn.Module, what: str) -> None:
    biases = bias_adapter(model)
    if biases is not None and biases.merged:
        raise RuntimeError(f"cannot {what}: the biases of {biases.name!r} are merged, unmerge first")
    merged = [name for name, layer in fused_layers(model) if layer.merged]
    if merged:
        raise RuntimeError(
            f"cannot {what}: adapters are merged in {merged[0]} and {len(merged) - 1} more, unmerge first"
        )


def set_adapter(model: nn.Module, names: str | list[str], inference_mode: bool = False) -> None:
    """Make these adapters active everywhere they exist, and trainable unless inference_mode; freeze the others.

    Raises:
        ValueError: an adapter unknown or named twice, or two with a modules_to_save copy of the same module.
        RuntimeError: adapters are merged.
    """
    names, model = name_list(names), uncompiled(model)
    check_known(model, names)
    refuse_merged(model, "set the active adapters")
    copies = {wrapper: [name for name in names if name in wrapper.copies] for _, wrapper in trainable_copies(model)}
    for own in copies.values():
        if len(own) > 1:
            raise ValueError(f"adapters {own} each bring a copy of the same modules_to_save module: activate only one")
    biases = biases_to(model, "set the active adapters")
    if biases is not None:
        if not names:
            raise ValueError("names is empty, but BitFit's biases are the model's own: use disable_adapter")
        biases.train(model, not inference_mode)
    for _, layer in fused_layers(model):
        layer.set_adapter([name for name in names if name in layer.specs], inference_mode)
    for wrapper, own in copies.items():
        wrapper.set_adapter(own[0] if own else None, inference_mode)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as if no adapter were there.

    BitFit's biases are the original ones meanwhile, frozen, in the layers that were there before: the base model bit
    for bit, which its state_dict holds too, but for buffers that training changed (BatchNorm's running statistics) and
    casts of the model since. Biases that a LoRA config trained stay as they are. A graph made inside must run backward
    inside, one made before after it: autograd raises otherwise where it saved a bias.

    Raises:
        RuntimeError: adapters are merged, or a layer or bias was replaced since BitFit was injected.
    """
    model = uncompiled(model)
    biases = bias_adapter(model)
    layers = [] if biases is not None else layers_or_error(model)
    refuse_merged(model, "disable adapters")
    modules = [module for _, module in [*layers, *trainable_copies(model)]]
    before = [module.disabled for module in modules]
    withdraw = biases is not None and not biases.withdrawn
    if withdraw:
        biases.withdraw(model)
    try:
        for module in modules:
            module.disabled = True
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module.disabled = disabled
        if withdraw:
            biases.reinstate(model)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter and its modules_to_save copies; a module without copies left stands in its own place again.

    Layers that LoRA wrapped stay wrapped. BitFit's biases become the original ones bit for bit, in the layers that were
    there before. What was merged with restorable=False stays in the weights, which are the base weights from then on,
    as the trained copies that ran beside it are the base model's modules: HF PEFT's merge_and_unload does the same.

    "Bit for bit" is said of the biases. Other state that training changed, as BatchNorm's running statistics, stays as
    it is, and a model cast to a narrower dtype and back has rounded what the originals, in their own, were not.

    Raises:
        ValueError: there is no such adapter.
        RuntimeError: adapters are merged, and `unmerge` could take them out.
    """
    model = uncompiled(model)
    check_known(model, [name])
    biases = biases_to(model, "delete an adapter")
    merged = biases is not None and biases.merged
    merged = merged or any(name in layer.merged_adapters for _, layer in fused_layers(model))
    if biases is not None:
        if biases.merged and biases.originals is not None:
            refuse_merged(model, "delete an adapter")
        biases.remove(model)
    elif any(layer.restorable for _, layer in fused_layers(model)):
        refuse_merged(model, "delete an adapter")
    for _, layer in fused_layers(model):
        if name in layer.specs:
            layer.delete_adapter(name)
    idle = {}
    for _, wrapper in trainable_copies(model):
        if name in wrapper.copies:
            wrapper.delete_adapter(name, keep=merged and wrapper.active == name)
        if not wrapper.copies:
            idle[wrapper] = wrapper.original
    replace_modules(model, idle)
    register(model, name, None)


class ParameterCount(NamedTuple):
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many scalars train and how many there are; shared ones count once, a 4-bit weight as what it stands for."""
    small = {m.weight: m for m in model.modules() if isinstance(m, NF4Base) and m.quantised is not None}
    inside = {id(m._parameters[name]) for m in small.values() for name in NAMES}
    parameters = [p for p in model.parameters() if id(p) not in inside]
    total = sum(p.numel() for p in parameters) + sum(prod(m.quantised.shape) for m in small.values())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), total)
