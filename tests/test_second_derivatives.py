"""Second derivatives: right or refused, never missing, whatever trains and however constant the gradient of y is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from act_checks import ACTIVATIONS
from test_bias_act_autograd import TORCHS
from torch import Tensor
from torch.autograd import grad

import peft_kernels as pk

M, N, K, R = 3, 4, 64, 2
SHAPES = {
    "x": (M, K),
    "residual": (M, K),
    "weight": (N, K),
    "scale": (K,),
    "shift": (K,),
    "lora_a": (R, K),
    "lora_b": (N, R),
    "bias": (N,),
}


def whole(*shape: int, device: str = "cpu") -> Tensor:
    """Small whole numbers: sums of their products are exact in any order."""
    return torch.randint(-3, 4, shape, device=device).double()


def lora(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + 2.0 * F.linear(F.linear(x, lora_a), lora_b)


def residual_norm(norm: Callable) -> Callable:
    return lambda x, residual, *rows: norm(x + residual, (K,), *rows)


@dataclass(frozen=True)
class Public:
    """A function of the named leaves, and what Torch has for it; `base` gives the first a frozen 4-bit weight."""

    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    names: tuple[str, ...]
    base: bool = False


LORA = ("lora_a", "lora_b", "bias")
PUBLIC = {
    "lora_linear": Public(lambda x, w, a, b, bias: pk.lora_linear(x, w, a, b, 2.0, bias), lora, ("x", "weight", *LORA)),
    "qlora_linear": Public(
        lambda base, x, a, b, bias: pk.qlora_linear(x, base, a, b, 2.0, bias),
        lambda base, x, *branch: lora(x, pk.nf4_dequantize(base, torch.float64), *branch),
        ("x", *LORA),
        base=True,
    ),
    "layer_norm": Public(
        lambda x, r, w, b: pk.layer_norm(x, w, b, residual=r)[0],
        residual_norm(F.layer_norm),
        ("x", "residual", "scale", "shift"),
    ),
    "rms_norm": Public(
        lambda x, r, w: pk.rms_norm(x, w, residual=r)[0], residual_norm(F.rms_norm), ("x", "residual", "scale")
    ),
    **{
        f"bias_linear {name}": Public(
            partial(pk.bias_linear, activation=name),
            lambda x, w, b, torchs=TORCHS[name]: torchs(F.linear(x, w, b)),
            ("x", "weight", "bias"),
        )
        for name in ACTIVATIONS
    },
}


def mixed(function: Callable, leaves: list[Tensor], along: list[Tensor]) -> dict[tuple[int, int], Tensor | str | None]:
    """(i, j) -> the j-th leaf's gradient of the i-th one's, of the sum of y; None where there is none, or its error."""
    needed = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    wanted = [leaves[i] for i in needed]
    firsts = grad(function(*leaves).sum(), wanted, create_graph=True, allow_unused=True)
    found = dict.fromkeys((i, j) for i in needed for j in needed)
    for i, first in zip(needed, firsts, strict=True):
        for j in needed if first is not None and first.requires_grad else ():
            try:
                (found[i, j],) = grad(first, leaves[j], along[i], allow_unused=True, retain_graph=True)
            except RuntimeError as error:
                found[i, j] = str(error)
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_are_right_or_refused(device, name):
    public, there = PUBLIC[name], 0
    base = (pk.nf4_quantize(whole(N, K, device=device).float(), double_quant=True),) if public.base else ()
    values, along = ([whole(*SHAPES[leaf], device=device) for leaf in public.names] for _ in range(2))
    for trains in (which for n in range(1, len(values) + 1) for which in combinations(range(len(values)), n)):
        leaves = [value.clone().requires_grad_(i in trains) for i, value in enumerate(values)]
        found = mixed(partial(public.ours, *base), leaves, along)
        for pair, truth in mixed(partial(public.torchs, *base), leaves, along).items():
            if truth is None or not truth.any():
                continue
            there += 1
            refused = isinstance(found[pair], str) and f"{name.split()[0]} has no second derivative" in found[pair]
            right = isinstance(found[pair], Tensor) and torch.equal(found[pair], truth)
            names = [public.names[i] for i in pair]
            assert refused or right, f"{[public.names[i] for i in trains]} train, {names}: {found[pair]}"
    assert there, "Torch has none either"
