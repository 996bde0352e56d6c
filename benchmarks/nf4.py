"""Quantising to 4 bits and back: passes over the same bytes as the floor, ours, and bitsandbytes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core.registry import OWNERS
from peft_kernels.formats import nf4_values
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.nf4 import configs

from .bias_grad import read
from .bitsandbytes_layers import quant_state
from .environment import version
from .measure import PARTS, Contender, input_sets

_OURS = "peft_kernels"
_BLOCKSIZE = 64


@dataclass(frozen=True)
class NF4Case:
    """A weight [M, K] in NF4, blocksize 64, to or from `dtype`; nested: with double quantisation."""

    M: int
    K: int
    dtype: torch.dtype
    op: str = "dequantize"
    nested: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"M={self.M} K={self.K} op={self.op}" + self.nested * " nested=1"

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[:1]

    @property
    def set_bytes(self) -> int:
        return _bytes(self.M * self.K, self.op, self.nested, self.dtype)


def _cases(*sizes: tuple[int, int], dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> list[NF4Case]:
    kinds = [(op, nested) for op in ("dequantize", "quantize") for nested in (False, True)]
    return [NF4Case(*size, dtype, *kind) for dtype in dtypes for size in sizes for kind in kinds]


_BOTH = torch.float32, torch.bfloat16
SUITES = {
    "gpu": _cases((4096, 4096), (14336, 4096)),
    "tiny": _cases((33, 128), dtypes=_BOTH),
    "cpu": _cases((64, 4096), (4096, 4096), dtypes=_BOTH),
    "speed": _cases((512, 512)),
}


@dataclass(frozen=True)
class Inputs:
    """A weight [M, K], the same in 4 bits, and bitsandbytes' record of that, None without it."""

    weight: Tensor
    quantised: NF4Weight
    state: object = None


Run = Callable[[Inputs], object]


def _bytes(numel: int, op: str, nested: bool, dtype: torch.dtype) -> int:
    if op == "dequantize":
        return configs.dequantize_floor_bytes(numel, _BLOCKSIZE, nested, dtype)
    once = configs.quantize_floor_bytes(numel, _BLOCKSIZE, dtype)
    return once + nested * configs.scales_floor_bytes(-(-numel // _BLOCKSIZE))


def of_layers(layers: Iterable[tuple[int, int]], M: int, R: int, dtype: torch.dtype, dropout: float) -> list[NF4Case]:
    """The weights of a model's linear layers, each given as its (in, out) features, as QLoRA reads them."""
    return [NF4Case(N, K, dtype, nested=True) for K, N in dict.fromkeys(layers)]


def work(sizes: dict[str, float], dtype: str, floor: bool) -> tuple[float, float]:
    """Bytes that must move, and the multiplications."""
    numel, nested = int(sizes["M"] * sizes["K"]), bool(sizes.get("nested", 0))
    return _bytes(numel, str(sizes["op"]), nested, getattr(torch, dtype)), numel


def passes(case: NF4Case) -> Run:
    """Everything that comes in read once, everything that goes out written once, by PyTorch's fastest for each."""
    numel = case.M * case.K
    if case.op == "dequantize":
        return lambda one: (
            read(one.quantised.packed),
            read(one.quantised.absmax),
            torch.empty(numel, dtype=case.dtype, device=one.weight.device).fill_(1),
        )
    return lambda one: (
        read(one.weight),
        torch.empty(-(-numel // 2), dtype=torch.uint8, device=one.weight.device).fill_(1),
    )


def ours(case: NF4Case) -> Run:
    if case.op == "dequantize":
        return lambda one: pk.nf4_dequantize(one.quantised, case.dtype)
    return lambda one: pk.nf4_quantize(one.weight, "nf4", _BLOCKSIZE, case.nested)


def theirs(case: NF4Case) -> Run:
    import bitsandbytes.functional as F  # a peer: only here when it is installed

    if case.op == "dequantize":
        return lambda one: F.dequantize_4bit(one.quantised.packed.view(-1, 1), one.state)
    return lambda one: F.quantize_4bit(
        one.weight, blocksize=_BLOCKSIZE, quant_type="nf4", compress_statistics=case.nested
    )


def value_errors(case: NF4Case, one: Inputs, run: Run, peer: bool) -> dict[str, float]:
    """0 where every bit is the reference's, else infinite. A peer's values may be one unit in the last place away, its
    codes differ by one, at thresholds: in one of 10,000 elements."""
    found = run(one)
    if case.op == "dequantize":
        args = *one.quantised.tensors(), "nf4", _BLOCKSIZE, one.weight.numel(), case.dtype
        truth = nf4_values.dequantize(*args).view(case.M, case.K)
        if peer:
            unit = torch.finfo(case.dtype).eps * truth.double().abs() + torch.finfo(case.dtype).smallest_normal
            return {"values": float(((found.double() - truth.double()).abs() / unit).max())}
        return {"values": 0.0 if torch.equal(found, truth) else math.inf}
    packed = (found[0] if peer else found.packed).flatten()
    truth, _ = nf4_values.encode(one.weight, "nf4", _BLOCKSIZE)
    if peer:
        return {"bytes": float((packed != truth).double().mean()) * 10_000}
    same = torch.equal(packed, truth)
    if case.nested:
        scales = nf4_values.encode_scales(nf4_values.encode(one.weight, "nf4", _BLOCKSIZE)[1], found.nested_code)
        same &= all(torch.equal(*pair) for pair in zip((found.absmax, found.nested_absmax), scales[:2], strict=True))
    return {"bytes": 0.0 if same else math.inf}


def contenders(case: NF4Case, device: str, seed: int = 0) -> list[Contender]:
    """Every contender of the case, bound to rotating input sets that all of them share, drawn from `seed` on."""
    sets, there = [], version("bitsandbytes") != "none"
    for i in range(input_sets(case.set_bytes, device)):
        generator = torch.Generator(device).manual_seed(seed + i)
        weight = torch.randn(case.M, case.K, generator=generator, device=device).to(case.dtype)
        quantised = pk.nf4_quantize(weight, "nf4", _BLOCKSIZE, case.nested)
        sets.append(Inputs(weight, quantised, quant_state(quantised) if there else None))
    owner = OWNERS[f"nf4_{case.op}", device.upper()]
    field: list[tuple[str, str, str, Callable[[NF4Case], Run]]] = [
        ("read and fill", "floor", f"torch {torch.__version__}", passes),
        (_OURS, "ours", owner, ours),
        ("bitsandbytes", "peer", f"bitsandbytes {version('bitsandbytes')}", theirs),
    ]
    found = []
    for name, role, implementation, build in field:
        contender = Contender(name, role, sets=len(sets), implementation=implementation)
        contender.rival = _OURS if role == "peer" else ""
        found.append(contender)
        if build is theirs and not there:
            contender.missing = "not installed: pip install bitsandbytes"
            continue
        run = build(case)
        contender.step = lambda i, run=run: run(sets[i % len(sets)])
        if role != "floor":
            contender.check = lambda run=run, peer=role == "peer": value_errors(case, sets[0], run, peer)
    return found
