"""coverage: which layer of a model runs which kernel, and the reason where none of ours runs."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tabulate import tabulate
from torch import nn

from .._core import native
from .._core.registry import OWNERS
from ..kernels.lora_linear.op import general_because
from ..nn.base_linear import is_linear, read_by_parents, refusal
from ..nn.combine import RunsLoRALinear, calls, side_by_side
from ..nn.trainable_copy import TrainableCopy
from .adapters import configs
from .targets import is_all_linear, is_excluded, is_peft_layer, output_head, walk


class Row(NamedTuple):
    """module: its name, with * for a number where rows are folded. kernel: who owns the op there, or "torch"."""

    module: str
    kernel: str
    path: str
    reason: str


class Coverage:
    """The rows of `coverage(model)`, one per linear layer; print it for a table with like rows folded."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

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
        return f"{tabulate(table, headers)}\n{fused} of {len(self.rows)} linear layers run lora_linear"


def _fused(layer: RunsLoRALinear) -> tuple[str, str, str]:
    other = layer.fallback()
    if other is not None:
        return "torch", "HF PEFT", other
    groups = calls(layer.branches())
    if not groups:
        if layer.merged:
            return "torch", "linear", f"{', '.join(layer.merged_adapters)} merged into the weight"
        return "torch", "linear", "adapters disabled" if layer.disabled else "no active adapter"
    device = layer.weight.device.type
    kernel = OWNERS.get(("lora_linear_fwd", {"cpu": "CPU", "cuda": "CUDA"}.get(device)), "reference")
    reason = "" if kernel != "reference" else f"no compiled kernel for {device}"
    lora_a, lora_b, _ = side_by_side(groups[0])
    past = general_because(layer.weight[:1], layer.weight, lora_a, lora_b, groups[0][0].dropout_p > 0)
    if past:
        kernel, reason = "triton" if native.HAS_TRITON else "reference", f"not by the Hopper kernels: {past}"
    names = layer.active_adapters
    if len(groups) == 1:
        return kernel, "base + " + " + ".join(names) + " in one call", reason
    extra = f"{len(groups)} calls: each adapter with dropout draws its own mask"
    return kernel, "base + " + " + ".join(names), "; ".join(filter(None, (reason, extra)))


def _left_out(model: nn.Module, name: str, module: nn.Module, bypassed: dict[int, str]) -> str:
    reason = bypassed.get(id(module)) or refusal(module)
    if reason is not None:
        return reason
    present = configs(model).values()
    if any(is_all_linear(config) and module is output_head(model, config.task_type) for config in present):
        return "output head, which all-linear leaves out"
    if any(is_excluded(config, name) for config in present):
        return "excluded by exclude_modules"
    adapted = any(isinstance(other, RunsLoRALinear) or is_peft_layer(other) for other in model.modules())
    return "not targeted" if adapted else "no adapter injected"


def coverage(model: nn.Module) -> Coverage:
    """One row per linear layer of the model: the kernel that runs it now (it depends on train / eval), or why none."""
    rows, seen, bypassed = [], set(), read_by_parents(model)
    for name, module in walk(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, RunsLoRALinear):
            rows.append(Row(name, *_fused(module)))
        elif is_peft_layer(module):
            rows.append(Row(name, "torch", "HF PEFT", f"HF PEFT's {type(module).__name__}, not accelerated"))
        elif isinstance(module, TrainableCopy) and is_linear(module.original):
            rows.append(Row(name, "torch", "linear", "trains whole (modules_to_save)"))
        elif is_linear(module):
            rows.append(Row(name, "torch", "linear", _left_out(model, name, module, bypassed)))
    return Coverage(rows)
