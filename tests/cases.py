"""Shapes, layouts and input generators of the LoRA linear's tests, and the implementations they run on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_kernels.kernels._shared import drop_levels
from peft_kernels.kernels.lora_linear import op, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RANKS = (1, 3, 8, 12, 16, 24, 64, 100, 128)
LAYOUTS = ("transposed", "rows", "columns", "expanded", "offset")


@dataclass(frozen=True)
class Implementation:
    """One way to compute the two ops. `fwd` and `bwd` take the ops' arguments."""

    name: str
    device: str
    fwd: Callable
    bwd: Callable


def implementations() -> list[Implementation]:
    """ "op" is whatever owns the device: a C++ or CUDA extension, Triton, or the reference again."""
    found = [
        Implementation("reference", "cpu", reference.lora_linear_fwd, reference.lora_linear_bwd),
        Implementation("op", "cpu", op.lora_linear_fwd, op.lora_linear_bwd),
    ]
    if torch.cuda.is_available():
        found += [replace(one, name=f"{one.name}[cuda]", device="cuda") for one in found]
        if op.triton_impl is not None:
            triton = op.triton_impl
            found.append(Implementation("triton[cuda]", "cuda", triton.lora_linear_fwd, triton.lora_linear_bwd))
    return found


@dataclass(frozen=True)
class Case:
    """What to generate; `inputs(case, device)` generates it, the same for every implementation."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = torch.float32
    adapters: torch.dtype | None = None  # None: dtype
    bias: torch.dtype | None | str = "same"  # "same": dtype; None: no bias
    weight: str | None = "contiguous"  # a layout; None: no base product
    layout: str = "contiguous"  # of x and dy
    dropout: float = 0.0
    scaling: float = 2.0
    positive: bool = False  # all values of one sign: long sums grow instead of cancelling

    def __str__(self) -> str:
        words = ["x".join(map(str, (self.M, self.N, self.K))), f"r{self.R}", str(self.dtype).removeprefix("torch.")]
        if self.adapters is not None:
            words.append("adapters-" + str(self.adapters).removeprefix("torch."))
        if self.bias != "same":
            words.append("bias-" + str(self.bias).removeprefix("torch."))
        if self.weight != "contiguous":
            words.append(f"weight-{self.weight}")
        if self.layout != "contiguous":
            words.append(self.layout)
        if self.dropout:
            words.append(f"drop{self.dropout}")
        if self.scaling != 2.0:
            words.append(f"scale{self.scaling:g}")
        return "-".join(words + ["positive"] * self.positive)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    seed: Tensor | None
    scaling: float  # 1 / (1 - p) included, as the ops take it
    threshold: int
    dy: Tensor

    @property
    def mask(self) -> Tensor:
        """The mask of the dropout contract, from the reference."""
        if self.seed is None:
            return self.x.new_empty(0, dtype=torch.uint8)
        return reference.dropout_mask(self.seed, *self.x.shape, self.threshold)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same [rows, columns] values (for "expanded": its first row, repeated) in memory of another kind."""
    rows, columns = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "expanded":
        return tensor[:1].expand(rows, columns) if rows else tensor
    # What lies between the elements is NaN: a kernel that reads it is found out.
    if layout == "rows":
        view = tensor.new_full((rows, columns + 5), torch.nan)[:, 2 : columns + 2]
    elif layout == "columns":
        view = tensor.new_full((rows, 2 * columns), torch.nan)[:, ::2]
    else:  # "offset": contiguous, one element past any alignment
        view = tensor.new_full((rows * columns + 1,), torch.nan)[1:].view(rows, columns)
    return view.copy_(tensor)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs of order 1 outputs: dy of order 1, lora_b not zero."""
    generator = torch.Generator().manual_seed(seed)
    adapters = case.adapters or case.dtype
    bias_dtype = case.dtype if case.bias == "same" else case.bias

    def draw(shape: tuple, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = values.abs() + 0.5 if case.positive else values
        return (values * size).to(dtype).to(device)

    M, N, K, R = case.M, case.N, case.K, case.R
    # One sign: terms of 1 / length, so that the sums over K and over M are of order 1 and fp16 does not overflow.
    row = 1 / K if case.positive else K**-0.5
    dy_size = 1 / max(M, N) if case.positive else 1.0
    threshold = drop_levels.drop_threshold(case.dropout)
    weight = draw((N, K), case.dtype, row)
    return Inputs(
        x=lay_out(draw((M, K), case.dtype), case.layout),
        weight=None if case.weight is None else lay_out(weight, case.weight),
        lora_a=draw((R, K), adapters, row),
        lora_b=draw((N, R), adapters, 1 / R if case.positive else R**-0.5),
        bias=None if bias_dtype is None else draw((N,), bias_dtype),
        seed=torch.tensor([seed * 7919 + 20], device=device) if threshold else None,
        scaling=drop_levels.effective_scaling(case.scaling, threshold),
        threshold=threshold,
        dy=lay_out(draw((M, N), case.dtype, dy_size), case.layout),
    )


def _sizes(dtype: torch.dtype) -> list[Case]:
    odd = [Case(37, 53, 71, R, dtype) for R in RANKS]
    shapes = [(0, 5, 7, 2), (1, 65, 129, 3), (2, 1, 1, 1), (130, 257, 193, 16), (67, 300, 515, 5), (64, 128, 256, 32)]
    return odd + [Case(*shape, dtype) for shape in shapes]


def _features(dtype: torch.dtype) -> list[Case]:
    plain = Case(37, 53, 71, 12, dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    found = [replace(plain, layout=layout) for layout in LAYOUTS]
    found += [replace(plain, weight=layout) for layout in (None, "transposed", "rows", "offset")]
    found += [replace(plain, weight=None, bias=None), replace(plain, bias=None), replace(plain, bias=torch.float32)]
    found += [replace(plain, adapters=other), replace(plain, adapters=other, dropout=0.5, bias=other)]
    found += [replace(plain, scaling=scaling) for scaling in (0.0, 1 / 3, -16.0)]
    found += [replace(plain, dropout=p) for p in (0.1, 0.5, 1.0)]
    found += [replace(plain, dropout=0.1, layout=layout) for layout in ("transposed", "rows")]
    found += [replace(plain, dropout=0.1, weight=None), Case(130, 257, 193, 64, dtype, dropout=0.5, adapters=other)]
    return found


VALUE_CASES = [case for dtype in DTYPES for case in _sizes(dtype) + _features(dtype)]
"""What every implementation must get right."""


def _aligned(dtype: torch.dtype) -> list[Case]:
    """Rows that start on 16 bytes, as TMA and vector loads need: tails of every tile, several tiles, every feature."""
    wide = [Case(1, 8, 8, 8, dtype), Case(130, 264, 136, 8, dtype), Case(2100, 512, 264, 16, dtype)]
    ranks = [Case(67, 520, 1032, R, dtype, bias=None) for R in (24, 40, 64, 72, 128, 136)]
    adapters = replace(wide[1], adapters=torch.float32)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    found = [*wide, *ranks, adapters, replace(wide[1], adapters=other), replace(wide[1], bias=torch.float32)]
    found += [replace(wide[1], R=16, weight=layout) for layout in (None, "transposed", "rows")]
    found += [replace(case, dropout=0.1) for case in (*wide, adapters)]
    found += [replace(case, K=1024, dropout=0.1) for case in (*wide, *ranks, adapters)]
    found += [replace(wide[1], K=128, dropout=p) for p in (0.5, 1.0)]
    found += [replace(wide[2], scaling=scaling) for scaling in (1.0, 0.0, -1 / 3)]
    found += [replace(wide[1], M=2048, layout=layout) for layout in ("rows", "offset")]
    return found + [replace(wide[1], layout="expanded")]


ALIGNED_CASES = [case for dtype in (torch.bfloat16, torch.float16) for case in _aligned(dtype)]
"""What the Hopper kernels take, and its neighbours that they must hand on."""

LONG_SUMS = [
    Case(*shape, 3, dtype, positive=True)
    for shape in ((100_000, 5, 9), (3, 5, 100_000), (2, 20_000, 7))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
"""Sums over M, K and N of one sign: too narrow an accumulator stops growing. Not fp64: the truth is no better."""
