"""One step of a LoRA linear's contender on shared inputs, and its values against fp64 truth with the tests' bounds."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_kernels.kernels._shared import drop_levels

from .derived_bounds import bounds, worst
from .measure import PARTS

SCALING = 2.0  # lora_alpha = 2 R, as PEFT's own examples; a power of two, so dy * scaling is exact in every peer
_SAMPLED_ROWS = 8
_SAMPLED_RANKS = 4


@dataclass(frozen=True)
class LoRACase:
    """x [M, K], weight [N, K], rank R, one dtype for all but the adapters of "fp32 adapters" contenders."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    dropout: float = 0.0
    compiled: bool = False  # set `torch.compile(PEFT)` beside ours too: it costs some ten seconds a case

    @property
    def label(self) -> str:
        return f"M={self.M} N={self.N} K={self.K} R={self.R} dropout={self.dropout:g}"

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS

    @property
    def set_bytes(self) -> int:
        return (self.N * self.K + self.M * (self.N + self.K)) * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """One set of random tensors; adapters are leaves that every contender of the case shares."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor


@dataclass(frozen=True)
class Layer:
    """A contender bound to one input set: y = forward(x), and the tensors whose gradients a step makes."""

    forward: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...] = ()
    dropout: nn.Dropout | None = None  # where its mask can be seen
    within: Callable[[], AbstractContextManager] = contextlib.nullcontext  # what a step runs under


Build = Callable[[LoRACase, Inputs], Layer]


def make_inputs(case: LoRACase, device: str, seed: int = 0) -> Inputs:
    """Random normal data scaled so that outputs and gradients are of order 1; lora_b is not zero."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...], size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * size).to(case.dtype)

    return Inputs(
        x=draw((case.M, case.K)).requires_grad_(),
        dy=draw((case.M, case.N)),
        weight=draw((case.N, case.K), case.K**-0.5),
        lora_a=draw((case.R, case.K), case.K**-0.5).requires_grad_(),
        lora_b=draw((case.N, case.R), case.R**-0.5).requires_grad_(),
    )


def forward(layer: Layer, inputs: Inputs) -> Callable[[bool], tuple[Tensor, ...]]:
    """Forward alone; calling what it returns makes every gradient, and keeps what is saved if it is told to."""
    with layer.within():
        y = layer.forward(inputs.x)

    def backward(keep: bool) -> tuple[Tensor, ...]:
        with layer.within():
            return torch.autograd.grad(y, (inputs.x, *layer.trained), inputs.dy, retain_graph=keep)

    return backward


def step(layer: Layer, inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward and every gradient: y, dx and, but for the floor, the adapters'."""
    with layer.within():
        y = layer.forward(inputs.x)
        return y.detach(), *torch.autograd.grad(y, (inputs.x, *layer.trained), inputs.dy)


@contextlib.contextmanager
def _seen_dropout(layer: Layer, case: LoRACase) -> Iterator[list[Tensor]]:
    """What dropout did in the calls inside: our mask, from what is saved, or a peer's dropout(x), from its module."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8 and tuple(tensor.shape) == (case.M, -(-case.K // 8)):
            seen.append(tensor)
        return tensor

    if layer.dropout is None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield seen
        return
    handle = layer.dropout.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    try:
        yield seen
    finally:
        handle.remove()


def _truth(x, dy, weight, a, b, mask, scaling: float, rows, ranks) -> bounds.Bounded:
    """Sampled rows of y and dx, sampled ranks of dlora_a and dlora_b."""
    row_mask = None if mask is None else mask[rows]
    y = bounds.forward(x[rows], weight, a, b, None, row_mask, scaling)["y"]
    dx = bounds.backward(dy[rows], None, weight, a, b, None, row_mask, scaling)["dx"]
    both = bounds.backward(dy, x, None, a[ranks], b[:, ranks], None, mask, scaling)
    return {"y": y, "dx": dx, "dlora_a": both["dlora_a"], "dlora_b": both["dlora_b"]}


def _truth_of_peer(x, dropped, dy, weight, a, b, dropout: float, rows, ranks) -> bounds.Bounded:
    """The same for a peer whose low-rank branch starts at `dropped`, its own rounded dropout(x), maybe wider.

    On the way back the peer rounds 1 / (1 - p), its product with the gradient, and the cast to x's dtype.
    """
    Approx, dtype = bounds.Approx, x.dtype
    base_y = Approx(*bounds.forward(x[rows], weight, a, b, None, None, 0.0)["y"])
    low_y = Approx(*bounds.forward(dropped[rows], None, a, b, None, None, SCALING)["y"])
    y = base_y.plus(low_y.rounded(dtype)).rounded(dtype)
    wide_dy = dy.to(dropped.dtype)
    base_dx = Approx(*bounds.backward(dy[rows], None, weight, a, b, None, None, 0.0)["dx"])
    low_dx = Approx(*bounds.backward(wide_dy[rows], None, None, a, b, None, None, SCALING)["dx"])
    low_dx = low_dx.masked((dropped[rows] != 0) / (1 - dropout)).rounded(dtype).rounded(dtype).rounded(dtype)
    dx = base_dx.plus(low_dx).rounded(dtype)
    both = bounds.backward(wide_dy, dropped, None, a[ranks], b[:, ranks], None, None, SCALING)
    truth = {"y": (y.value, y.error), "dx": (dx.value, dx.error)}
    return truth | {name: both[name] for name in ("dlora_a", "dlora_b")}


def value_errors(case: LoRACase, inputs: Inputs, layer: Layer) -> dict[str, float]:
    """Worst |value - fp64 truth| / bound of each output, on sampled rows and ranks; inf where a value is no number."""
    with _seen_dropout(layer, case) as seen:
        y, dx, *grads = step(layer, inputs)
    x, dy, weight = inputs.x.detach(), inputs.dy, inputs.weight
    adapters = layer.trained if len(layer.trained) == 2 else (inputs.lora_a, inputs.lora_b)
    a, b = (tensor.detach() for tensor in adapters)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(case.M, generator=generator)[:_SAMPLED_ROWS].to(x.device)
    ranks = torch.randperm(case.R, generator=generator)[:_SAMPLED_RANKS].to(x.device)
    if not layer.trained:
        truth = _truth(x, dy, weight, a, b, None, 0.0, rows, ranks)
    elif not case.dropout:
        truth = _truth(x, dy, weight, a, b, None, SCALING, rows, ranks)
    elif not seen:
        raise RuntimeError("what dropout did cannot be seen, so values cannot be checked")
    elif layer.dropout is None:
        scaling = drop_levels.effective_scaling(SCALING, drop_levels.drop_threshold(case.dropout))
        truth = _truth(x, dy, weight, a, b, seen[0], scaling, rows, ranks)
    else:
        truth = _truth_of_peer(x, seen[0], dy, weight, a, b, case.dropout, rows, ranks)
    found = {"y": y[rows], "dx": dx[rows]}
    if len(grads) == 2:
        found |= {"dlora_a": grads[0][ranks], "dlora_b": grads[1][:, ranks]}
    return {name: worst(found[name], *truth[name]) for name in found}
