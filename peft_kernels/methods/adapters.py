"""What is done with the adapters of a whole model: choose, switch off, merge, delete, count."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from ..nn.adapter import name_list
from ..nn.lora_linear import FusedLoRALinear
from ..nn.trainable_copy import TrainableCopy
from .lora_config import LoraConfig

_CONFIGS = "peft_kernels_configs"  # attribute of the model: adapter name -> LoraConfig


def configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The adapters that were injected into the model: name -> config."""
    return dict(getattr(model, _CONFIGS, {}))


def register(model: nn.Module, adapter_name: str, config: LoraConfig | None) -> None:
    """Remember an adapter's config on the model; None forgets it."""
    present = {**configs(model), adapter_name: config}
    setattr(model, _CONFIGS, {name: value for name, value in present.items() if value is not None})


def fused_layers(model: nn.Module) -> list[tuple[str, FusedLoRALinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)]


def trainable_copies(model: nn.Module) -> list[tuple[str, TrainableCopy]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TrainableCopy)]


def _layers_or_error(model: nn.Module) -> list[tuple[str, FusedLoRALinear]]:
    layers = fused_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no FusedLoRALinear: inject adapters first")
    return layers


def _check_known(model: nn.Module, names: list[str]) -> None:
    layers = _layers_or_error(model)
    known = sorted({*configs(model)}.union(*(layer.specs for _, layer in layers)))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no adapter {unknown} in this model; there are {known}")


def refuse_merged(model: nn.Module, what: str) -> None:
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
    names = name_list(names)
    _check_known(model, names)
    refuse_merged(model, "set the active adapters")
    copies = {wrapper: [name for name in names if name in wrapper.copies] for _, wrapper in trainable_copies(model)}
    for own in copies.values():
        if len(own) > 1:
            raise ValueError(f"adapters {own} each bring a copy of the same modules_to_save module: activate only one")
    for _, layer in fused_layers(model):
        layer.set_adapter([name for name in names if name in layer.specs], inference_mode)
    for wrapper, own in copies.items():
        wrapper.set_adapter(own[0] if own else None, inference_mode)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as if no adapter were there (biases that were trained stay as they are)."""
    layers = _layers_or_error(model)
    refuse_merged(model, "disable adapters")
    modules = [module for _, module in [*layers, *trainable_copies(model)]]
    before = [module.disabled for module in modules]
    try:
        for module in modules:
            module.disabled = True
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module.disabled = disabled


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter and its modules_to_save copies; the wrapped layers stay in place.

    One merged with restorable=False stays in the weights, which are the base weights from then on.

    Raises:
        ValueError: there is no such adapter.
        RuntimeError: adapters are merged, and `unmerge` could take them out.
    """
    _check_known(model, [name])
    if any(layer.restorable for _, layer in fused_layers(model)):
        refuse_merged(model, "delete an adapter")
    for _, layer in fused_layers(model):
        if name in layer.specs:
            layer.delete_adapter(name)
    for _, wrapper in trainable_copies(model):
        if name in wrapper.copies:
            wrapper.delete_adapter(name)
    register(model, name, None)


def _refuse_tied(model: nn.Module, layers: list[tuple[str, FusedLoRALinear]]) -> None:
    """Merging writes a weight in place: another module that holds it would change with it."""

    def memory(parameter: nn.Parameter) -> int:
        return parameter.data_ptr() or id(parameter)  # no address on the meta device

    own: dict[int, str] = {}
    for name, layer in layers:
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                own.setdefault(memory(parameter), name)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holder = own.get(memory(parameter), name)
            if holder != name:
                raise ValueError(
                    f"cannot merge: the weight or bias of {holder} is shared with {name}, which would change too; "
                    "untie them first"
                )


def merge(
    model: nn.Module, adapter_names: str | list[str] | None = None, safe_merge: bool = False, restorable: bool = True
) -> None:
    """Merge adapters (default: the active ones) into the base weights of every layer; all layers or none.

    restorable=True keeps each original weight in host memory (the merged layers' weight bytes) for `unmerge`, and for
    `model.state_dict()`, which holds the base weights also while they are merged. With restorable=False it raises
    until the merged adapters are deleted: after `delete_adapter` it holds the merged weights alone, under the base
    model's names. Loading a state_dict unmerges first.

    Raises:
        ValueError: an adapter unknown or named twice, a weight that another module shares, a value that is not finite.
        RuntimeError: adapters are merged already, or a lora_bias has no base bias to go to.
    """
    adapter_names = None if adapter_names is None else name_list(adapter_names)
    _check_known(model, adapter_names or [])
    refuse_merged(model, "merge")
    work = []
    for name, layer in fused_layers(model):
        names = layer.active_adapters if adapter_names is None else [n for n in adapter_names if n in layer.specs]
        if names:
            work.append((name, layer, names))
    _refuse_tied(model, [(name, layer) for name, layer, _ in work])
    for name, layer, names in work:
        if layer.bias is None and any(adapter in layer.lora_bias for adapter in names):
            raise RuntimeError(f"{name}: cannot merge a lora_bias, the base layer has no bias")
    done = []
    for name, layer, names in work:
        try:
            layer.merge(names, safe_merge, restorable or safe_merge)
        except ValueError as error:
            for earlier in done:
                earlier.unmerge()
            raise ValueError(f"{name}: {error}") from error
        done.append(layer)
    if not restorable:
        for layer in done:
            layer.forget_base()


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its base weight back, bit for bit.

    Raises:
        RuntimeError: nothing is merged, or it was merged with restorable=False.
    """
    merged = [layer for _, layer in _layers_or_error(model) if layer.merged]
    if not merged:
        raise RuntimeError("cannot unmerge: no adapter is merged")
    for layer in merged:
        layer.unmerge()


class ParameterCount(NamedTuple):
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many scalars train and how many there are; shared ones count once."""
    parameters = list(model.parameters())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
