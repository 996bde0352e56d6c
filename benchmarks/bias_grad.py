"""The bias gradient's contenders: one read of dy as the floor, ours, and how PyTorch sums columns."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.bias_grad import configs, op

from .derived_bounds import bounds, worst
from .measure import PARTS, Contender, input_sets

_OURS = "peft_kernels"


@dataclass(frozen=True)
class BiasCase:
    """dy [M, N] -> its column sums in dy's dtype."""

    M: int
    N: int
    dtype: torch.dtype
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"M={self.M} N={self.N}"

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[:1]

    @property
    def set_bytes(self) -> int:
        return self.M * self.N * self.dtype.itemsize


def of_layers(layers: Iterable[tuple[int, int]], M: int, R: int, dtype: torch.dtype, dropout: float) -> list[BiasCase]:
    """The cases of a model's linear layers, each given as its (in, out) features; R and dropout make no difference."""
    return [BiasCase(M, N, dtype) for N in dict.fromkeys(N for _, N in layers)]


def work(sizes: dict[str, float], dtype: str, floor: bool) -> tuple[float, float]:
    """Bytes that must move, and the additions."""
    M, N = int(sizes["M"]), int(sizes["N"])
    return configs.floor_bytes(M, N, getattr(torch, dtype)), M * N


def read(dy: Tensor) -> Tensor:
    """Every byte of dy once, by the fastest reduction that PyTorch has."""
    return dy.view(-1).view(torch.int64 if dy.nbytes % 8 == 0 else torch.uint8).sum()


def by_product(dy: Tensor) -> Tensor:
    """Column sums as a product with ones, which a BLAS makes."""
    return torch.mv(dy.t(), torch.ones(dy.shape[0], dtype=dy.dtype, device=dy.device))


def value_errors(dy: Tensor, run: Callable[[Tensor], Tensor], units: float) -> dict[str, float]:
    """Worst |value - fp64 truth| / bound: `units` roundoffs of the accumulator, and one rounding to dy's dtype."""
    exact = dy.to(torch.float64)
    u = bounds.unit_roundoff(bounds.accumulator(dy.dtype))
    error = units * u * exact.abs().sum(0) + bounds.underflow(torch.float32)
    bound = bounds.Approx(exact.sum(0), error).rounded(dy.dtype)
    return {"dbias": worst(run(dy), bound.value, bound.error)}


def contenders(case: BiasCase, device: str, seed: int = 0) -> list[Contender]:
    """Every contender of the case, bound to rotating input sets that all of them share, drawn from `seed` on."""
    sets = []
    for i in range(input_sets(case.set_bytes, device)):
        generator = torch.Generator(device).manual_seed(seed + i)
        sets.append(torch.randn(case.M, case.N, generator=generator, device=device).to(case.dtype))
    torch_version, one_chain = f"torch {torch.__version__}", 1.5 * case.M**0.5  # see tests/bounds.py
    field: list[tuple[str, str, str, Callable[[Tensor], Tensor], float]] = [
        ("read", "floor", torch_version, read, 0.0),
        (_OURS, "ours", OWNERS["bias_grad", device.upper()], lambda dy: op.bias_grad(dy, dy.dtype), 16.0),
        ("dy.sum(0)", "peer", torch_version, lambda dy: dy.sum(0), max(16.0, one_chain)),
        ("product with ones", "peer", torch_version, by_product, max(16.0, one_chain)),
    ]
    found = []
    for name, role, implementation, run, units in field:
        contender = Contender(name, role, sets=len(sets), implementation=implementation)
        contender.step = lambda i, run=run: run(sets[i % len(sets)])
        contender.rival = _OURS if role == "peer" else ""
        if role != "floor":
            contender.check = lambda run=run, units=units: value_errors(sets[0], run, units)
        found.append(contender)
    return found
