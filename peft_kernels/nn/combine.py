"""Several active adapters as the arguments of one kernel call; autograd splits their gradients again."""

import torch
from torch import Tensor, nn


def side_by_side(layer: nn.Module, names: list[str]) -> tuple[Tensor, Tensor, float]:
    """lora_a [R, K], lora_b [N, R] and scaling for one call with adapters `names`.

    Several adapters concatenate their ranks, each scaling folded into its B, in fp32 (fp64 for fp64).
    """
    if len(names) == 1:
        return layer.lora_A[names[0]], layer.lora_B[names[0]], layer.scaling[names[0]]
    dtype = torch.float32
    for name in names:
        dtype = torch.promote_types(dtype, layer.lora_B[name].dtype)
    lora_a = torch.cat([layer.lora_A[name].to(dtype) for name in names])
    lora_b = torch.cat([layer.lora_B[name].to(dtype) * layer.scaling[name] for name in names], dim=1)
    return lora_a, lora_b, 1.0


def effective_bias(layer: nn.Module) -> Tensor | None:
    """bias + sum of scaling_i * lora_bias_i over the active adapters, [N], summed in fp32 (fp64 for fp64)."""
    total = layer.bias
    for name in layer.active_adapters:
        if name in layer.lora_bias:
            dtype = torch.promote_types(layer.lora_bias[name].dtype, torch.float32)
            term = layer.lora_bias[name].to(dtype) * layer.scaling[name]
            total = term if total is None else total.to(torch.promote_types(total.dtype, dtype)) + term
    return total
