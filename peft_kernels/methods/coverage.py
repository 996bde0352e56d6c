"""coverage: which layer of a model runs which kernel, and the reason where none of ours runs."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tabulate import tabulate
from torch import nn

from .._core import native
from .._core.registry import OWNERS
from ..kernels.lora_linear.op import general_because
from ..nn.base_linear import is_linear, read_by_parents
from ..nn.bases import base_refusal
from ..nn.combine import RunsLoRALinear, calls, side_by_side
from ..nn.dispatch import replaced_forward
from ..nn.in_place import is_bias_linear, is_norm
from ..nn.nf4_base import NF4Base
from ..nn.nf4_linear import NF4Linear
from ..nn.trainable_copy import TrainableCopy
from .adapters import configs
from .bias_adapter import BiasAdapter, bias_adapter
from .targets import is_all_linear, is_excluded, output_head
from .walk import is_peft_layer, uncompiled, walk


class Row(NamedTuple):
    """module: its name, with * for a number where rows are folded. kernel: who owns the op there, or "torch"."""

    module: str
    kernel: str
    path: str
    reason: str


class Coverage:
    """The rows of `coverage(model)`, one per layer; print it for a table with like rows folded, and `total` below it.

    total: a sentence with places for the number of rows that a kernel of ours runs, and of all.
    """

    def __init__(self, rows: list[Row], total: str):
        self.rows, self.total = rows, total

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        folded: dict[Row, int] = {}
        for row in self.rows:
            key = row._replace(module=re.sub(r"\.\d+(?=\.|$)", ".*", row.module))
            folded[key] = folded.get(key, 0) + 1
        table = [(row.module, count, row.kernel, row.path, row.reason) for row, count in folded.items()]
        fused = sum(row.kernel != "torch" for row in self.rows)
        headers = ("module", "layers", "kernel", "path", "reason")
        return f"{tabulate(table, headers)}\n{self.total.format(fused, len(self.rows))}"


def _fused(layer: RunsLoRALinear) -> tuple[str, str, str]:
    other = layer.fallback()
    if other is not None:
        return "torch", "HF PEFT", other
    groups = calls(layer.branches())
    if not groups:
        if layer.merged:
            return "torch", "linear", f"{', '.join(layer.merged_adapters)} merged into the weight"
        reason = "adapters disabled" if layer.disabled else "no active adapter"
        small = _small(layer)
        return ("torch", "linear", reason) if small is None else _four_bits(small, reason)
    kernel, reason = _owner("lora_linear_fwd", layer.weight.device.type)
    base = "base"
    small = _small(layer)
    if small is not None:
        base = f"{small.quantised.quant_type} base"
        by, _ = _owner("nf4_linear_fwd", layer.weight.device.type)
        reason = "; ".join(filter(None, (reason, "" if by == kernel else f"the 4-bit weight by {by}")))
    else:
        lora_a, lora_b, _ = side_by_side(groups[0])
        past = general_because(layer.weight[:1], layer.weight, lora_a, lora_b, groups[0][0].dropout_p > 0)
        if past:
            kernel, reason = "triton" if native.HAS_TRITON else "reference", f"not by the Hopper kernels: {past}"
    path = " + ".join((base, *layer.active_adapters))
    if len(groups) == 1:
        return kernel, f"{path} in one call", reason
    extra = f"{len(groups)} calls: each adapter with dropout draws its own mask"
    return kernel, path, "; ".join(filter(None, (reason, extra)))


def _small(layer: RunsLoRALinear) -> NF4Base | None:
    """What holds the layer's 4-bit weight: itself, or what HF PEFT's wrapper is around."""
    base = getattr(layer, "base_layer", layer)
    return base if isinstance(base, NF4Base) and base.quantised is not None else None


def _four_bits(layer: NF4Base, why: str) -> tuple[str, str, str]:
    """For a layer over a 4-bit weight that runs without adapters."""
    kernel, reason = _owner("nf4_linear_fwd", layer.weight.device.type)
    return kernel, f"{layer.quantised.quant_type} linear", "; ".join(filter(None, (reason, why)))


def _owner(op: str, device: str) -> tuple[str, str]:
    """(who owns the op on this type of device, why not a compiled kernel)."""
    kernel = OWNERS.get((op, {"cpu": "CPU", "cuda": "CUDA"}.get(device)), "reference")
    return kernel, "" if kernel != "reference" else f"no compiled kernel for {device}"


def _bias_row(adapter: BiasAdapter, name: str, layer: nn.Module) -> Row:
    """For a layer that owns trained biases."""
    path = type(layer).__name__
    if adapter.merged or adapter.withdrawn:
        return Row(name, "torch", path, "merged into the model" if adapter.merged else "adapter disabled")
    if isinstance(layer, NF4Linear):
        return Row(name, *_four_bits(layer, "the gradient of its bias by torch"))
    if name not in adapter.classes:
        return Row(name, "torch", path, adapter.reasons.get(name, ""))
    return _ours(name, layer, adapter.reasons.get(name))


def _ours(name: str, layer: nn.Module, apart: str | None = None) -> Row:
    """For a layer whose class is ours, and not LoRA's. apart: why the activation behind it stays Torch's."""
    activation = getattr(layer, "activation", None)
    if replaced_forward(layer, type(layer)):
        return Row(name, "torch", type(layer).__name__, "its forward was replaced")
    if not is_norm(layer) and layer.bias is None:
        return Row(name, "torch", "linear", "no bias to make a gradient of")
    op = "norm_bwd" if is_norm(layer) else "act_bwd" if activation else "bias_grad"
    path = "norm" if is_norm(layer) else f"act_bwd {activation} + bias" if activation else "bias_grad"
    kernel, reason = _owner(op, next(layer.parameters(recurse=False)).device.type)
    return Row(name, kernel, path, "; ".join(filter(None, (reason, apart))))


def _biases(model: nn.Module, adapter: BiasAdapter, prefix: str = "") -> list[Row]:
    """prefix: the model's own name in what it is a part of, with a dot behind it."""
    rows = [_bias_row(adapter, name, model.get_submodule(name)) for name in adapter.owners]
    return [row._replace(module=prefix + row.module) for row in rows]


def _left_out(model: nn.Module, name: str, module: nn.Module, bypassed: dict[int, str]) -> str:
    reason = bypassed.get(id(module)) or base_refusal(module)
    if reason is not None:
        return reason
    present = configs(model).values()
    if any(is_all_linear(config) and module is output_head(model, config.task_type) for config in present):
        return "output head, which all-linear leaves out"
    if any(is_excluded(config, name) for config in present):
        return "excluded by exclude_modules"
    adapted = any(isinstance(other, RunsLoRALinear) or is_peft_layer(other) for other in model.modules())
    return "not targeted" if adapted else "no adapter injected"


def _by_hand(model: nn.Module, name: str, layer: nn.Module, bypassed: dict[int, str]) -> Row:
    """For a layer of ours that no method put in; where there are adapters, with the reason that it has none."""
    if id(layer) in bypassed:
        return Row(name, "torch", "linear", bypassed[id(layer)])
    if is_norm(layer):
        return _ours(name, layer)
    row = _ours(name, layer)
    if layer.activation is None and layer.bias is not None and not layer.bias.requires_grad:
        row = Row(name, "torch", "linear", "its bias is frozen")
    apart = f"no adapter: {_left_out(model, name, layer, bypassed)}" if configs(model) else ""
    return row._replace(reason="; ".join(filter(None, (row.reason, apart))))


def coverage(model: nn.Module) -> Coverage:
    """One row per linear layer of the model: the kernel that runs it now (it depends on train / eval), or why none.

    Of a model with BitFit, or a part that has it: one row per layer that owns a bias which trains, with the kernel of
    its backward. Layers of ours with parameters that were put in by hand have such a row too.
    """
    model = uncompiled(model)
    biases = bias_adapter(model)
    if biases is not None:
        return Coverage(_biases(model, biases), "{} of {} layers with biases that train run our kernels")
    rows, others, primitives, bypassed = [], [], set(), read_by_parents(model)
    parts = [part for part in model.modules() if bias_adapter(part) is not None]
    seen = {id(module) for part in parts for module in part.modules() if module is not part}
    for name, module in walk(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        biases = bias_adapter(module)
        if biases is not None or is_bias_linear(module) or (is_norm(module) and module.weight is not None):
            found = [_by_hand(model, name, module, bypassed)] if biases is None else _biases(module, biases, f"{name}.")
            rows += found
            others += found
        elif isinstance(module, RunsLoRALinear):
            rows.append(Row(name, *_fused(module)))
            primitives.add("lora_linear" if _small(module) is None else "qlora_linear")
        elif isinstance(module, NF4Linear):
            why = f"no adapter: {_left_out(model, name, module, bypassed)}" if configs(model) else ""
            rows.append(Row(name, *_four_bits(module, why)))
            others.append(rows[-1])
        elif is_peft_layer(module):
            rows.append(Row(name, "torch", "HF PEFT", f"HF PEFT's {type(module).__name__}, not accelerated"))
        elif isinstance(module, TrainableCopy) and is_linear(module.original):
            rows.append(Row(name, "torch", "linear", "trains whole (modules_to_save)"))
        elif is_linear(module):
            rows.append(Row(name, "torch", "linear", _left_out(model, name, module, bypassed)))
    if any(row.kernel != "torch" for row in others):
        return Coverage(rows, "{} of {} layers run our kernels")
    return Coverage(rows, "{} of {} linear layers run " + (" or ".join(sorted(primitives)) or "lora_linear"))
