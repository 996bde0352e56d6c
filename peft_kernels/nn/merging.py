"""Merging adapters into the base weight and back, and what a merged layer writes to and reads from a state_dict."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .adapter import name_list
from .nf4_base import NF4Base

INTO_4_BITS = (
    "cannot merge into a 4-bit weight: quantised anew, it would be another function than the one that was trained. "
    "Dequantise the base first (dequantize_base of a layer, peft_kernels.dequantize of a model)"
)


def _checked(merged: Tensor, what: str, names: list[str]) -> None:
    if not torch.isfinite(merged).all():
        raise ValueError(f"the {what} merged with adapters {names} is not finite: nothing was changed")


def unmerged_bias(layer: nn.Module) -> Tensor | None:
    """The base bias as it is without adapters, also while some are merged.

    Raises:
        RuntimeError: a lora_bias was merged with restorable=False.
    """
    if not any(name in layer.lora_bias for name in layer.merged_adapters):
        return layer.bias
    if layer._base_copy is None:
        raise RuntimeError("a lora_bias was merged with restorable=False: the base bias was not kept")
    return layer._base_copy[1]


def merged_tensors(layer: nn.Module, names: list[str], safe_merge: bool) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of `layer` with adapters `names` added, in their own dtypes; bias None when it does not change.

    weight + sum of scaling_i * B_i @ A_i and bias + sum of scaling_i * lora_bias_i.
    """
    biased = [name for name in names if name in layer.lora_bias]
    if biased and layer.bias is None:
        raise RuntimeError(f"cannot merge adapters {biased}: they have a lora_bias and the base layer has no bias")
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    weight = layer.weight.detach().to(dtype, copy=True)
    for name in names:
        delta = (layer.lora_B[name].to(dtype) @ layer.lora_A[name].to(dtype)) * layer.scaling[name]
        weight += delta.t() if layer.fan_in_fan_out else delta
    weight = weight.to(layer.weight.dtype)
    bias = None
    if biased:
        bias = layer.bias.detach().to(dtype, copy=True)
        for name in biased:
            bias += layer.lora_bias[name].to(dtype) * layer.scaling[name]
        bias = bias.to(layer.bias.dtype)
    if safe_merge:
        _checked(weight, "weight", names)
        if bias is not None:
            _checked(bias, "bias", names)
    return weight, bias


class Mergeable(NF4Base):
    """A layer whose adapters can be merged into its weight and bias, and taken out again.

    A state_dict is always that of the layer without merging: the base weight and bias beside the adapters.
    """

    def __init__(self):
        super().__init__()
        self.merged_adapters: list[str] = []
        self._base_copy: tuple[Tensor, Tensor | None] | None = None

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def restorable(self) -> bool:
        """Whether adapters are merged and `unmerge` can take them out again."""
        return self.merged and self._base_copy is not None

    def _refuse_merged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(f"cannot {what}: adapters {self.merged_adapters} are merged, unmerge first")

    @torch.no_grad()
    def merge(
        self, adapter_names: str | list[str] | None = None, safe_merge: bool = False, restorable: bool = True
    ) -> None:
        """Add the adapters (default: the active ones) into weight and bias, in fp32 and rounded once (fp64 for fp64).

        The Parameters are written in place, so every holder of them (the wrapped nn.Linear, a tied embedding) sees and
        saves the merged weight; `peft_kernels.merge(model)` refuses tied weights. To give the weight back bit for bit,
        `unmerge` needs the original: restorable=True keeps it in host memory, weight.nbytes + bias.nbytes per layer.

        `state_dict()` holds the base weight and bias all the while, so that adapters count once wherever it is loaded:
        the very tensors kept here, in host memory and at no further cost. With restorable=False it raises until the
        merged adapters are deleted, which makes the merged weight the base weight. `parameters()` are merged.

        Raises:
            RuntimeError: already merged; a 4-bit base weight; or lora_bias to merge and no base bias.
            ValueError: an adapter unknown or named twice; or, with safe_merge, a merged value that is not finite.
        """
        names = self.active_adapters if adapter_names is None else name_list(adapter_names)
        self._require(names)
        self._refuse_merged("merge")
        if not names:
            return
        if self.quantised is not None:
            raise RuntimeError(INTO_4_BITS)
        weight, bias = merged_tensors(self, names, safe_merge)
        if restorable:
            old_bias = None if bias is None else self.bias.detach().to("cpu", copy=True)
            self._base_copy = self.weight.detach().to("cpu", copy=True), old_bias
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)
        self.merged_adapters = names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give back the base weight and bias as they were before `merge`, bit for bit.

        Raises:
            RuntimeError: nothing is merged, or it was merged with restorable=False.
        """
        if not self.merged:
            raise RuntimeError("cannot unmerge: no adapter is merged")
        if self._base_copy is None:
            raise RuntimeError("cannot unmerge: merged with restorable=False, the base weight was not kept")
        weight, bias = self._base_copy
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)
        self._base_copy, self.merged_adapters = None, []

    def forget_base(self) -> None:
        """Free the copy of the base weight that `merge` kept; `unmerge` is no longer possible."""
        self._base_copy = None

    def _merged_tensors(self) -> list[str]:
        """Which of weight and bias hold merged values."""
        return ["weight", "bias"] if any(name in self.lora_bias for name in self.merged_adapters) else ["weight"]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """The base weight and bias, as `unmerge` would give them back, under the names of the merged ones.

        Raises:
            RuntimeError: merged with restorable=False.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._base_copy is None:
            raise RuntimeError(
                f"cannot make a state_dict: in {prefix}weight adapters {self.merged_adapters} are merged with "
                "restorable=False, the base weight was not kept, and beside the adapters the merged one would count "
                "them twice when it is loaded. Delete the merged adapters (delete_adapter) to save the merged weight"
            )
        for name, base in zip(self._merged_tensors(), self._base_copy, strict=False):
            destination[prefix + name] = base.to(getattr(self, name).dtype)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Unmerge first where there is something to load; a layer that cannot must get all that was merged.

        Raises:
            RuntimeError: merged with restorable=False, and the dict does not replace the merged weight (and bias).
        """
        if not self.merged:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        # What the dict holds is known when the hooks have run: they may rename keys. Each runs once.
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            for hook in hooks.values():
                hook(state_dict, prefix, *args)
            if any(key.startswith(prefix) for key in state_dict):
                self._make_way(state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._load_state_dict_pre_hooks = hooks

    def _make_way(self, state_dict: dict, prefix: str) -> None:
        if self.restorable:
            return self.unmerge()
        self._expect_replacement(state_dict, prefix)
        self.merged_adapters = []

    def _expect_replacement(self, state_dict: dict, prefix: str) -> None:
        for name in self._merged_tensors():
            new = state_dict.get(prefix + name)
            if getattr(new, "shape", None) != getattr(self, name).shape:
                raise RuntimeError(
                    f"cannot load: adapters {self.merged_adapters} are merged with restorable=False into {prefix}{name}"
                    f", which the state_dict must replace with shape {list(getattr(self, name).shape)}; it has "
                    f"{'no such key' if new is None else f'shape {list(new.shape)}'}"
                )
