"""load_quantized, save_quantized: a model's files read into 4 bits, or in bitsandbytes' layout, both ways."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..formats.nf4 import check_asked
from ..formats.nf4_state import from_state, unpadded
from ..methods.adapters import fused_layers, trainable_copies
from ..methods.hf_config import describe_four_bits, four_bit_layers, quantization_config
from ..methods.quantise import check_weights
from ..methods.walk import refuse_peft, uncompiled
from ..nn.base_linear import conv1d_class
from ..nn.nf4_base import NF4Base
from ..nn.nf4_linear import quantised
from ..nn.nf4_sharded import is_sharded
from .bitsandbytes import layer_of, replace_layer
from .checkpoint_plan import CheckpointPlan, matrix_shape
from .sharding import reshard, writes
from .tensor_files import CONFIG, TensorFiles, read_json, write_tensors


def _check_config(path: Path) -> None:
    """A checkpoint that says it is quantised must be so in a way that is read here."""
    file = path / CONFIG
    settings = read_json(file).get("quantization_config") if file.is_file() else None
    if settings is None:
        return
    fields = settings if isinstance(settings, dict) else {}
    if fields.get("quant_method", "bitsandbytes") != "bitsandbytes" or not fields.get("load_in_4bit"):
        raise ValueError(f"{file}: quantization_config is {settings}; expected bitsandbytes' with load_in_4bit")


def _refuse_four_bits(model: nn.Module) -> None:
    count = len(four_bit_layers(model))
    if count:
        raise ValueError(
            f"load_quantized: {type(model).__name__} has {count} layers in 4 bits already; expected a dense model "
            "(load_state_dict reads what is in 4 bits into this one)"
        )


def _bias(plan: CheckpointPlan, name: str, module: nn.Module) -> nn.Parameter | None:
    if module.bias is None:
        return None
    return nn.Parameter(plan.read(f"{name}.bias"), requires_grad=module.bias.requires_grad)


def _four_bits(plan: CheckpointPlan, name: str, settings: tuple[str, int, bool]) -> nn.Module:
    """The layer in 4 bits; the dense weight, where there is one, is gone when this returns."""
    conv1d = conv1d_class(plan.modules[name])
    if name in plan.small:
        module = plan.small[name]
        shape = matrix_shape(module)
        stored = from_state(f"{name}.weight", plan.state(name), shape)
        return layer_of(name, stored, _bias(plan, name, module), shape, conv1d)
    module = plan.dense[name]
    weight = plan.read(f"{name}.weight")
    check_weights({name: weight})
    stored = quantised(weight if conv1d is None else weight.t(), *settings)
    return layer_of(name, stored, _bias(plan, name, module), matrix_shape(module), conv1d)


def _attach(model: nn.Module, layers: dict[nn.Module, nn.Module], tensors: dict[int, Tensor], device) -> None:
    """tensors: id of the Parameter or buffer there -> what takes its place, wherever it stands."""
    for old, new in layers.items():
        replace_layer(model, old, new)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in tensors:
                module._parameters[name] = tensors[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = tensors.get(id(buffer), buffer.to(device))


def load_quantized(
    model: nn.Module,
    path: str | os.PathLike,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    skip_modules: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read a checkpoint into `model` and quantise while reading: one dense weight at a time is in memory.

    Args:
        model: built without memory for its Parameters (accelerate's init_empty_weights), changed in place: what
            `quantize` would choose becomes NF4Linear, everything else is read as it is.
        path: a folder with model.safetensors, or shards and their index; or one file. Where it is in 4 bits
            (bitsandbytes' layout) it is taken as it is, and the three settings below say nothing.
        quant_type, blocksize, double_quant, skip_modules: as `quantize` takes them.
        device: where all goes; each weight is quantised there.
        dtype: of what stays dense, and of weights before they are quantised; None takes the file's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a model in 4 bits; a file that cannot be read; keys or shapes that do not fit, all of them listed; a
            weight, or the scales of one in 4 bits, that hold NaN or an infinity. The model is as it was then.
    """
    inner = uncompiled(model)
    check_asked("load_quantized", quant_type, blocksize, double_quant)
    _refuse_four_bits(inner)
    _check_config(Path(path))
    plan = CheckpointPlan(inner, TensorFiles(path, device), skip_modules, dtype)
    names = [*plan.small, *plan.dense]
    layers, settings = {}, (quant_type, blocksize, double_quant)
    for name in tqdm(names, desc="reading into 4 bits", unit="layer", delay=2, disable=None, dynamic_ncols=True):
        layers[plan.modules[name]] = _four_bits(plan, name, settings).train(plan.modules[name].training)
    done = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    tensors: dict[int, Any] = {}
    for key, old in plan.expected.items():
        if key not in done and key in plan.files and id(old) not in tensors:
            new = plan.read(key)
            parameter = isinstance(old, nn.Parameter)
            tensors[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if parameter else new
    _attach(inner, layers, tensors, device)
    if plan.tied and callable(getattr(inner, "tie_weights", None)):
        inner.tie_weights()
    describe_four_bits(inner)
    return model


def _contents(model: nn.Module) -> dict[str, Tensor]:
    """The base model's state_dict, each tensor once under its first name, and so each 4-bit layer."""
    adapters = tuple(f"{name}.{part}." for name, _ in fused_layers(model) for part in ("lora_A", "lora_B", "lora_bias"))
    first = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    again = tuple(
        f"{name}.weight."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, NF4Base) and first[id(module)] != name
    )
    contents, seen = {}, set()
    cut = any(map(is_sharded, model.parameters()))
    for key, tensor in model.state_dict(keep_vars=cut).items():
        # A process may have no element of a sharded tensor, and still must leave out what the others do.
        place = id(tensor) if is_sharded(tensor) else (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if key.startswith((*adapters, *again)) or (tensor.numel() and place in seen):
            continue
        seen.add(place)
        contents[key] = unpadded(key, tensor.detach())
    return contents


def save_quantized(model: nn.Module, path: str | os.PathLike, max_shard_size: int = 5 * 10**9) -> None:
    """Write the base model into folder `path` in bitsandbytes' layout, for `load_quantized` and for transformers.

    Without adapters, which `save_adapter` writes. A Hugging Face model's config.json is written too, with the
    quantization_config that its from_pretrained asks for. Of a model that FSDP2 has sharded, every process calls this,
    and rank 0 writes.

    Args:
        max_shard_size: bytes of a file, at most, but for single tensors larger than that.

    Raises:
        ValueError: nothing in 4 bits, a bare layer, HF PEFT's wrappers, or modules_to_save, which belong to an
            adapter.
    """
    model, folder = uncompiled(model), Path(path)
    refuse_peft(model)
    layers = four_bit_layers(model)
    if not layers:
        raise ValueError(f"save_quantized: {type(model).__name__} has no layer in 4 bits")
    if "" in layers:
        raise ValueError(f"save_quantized: {type(model).__name__} is itself the layer: save its state_dict()")
    copies = trainable_copies(model)
    if copies:
        raise ValueError(f"save_quantized: {copies[0][0]} is one of modules_to_save: delete the adapter first")
    reshard(model)
    contents = _contents(model)
    write_tensors(folder, contents, max_shard_size)
    if not writes(contents.values()):
        return
    config = getattr(model, "config", None)
    if callable(getattr(config, "save_pretrained", None)):
        config.save_pretrained(folder)
        values = {**read_json(folder / CONFIG), "quantization_config": quantization_config(model)}
        (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
