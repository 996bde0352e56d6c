"""A model's safetensors files: what lies where, read one tensor at a time; and written, in shards with an index."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .sharding import whole, writes

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, with the path, unless it is an object in UTF-8."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object")
    return values


class TensorFiles:
    """The tensors of a checkpoint by key; none is read before it is asked for.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be read.
    """

    def __init__(self, path: str | os.PathLike, device: torch.device | str = "cpu"):
        self._where: dict[str, Any] = {}
        for file, keys in _found(Path(path)):
            try:
                opened = safe_open(file, framework="pt", device=str(device))
            except SafetensorError as error:
                raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
            own = set(opened.keys())
            absent = sorted(set(keys) - own)
            if absent:
                raise ValueError(f"{file} lacks {absent[0]}, which the index says is there")
            self._where.update(dict.fromkeys(keys or own, opened))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def described(self, key: str) -> Tensor:
        """On the meta device."""
        part = self._where[key].get_slice(key)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"{key} is {part.get_dtype()}, which is not read here")
        return torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")

    def read(self, key: str) -> Tensor:
        return self._where[key].get_tensor(key)


def _found(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """(file, its keys by the index; none where there is no index)."""
    if path.is_file():
        yield path, []
    elif (path / INDEX).is_file():
        keys: dict[str, list[str]] = {}
        placed = read_json(path / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise ValueError(f"{path / INDEX} holds no weight_map from keys to files")
        for key, file in placed.items():
            if Path(file).name != file:
                raise ValueError(f"{path / INDEX} places {key} in {file}, which is no file of this folder")
            keys.setdefault(file, []).append(key)
        for file, own in keys.items():
            if not (path / file).is_file():
                raise FileNotFoundError(f"{path} has no {file}, which {INDEX} names")
            yield path / file, own
    elif (path / WEIGHTS).is_file():
        yield path / WEIGHTS, []
    else:
        there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"{path} has no {WEIGHTS} and no {INDEX} (only safetensors is read); found: {there}")


def _shards(contents: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in contents.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    return shards


def write_tensors(folder: Path, contents: dict[str, Tensor], limit: int) -> None:
    """One file, or shards of at most `limit` bytes with an index. Earlier ones are removed.

    All is written under temporary names before anything is moved into place, so that a full disk leaves the earlier
    files as they were. While shards are moved there is no index: what is half moved does not load. A shard at a time
    is copied to host memory. Where tensors are sharded, every process calls this and rank 0 writes.
    """
    if not writes(contents.values()):
        for tensor in contents.values():
            whole(tensor)
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(contents, limit)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    placed = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(tensor.nbytes for tensor in contents.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    with contextlib.ExitStack() as left_over:
        for name in (*names, INDEX):
            left_over.callback((folder / f"{name}.tmp").unlink, missing_ok=True)
        for name, shard in zip(names, shards, strict=True):
            own = {key: whole(tensor.detach()).cpu().contiguous() for key, tensor in shard.items()}
            save_file(own, folder / f"{name}.tmp", metadata={"format": "pt"})
        (folder / f"{INDEX}.tmp").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if count > 1:
            (folder / INDEX).unlink(missing_ok=True)
        for name in (*names, *([INDEX] if count > 1 else [])):
            os.replace(folder / f"{name}.tmp", folder / name)
    if count == 1:
        (folder / INDEX).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name not in names and (entry.name == WEIGHTS or _SHARD.fullmatch(entry.name)):
            entry.unlink()
