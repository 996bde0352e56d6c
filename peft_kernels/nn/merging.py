"""The merged weight and bias of a layer with adapters: fp32 arithmetic, one rounding at the end."""

import torch
from torch import Tensor, nn


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
