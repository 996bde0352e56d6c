"""Which tensor of a checkpoint goes where in a model that is read into 4 bits, checked before a weight is read."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..formats.nf4_state import STATE, from_state
from ..methods.quantise import quantisable, skipped
from ..nn.base_linear import conv1d_class, is_linear, refusal
from .bitsandbytes import check_shape
from .tensor_files import TensorFiles

_PART = re.compile(r"(.*)\.weight(\..*)?")


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """[N, K] of an nn.Linear or Conv1D."""
    return tuple(module.weight.shape if conv1d_class(module) is None else reversed(module.weight.shape))


class CheckpointPlan:
    """small: layers that the files have in 4 bits; dense: those to quantise; by name.

    Raises:
        ValueError: keys, shapes or texts that do not fit the model.
    """

    def __init__(self, model: nn.Module, files: TensorFiles, skip: Iterable[str] | None, dtype: torch.dtype | None):
        self.files, self.dtype = files, dtype
        self.modules = dict(model.named_modules())
        self.parts: dict[str, dict[str, str]] = {}
        for key in files:
            match = _PART.fullmatch(key)
            if match:
                self.parts.setdefault(match[1], {})[match[2] or ""] = key
        names = [name for name, parts in self.parts.items() if any(part.startswith(STATE) for part in parts)]
        self.small = {name: self._target(name) for name in names}
        # A checkpoint that is in 4 bits is taken as it is.
        self.dense = {} if names else quantisable(model, skipped(model, skip))
        self.expected = model.state_dict(keep_vars=True)
        for name in names:
            self._check_small(name)
            weight = self.expected[f"{name}.weight"]  # a layer may stand under several names
            self.expected = {key: tensor for key, tensor in self.expected.items() if tensor is not weight}
        self.tied = self._check_keys(model, {key for name in names for key in self.parts[name].values()})

    def _target(self, name: str) -> nn.Module:
        module = self.modules.get(name)
        if module is None or not is_linear(module):
            kind = "no such module" if module is None else type(module).__name__
            raise ValueError(
                f"the checkpoint has {name}.weight in 4 bits, {name} is {kind}; expected nn.Linear or Conv1D"
            )
        reason = refusal(module)
        if reason is not None:
            raise ValueError(f"{name} cannot be in 4 bits: {reason}")
        return module

    def _check_small(self, name: str) -> None:
        """By the texts and maps, which are read, and the shapes of all else."""
        state = {
            part: self.files.read(key).cpu() if part.startswith(".quant_") else self.files.described(key)
            for part, key in self.parts[name].items()
        }
        shape = matrix_shape(self.small[name])
        check_shape(name, from_state(f"{name}.weight", state, shape), shape)

    def _check_keys(self, model: nn.Module, small: set[str]) -> list[str]:
        """All problems in one message; returns the keys that may be missing, as other names have their tensors."""
        there = {id(tensor) for key, tensor in self.expected.items() if key in self.files}
        missing = [key for key in self.expected if key not in self.files]
        ties = getattr(model, "all_tied_weights_keys", None) or ()
        tied = [key for key in missing if id(self.expected[key]) in there or key in ties]
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        extra = [key for key in self.files if key not in small and key not in self.expected]
        problems = [f"missing key {key}" for key in missing if key not in tied]
        problems += [f"unexpected key {key}" for key in extra if not any(re.search(p, key) for p in ignored)]
        for key, tensor in self.expected.items():
            if key in self.files:
                problems += self._problem(key, tensor)
        for name, buffer in model.named_buffers():
            if buffer.is_meta and name not in self.expected:
                problems.append(
                    f"buffer {name} is on the meta device and in no checkpoint: build the model in accelerate's "
                    "init_empty_weights, where buffers are real"
                )
        if problems:
            more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise ValueError(f"the checkpoint does not fit, nothing was loaded: {'; '.join(problems[:20])}{more}")
        return tied

    def _problem(self, key: str, tensor: Tensor) -> list[str]:
        found = self.files.described(key)
        if found.shape != tensor.shape:
            return [f"{key} has shape {list(found.shape)}, expected {list(tensor.shape)}"]
        if found.is_floating_point() != tensor.is_floating_point():
            return [f"{key} is {found.dtype}, expected {tensor.dtype}"]
        return []

    def read(self, key: str) -> Tensor:
        tensor = self.files.read(key)
        return tensor if self.dtype is None or not tensor.is_floating_point() else tensor.to(self.dtype)

    def state(self, name: str) -> dict[str, Tensor]:
        """What is stored of a 4-bit weight: behind its name -> tensor."""
        return {part: self.files.read(key) for part, key in self.parts[name].items()}
