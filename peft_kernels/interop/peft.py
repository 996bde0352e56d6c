"""save_adapter, load_adapter: HF PEFT's checkpoint format, both ways.

A folder with adapter_config.json and adapter_model.safetensors (metadata {"format": "pt"}). Keys are
`base_model.model.<module>.` + `lora_A.weight` [R, K], `lora_B.weight` [N, R], `lora_B.bias` [N]; modules_to_save
under their own names; trained biases of adapted layers as `base_layer.bias`. The adapter's name is not stored.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..methods.adapters import configs, fused_layers, refuse_merged, register, trainable_copies
from ..methods.lora import Plan, carry_out, plan_injection
from ..methods.lora_config import LoraConfig
from ..methods.targets import is_all_linear, is_excluded, is_saved, matches, pattern_value, walk
from ..nn.merging import unmerged_bias

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


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
            found[f"{_PREFIX}{owner}.base_layer.bias"] = tensor
        elif bias == "all":
            found[f"{_PREFIX}{owner}.bias" if owner else f"{_PREFIX}bias"] = tensor
    return found


def _contents(model: nn.Module, bias: str, adapters: dict, copies: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Checkpoint key -> the live tensor behind it. adapters: module name -> (A, B, bias of B or None)."""
    copied = {*copies, *(name for name, _ in trainable_copies(model))}
    adapted = {*adapters, *(name for name, _ in fused_layers(model))}
    contents = _base_biases(model, bias, adapted, copied)
    for name, (lora_a, lora_b, lora_bias) in adapters.items():
        contents[f"{_PREFIX}{name}.lora_A.weight"] = lora_a
        contents[f"{_PREFIX}{name}.lora_B.weight"] = lora_b
        if lora_bias is not None:
            contents[f"{_PREFIX}{name}.lora_B.bias"] = lora_bias
    for name, module in copies.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            contents[f"{_PREFIX}{name}.{key}"] = tensor
    return contents


def _injected(model: nn.Module, adapter_name: str) -> tuple[dict, dict[str, nn.Module]]:
    """(adapters, copies) of an adapter that is in the model, as `_contents` takes them."""
    adapters = {
        name: (layer.lora_A[adapter_name], layer.lora_B[adapter_name], layer.lora_bias.get(adapter_name))
        for name, layer in fused_layers(model)
        if adapter_name in layer.specs
    }
    copies = {name: w.copies[adapter_name] for name, w in trainable_copies(model) if adapter_name in w.copies}
    return adapters, copies


def _require(model: nn.Module, adapter_name: str) -> LoraConfig:
    present = configs(model)
    if adapter_name not in present:
        raise ValueError(f"no adapter {adapter_name!r} was injected into this model; there are {list(present)}")
    return present[adapter_name]


def _to_store(model: nn.Module, bias: str, adapters: dict, copies: dict[str, nn.Module]) -> dict[str, Tensor]:
    """`_contents` as they are without merged adapters: a file that held a merged bias would count lora_bias twice."""
    contents = _contents(model, bias, adapters, copies)
    for name, layer in fused_layers(model):
        key = f"{_PREFIX}{name}.base_layer.bias"
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


def _own_storage(contents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in host memory; safetensors refuses two keys over one storage."""
    stored, seen = {}, set()
    for key, tensor in contents.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        stored[key] = tensor
    return stored


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write one adapter into folder `path` so that `peft.PeftModel.from_pretrained` and `load_adapter` can read it.

    Each file is written under a temporary name and moved into place, the config last: a folder with a config is whole.

    Raises:
        ValueError: an adapter that was not injected, or whose scaling was changed by `set_scale` (the format has no
            place for it).
        RuntimeError: a trained bias with a lora_bias merged into it by restorable=False.
    """
    config = _require(model, adapter_name)
    for name, layer in fused_layers(model):
        if adapter_name in layer.specs and layer.scaling[adapter_name] != layer.specs[adapter_name].scaling:
            raise ValueError(f"{name}: set_scale changed the scaling of {adapter_name!r}, which the format cannot hold")
    adapters, copies = _injected(model, adapter_name)
    contents = _to_store(model, config.bias, adapters, copies)
    settings = {
        **config.to_dict(),
        "target_modules": _explicit_targets(model, config, list(adapters)),
        "fan_in_fan_out": any(layer.fan_in_fan_out for name, layer in fused_layers(model) if name in adapters),
        "base_model_name_or_path": config.base_model_name_or_path or vars(model).get("name_or_path"),
        "inference_mode": True,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f"{WEIGHTS_FILE}.tmp", folder / f"{CONFIG_FILE}.tmp"
    save_file(_own_storage(contents), weights, metadata={"format": "pt"})
    text.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    os.replace(weights, folder / WEIGHTS_FILE)
    os.replace(text, folder / CONFIG_FILE)


def _read(path: str | os.PathLike) -> tuple[LoraConfig, dict[str, Tensor]]:
    folder = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{folder} has no {name} (only safetensors is read); found: {there}")
    try:
        config = LoraConfig.from_dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except ValueError as error:  # of the settings, JSON or UTF-8
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    try:
        return config, load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is not a whole safetensors file: {error}") from error


def _check(contents: dict[str, Tensor], tensors: dict[str, Tensor], copies: dict, path) -> None:
    """Keys, shapes and kinds, all problems in one message. HF PEFT may store biases of modules_to_save twice more."""
    doubles = tuple(f"{_PREFIX}{n}.{kind}." for n in copies for kind in ("original_module", "modules_to_save"))
    problems = [f"missing key {key}" for key in contents if key not in tensors]
    problems += [f"unexpected key {key}" for key in tensors if key not in contents and not key.startswith(doubles)]
    for key, tensor in contents.items():
        if key not in tensors:
            continue
        if tensors[key].shape != tensor.shape:
            problems.append(f"{key} has shape {list(tensors[key].shape)}, expected {list(tensor.shape)}")
        elif tensors[key].is_floating_point() != tensor.is_floating_point():
            problems.append(f"{key} is {tensors[key].dtype}, expected {tensor.dtype}")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{path} does not fit the model, nothing was loaded: {'; '.join(problems[:20])}{more}")


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
        ValueError: a file that cannot be read; keys, shapes or settings that do not fit, all of them listed.
        RuntimeError: adapters are merged.
    """
    refuse_merged(model, "load an adapter")
    config, tensors = _read(path)
    config = replace(config, inference_mode=not is_trainable)
    present = configs(model)
    if adapter_name in present:
        if present[adapter_name].bias != config.bias:
            raise ValueError(
                f"the file has bias={config.bias!r}, adapter {adapter_name!r} {present[adapter_name].bias!r}"
            )
        plan, (adapters, copies) = None, _injected(model, adapter_name)
    else:
        plan, adapters, copies = _plan(model, config, adapter_name)
    contents = _contents(model, config.bias, adapters, copies)
    _check(contents, tensors, copies, path)
    if plan is not None:
        carry_out(model, plan)
    else:
        _apply_settings(model, config, adapter_name)
        active = any(adapter_name in layer.active_adapters for _, layer in fused_layers(model))
        for tensor in contents.values():
            if isinstance(tensor, nn.Parameter):  # not the buffers of modules_to_save
                tensor.requires_grad_(is_trainable and active)
    for key, tensor in contents.items():
        tensor.copy_(tensors[key])
    return model
