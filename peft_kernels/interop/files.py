"""An adapter's folder: adapter_config.json and adapter_model.safetensors, written whole, read and checked."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .sharding import whole, writes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def of_copies(copies: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Checkpoint key -> the live tensor, for modules that train whole."""
    states = {name: module.state_dict(keep_vars=True) for name, module in copies.items()}
    return {f"{PREFIX}{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}


def _own_storage(contents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in host memory; safetensors refuses two keys over one storage."""
    stored, seen = {}, set()
    for key, tensor in contents.items():
        tensor = whole(tensor.detach()).cpu().contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        stored[key] = tensor
    return stored


def write_folder(path: str | os.PathLike, settings: dict[str, Any], contents: dict[str, Tensor]) -> None:
    """Each file is written under a temporary name and moved into place, the config last: with a config it is whole.

    Where tensors are sharded, every process calls this and rank 0 writes.
    """
    stored = _own_storage(contents)
    if not writes(contents.values()):
        return
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f"{WEIGHTS_FILE}.tmp", folder / f"{CONFIG_FILE}.tmp"
    save_file(stored, weights, metadata={"format": "pt"})
    text.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    os.replace(weights, folder / WEIGHTS_FILE)
    os.replace(text, folder / CONFIG_FILE)


def read_folder(path: str | os.PathLike, parse: Callable[[Any], Any]) -> tuple[Any, dict[str, Tensor]]:
    """(what `parse` makes of the config, the tensors).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be read, or a config that `parse` refuses.
    """
    folder = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{folder} has no {name} (only safetensors is read); found: {there}")
    try:
        config = parse(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except ValueError as error:  # of the settings, JSON or UTF-8
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    try:
        return config, load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is not a whole safetensors file: {error}") from error


def check_contents(
    contents: dict[str, Tensor], tensors: dict[str, Tensor], copies: dict[str, nn.Module], path: str | os.PathLike
) -> None:
    """Keys, shapes and kinds, all problems in one message. HF PEFT may store biases of modules_to_save twice more."""
    doubles = tuple(f"{PREFIX}{n}.{kind}." for n in copies for kind in ("original_module", "modules_to_save"))
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
