"""A linear with the adapters that are active on it, in as few kernel calls as their dropout allows."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.nf4 import NF4Weight
from ..kernels.lora_linear.autograd import lora_linear
from ..kernels.qlora_linear.autograd import qlora_linear


class Branch(NamedTuple):
    """One active adapter: lora_a [R, K], lora_b [N, R], its bias [N] or None; dropout_p is 0 outside training."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None
    dropout_p: float


class RunsLoRALinear:
    """What `coverage` asks of a layer that runs its base linear and adapters through `adapted_linear`.

    Beside these: attributes `weight`, `active_adapters`, `merged_adapters` and `disabled`.
    """

    def branches(self) -> list[Branch]:
        """What the active adapters bring to the next forward; empty where only the base layer runs."""
        raise NotImplementedError

    def fallback(self) -> str | None:
        """Why the next forward takes another path than ours, None when it does not."""
        return None


def calls(branches: list[Branch]) -> list[list[Branch]]:
    """The branches by kernel call: those that drop nothing share one, each other one needs a mask of its own."""
    together = [branch for branch in branches if branch.dropout_p == 0.0]
    return ([together] if together else []) + [[branch] for branch in branches if branch.dropout_p > 0.0]


def side_by_side(branches: list[Branch]) -> tuple[Tensor, Tensor, float]:
    """lora_a [R, K], lora_b [N, R] and scaling of one call.

    Several adapters concatenate their ranks, each scaling folded into its B, in fp32 (fp64 for fp64). Autograd splits
    the gradients again.
    """
    if len(branches) == 1:
        return branches[0].lora_a, branches[0].lora_b, branches[0].scaling
    dtype = torch.float32
    for branch in branches:
        dtype = torch.promote_types(dtype, branch.lora_b.dtype)
    lora_a = torch.cat([branch.lora_a.to(dtype) for branch in branches])
    lora_b = torch.cat([branch.lora_b.to(dtype) * branch.scaling for branch in branches], dim=1)
    return lora_a, lora_b, 1.0


def _effective_bias(bias: Tensor | None, branches: list[Branch]) -> Tensor | None:
    """bias + sum of scaling_i * bias_i, [N], summed in fp32 (fp64 for fp64)."""
    for branch in branches:
        if branch.bias is not None:
            dtype = torch.promote_types(branch.bias.dtype, torch.float32)
            term = branch.bias.to(dtype) * branch.scaling
            bias = term if bias is None else bias.to(torch.promote_types(bias.dtype, dtype)) + term
    return bias


def adapted_linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, branches: list[Branch]) -> Tensor:
    """x [..., K] -> [..., N]: the base linear with every branch added; at least one branch. The base runs once."""
    first, *rest = calls(branches)
    linear = qlora_linear if isinstance(weight, NF4Weight) else lora_linear
    y = linear(x, weight, *side_by_side(first), _effective_bias(bias, branches), first[0].dropout_p)
    for call in rest:
        y = y + lora_linear(x, None, *side_by_side(call), None, call[0].dropout_p)
    return y
