"""A norm's case: inputs, a contender bound to them, and its values against fp64 truth with the tests' bounds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .derived_bounds import bounds, load, worst
from .measure import PARTS, Backward

bounds_norm = load("bounds_norm")

EPS = 1e-5
_ROWS, _COLUMNS = 64, 64  # that are checked


@dataclass(frozen=True)
class NormCase:
    """x [M, K], which requires grad; a frozen weight [K] and, for LayerNorm, a bias [K] that trains (BitFit)."""

    M: int
    K: int
    dtype: torch.dtype
    kind: str = "layer_norm"
    residual: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"M={self.M} K={self.K} kind={self.kind}" + self.residual * " residual=1"

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS

    @property
    def set_bytes(self) -> int:
        return (2 + 2 * self.residual) * self.M * self.K * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """One set of random tensors, without gradients; dtotal is the gradient of x + residual."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    dy: Tensor
    dtotal: Tensor | None


@dataclass(frozen=True)
class Layer:
    """A contender bound to one input set: forward() is y, and x + residual where there is one; `leaves` are what its
    backward makes gradients of, by name."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, Tensor]


def make_inputs(case: NormCase, device: str, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    def large(there: bool = True) -> Tensor | None:
        return draw(case.M, case.K) if there else None

    bias = draw(case.K) if case.kind == "layer_norm" else None
    return Inputs(large(), large(case.residual), draw(case.K), bias, large(), large(case.residual))


def leaves(inputs: Inputs, *more: str) -> dict[str, Tensor]:
    """x, residual and the named ones as leaves of their own, over the same memory; those that there are."""
    there = {name: getattr(inputs, name) for name in ("x", "residual", *more)}
    return {name: t.detach().requires_grad_() for name, t in there.items() if t is not None}


def begin(layer: Layer, inputs: Inputs) -> Backward:
    out = layer.forward()
    grads = (inputs.dy, inputs.dtotal)[: len(out)]
    return lambda keep: torch.autograd.grad(out, tuple(layer.leaves.values()), grads, retain_graph=keep)


def _statistics(x: Tensor, rms: bool):
    """Of every row, some at a time: fp64 takes four times the memory of 16 bits."""
    parts = [bounds_norm.statistics(rows, EPS, rms) for rows in x.split(1024)]

    def joined(found: list):
        return bounds.Approx(*(torch.cat([getattr(one, name) for one in found]) for name in ("value", "error")))

    return bounds_norm.Statistics(None if rms else joined([p.mean for p in parts]), joined([p.rstd for p in parts]))


def value_errors(case: NormCase, inputs: Inputs, layer: Layer, peer: bool) -> dict[str, float]:
    """Worst |value - fp64 truth| / bound of every output and gradient, on sampled rows and columns.

    A peer may round what lies between, and sums as it likes: it is granted sixteen times ours and eight roundings of
    the largest value, which shows that it computes the same thing and proves no more.
    """
    out = layer.forward()
    grads = dict(zip(layer.leaves, begin(layer, inputs)(False), strict=True))
    rms, dtype = case.kind == "rms_norm", case.dtype
    x = inputs.x if inputs.residual is None else out[1].detach()
    rows = torch.arange(0, case.M, max(1, case.M // _ROWS), device=x.device)
    columns = torch.arange(0, case.K, max(1, case.K // _COLUMNS), device=x.device)
    dtotal = None if inputs.dtotal is None else inputs.dtotal[rows]
    some = bounds_norm.statistics(x[rows], EPS, rms)
    truth = bounds_norm.forward(x[rows], inputs.weight, inputs.bias, EPS, rms, dtype)
    truth |= bounds_norm.backward(inputs.dy[rows], dtotal, x[rows], some, inputs.weight, rms, dtype, dtype)
    every = _statistics(x, rms)
    sums = bounds_norm.backward(inputs.dy[:, columns], None, x[:, columns], every, None, rms, dtype, dtype)
    found = {"y": (out[0].detach()[rows], *truth["y"])}
    for name in ("x", "residual"):
        if name in grads:
            found[f"d{name}"] = grads[name][rows], *truth["dx"]
    for name in ("weight", "bias"):
        if name in grads:
            found[f"d{name}"] = grads[name][columns], *sums[f"d{name}"]
    if not peer:
        return {name: worst(*one) for name, one in found.items()}
    unit = 8 * bounds.unit_roundoff(dtype)
    return {name: worst(v, t, 16 * bound + unit * t.abs().max()) for name, (v, t, bound) in found.items()}
