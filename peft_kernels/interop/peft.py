"""save_adapter, load_adapter: HF PEFT's checkpoint format, both ways.

A folder with adapter_config.json and adapter_model.safetensors (metadata {"format": "pt"}). Keys are
`base_model.model.<module>.` + `lora_A.weight` [R, K], `lora_B.weight` [N, R], `lora_B.bias` [N]; modules_to_save
under their own names; trained biases of adapted layers as `base_layer.bias`. The adapter's name is not stored. BitFit's
folder is of the same kind, with the biases under their own names and a peft_type that HF PEFT does not know.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.adapters import Config, configs, fused_layers, refuse_merged, register, trainable_copies
from ..methods.bitfit_config import BitFitConfig
from ..methods.lora import Plan, carry_out, plan_injection
from ..methods.lora_config import LoraConfig
from ..methods.targets import is_all_linear, is_excluded, is_saved, matches, pattern_value
from ..methods.walk import uncompiled, walk
from ..nn.merging import unmerged_bias
from ..nn.nf4_sharded import is_sharded
from . import biases
from .files import PREFIX, check_contents, of_copies, read_folder, write_folder
from .sharding import reshard


def _base_biases(model: nn.Module, bias: str, adapted: set[str], copied: set[str]) -> dict[str, Tensor]:
    """The base model's biases that an adapter with this `bias` setting stores, as HF PEFT does: the live ones."""
    found = {}
    for owner, module in model.named_modules(remove_duplicate=False) if bias != "none" else ():
        tensor = module._parameters.get("bias")
        if tensor is None and "bias" not in module._non_persistent_buffers_set:
            tensor = module._buffers.get("bias")
        if tensor is None or any(f"{owner}.".startswith(f"{name}.") for name in copied):
            continue
        if owner in adapted:
            found[f"{PREFIX}{owner}.base_layer.bias"] = tensor
        elif bias == "all":
            found[f"{PREFIX}{owner}.bias" if owner else f"{PREFIX}bias"] = tensor
    return found


def _contents(model: nn.Module, bias: str, adapters: dict, copies: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Checkpoint key -> the live tensor behind it. adapters: module name -> (A, B, bias of B or None)."""
    copied = {*copies, *(name for name, _ in trainable_copies(model))}
    adapted = {*adapters, *(name for name, _ in fused_layers(model))}
    contents = _base_biases(model, bias, adapted, copied)
    for name, (lora_a, lora_b, lora_bias) in adapters.items():
        contents[f"{PREFIX}{name}.lora_A.weight"] = lora_a
        contents[f"{PREFIX}{name}.lora_B.weight"] = lora_b
        if lora_bias is not None:
            contents[f"{PREFIX}{name}.lora_B.bias"] = lora_bias
    return {**contents, **of_copies(copies)}


def _injected(model: nn.Module, adapter_name: str) -> tuple[dict, dict[str, nn.Module]]:
    """(adapters, copies) of an adapter that is in the model, as `_contents` takes them."""
    adapters = {
        name: (layer.lora_A[adapter_name], layer.lora_B[adapter_name], layer.lora_bias.get(adapter_name))
        for name, layer in fused_layers(model)
        if adapter_name in layer.specs
    }
    copies = {name: w.copies[adapter_name] for name, w in trainable_copies(model) if adapter_name in w.copies}
    return adapters, copies


def _require(model: nn.Module, adapter_name: str) -> Config:
    present = configs(model)
    if adapter_name not in present:
        raise ValueError(f"no adapter {adapter_name!r} was injected into this model; there are {list(present)}")
    return present[adapter_name]


def _to_store(model: nn.Module, bias: str, adapters: dict, copies: dict[str, nn.Module]) -> dict[str, Tensor]:
    """`_contents` as they are without merged adapters: a file that held a merged bias would count lora_bias twice."""
    contents = _contents(model, bias, adapters, copies)
    for name, layer in fused_layers(model):
        key = f"{PREFIX}{name}.base_layer.bias"
        if key in contents:
            contents[key] = unmerged_bias(layer)
    return contents


def _explicit_targets(model: nn.Module, config: LoraConfig, names: list[str]) -> list[str] | str:
    """ "all-linear" as names that choose the same modules wherever the file is read; a regex where names would not."""
    if not is_all_linear(config):
        return config.target_modules
    by_name = replace(config, target_modules=sorted(names))
    saved = tuple(name for name, _ in trainable_copies(model))
    chosen = {n for n, _ in walk(model) if matches(by_name, n)}
    chosen = {n for n in chosen if not is_excluded(config, n) and not is_saved(config, n, saved)}
    return by_name.target_modules if chosen == set(names) else "|".join(re.escape(name) for name in sorted(names))


def _lora_to_store(model: nn.Module, config: LoraConfig, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, contents) of the adapter's files."""
    for name, layer in fused_layers(model):
        if adapter_name in layer.specs and layer.scaling[adapter_name] != layer.specs[adapter_name].scaling:
            raise ValueError(f"{name}: set_scale changed the scaling of {adapter_name!r}, which the format cannot hold")
    adapters, copies = _injected(model, adapter_name)
    settings = {
        **config.to_dict(),
        "target_modules": _explicit_targets(model, config, list(adapters)),
        "fan_in_fan_out": any(layer.fan_in_fan_out for name, layer in fused_layers(model) if name in adapters),
        "base_model_name_or_path": config.base_model_name_or_path or vars(model).get("name_or_path"),
        "inference_mode": True,
    }
    return settings, _to_store(model, config.bias, adapters, copies)


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write one adapter into folder `path` for `load_adapter`; `peft.PeftModel.from_pretrained` reads LoRA's too.

    BitFit's holds its biases and modules_to_save and nothing else. Each file is written under a temporary name and
    moved into place, the config last: a folder with a config is whole. Of a model that FSDP2 has sharded, every process
    calls this, and rank 0 writes.

    Raises:
        ValueError: an adapter that was not injected, or whose scaling was changed by `set_scale` (the format has no
            place for it).
        RuntimeError: a trained bias with a lora_bias merged into it by restorable=False.
    """
    model = uncompiled(model)
    config = _require(model, adapter_name)
    reshard(model)
    to_store = biases.to_store if isinstance(config, BitFitConfig) else _lora_to_store
    write_folder(path, *to_store(model, config, adapter_name))


def _parsed(values: Any) -> Config:
    bitfit = isinstance(values, dict) and values.get("peft_type") == "BITFIT"
    return (BitFitConfig if bitfit else LoraConfig).from_dict(values)


def _plan(model: nn.Module, config: LoraConfig, adapter_name: str) -> tuple[Plan, dict, dict[str, nn.Module]]:
    plan = plan_injection(model, config, adapter_name, strict=False)
    adapters = {name: (fresh.lora_a, fresh.lora_b, fresh.bias) for name, (_, fresh) in plan.adapters.items()}
    return plan, adapters, {name: module for name, (_, module) in plan.copies.items()}


def _apply_settings(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """The file's alpha, dropout and so on, for an adapter that was in the model before."""
    for name, layer in fused_layers(model):
        if adapter_name in layer.specs:
            rank = layer.specs[adapter_name].r
            layer.specs[adapter_name] = config.spec(rank, pattern_value(config.alpha_pattern, name))
            layer.set_scale(adapter_name, 1.0)
    register(model, adapter_name, config)


def _lora_to_load(
    model: nn.Module, config: LoraConfig, adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, nn.Module], Callable[[], None]]:
    """(live tensors by key, modules that train whole, what changes the model once all is checked)."""
    present = configs(model)
    if adapter_name not in present:
        plan, adapters, copies = _plan(model, config, adapter_name)
        return _contents(model, config.bias, adapters, copies), copies, lambda: carry_out(model, plan)
    if present[adapter_name].bias != config.bias:
        raise ValueError(f"the file has bias={config.bias!r}, adapter {adapter_name!r} {present[adapter_name].bias!r}")
    adapters, copies = _injected(model, adapter_name)
    contents = _contents(model, config.bias, adapters, copies)

    def overwrite() -> None:
        _apply_settings(model, config, adapter_name)
        active = any(adapter_name in layer.active_adapters for _, layer in fused_layers(model))
        for tensor in contents.values():
            if isinstance(tensor, nn.Parameter):  # not the buffers of modules_to_save
                tensor.requires_grad_(active and not config.inference_mode)

    return contents, copies, overwrite


@torch.no_grad()
def load_adapter(
    model: nn.Module, path: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
) -> nn.Module:
    """Read an adapter saved by `save_adapter` or by HF PEFT and return the model.

    Without an adapter of this name the file's config is injected (the first adapter becomes active, a further one
    waits for `set_adapter`); with one, its values are overwritten. All is read and checked before the model changes.

    Args:
        is_trainable: False freezes the adapter, as HF PEFT's from_pretrained does.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be read; keys, shapes or settings that do not fit, all of them listed; a model
            that FSDP2 has sharded.
        RuntimeError: adapters are merged.
    """
    given, model = model, uncompiled(model)
    refuse_merged(model, "load an adapter")
    if any(map(is_sharded, model.parameters())):
        raise ValueError("load_adapter: FSDP2 has sharded this model; load the adapter before fully_shard")
    config, tensors = read_folder(path, _parsed)
    config = replace(config, inference_mode=not is_trainable)
    present = configs(model).get(adapter_name, config)
    if type(present) is not type(config):
        raise ValueError(f"the file has a {type(config).__name__}, adapter {adapter_name!r} a {type(present).__name__}")
    to_load = biases.to_load if isinstance(config, BitFitConfig) else _lora_to_load
    contents, copies, change = to_load(model, config, adapter_name)
    check_contents(contents, tensors, copies, path)
    change()
    for key, tensor in contents.items():
        tensor.copy_(tensors[key])
    return given
