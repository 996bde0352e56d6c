"""The 4-bit linear's contenders: its floors, ours, bitsandbytes at its best on the same bytes, and PyTorch by hand."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core.registry import OWNERS

from .bitsandbytes_layers import linear4bit
from .derived_bounds import bounds, load, worst
from .environment import version
from .failures import FAILURES, because
from .held import saved_bytes
from .measure import PARTS, Contender, input_sets

bounds_nf4 = load("bounds_nf4")

_OURS = "peft_kernels"
_FEW_ROWS = 4
_SAMPLED_ROWS = 16


@dataclass(frozen=True)
class NF4LinearCase:
    """x [M, K] over a 4-bit weight [N, K] with double quantisation, and no bias. train: dx too; else under no_grad, as
    decoding runs. precision: of fp32 products, for every contender; "medium" lets them round their factors to bf16."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    train: bool = False
    compiled: bool = False
    precision: str = "highest"

    @property
    def label(self) -> str:
        asked = "" if self.precision == "highest" else f" precision={self.precision}"
        return f"M={self.M} N={self.N} K={self.K} step={'train' if self.train else 'decode'}{asked}"

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS if self.train else PARTS[:1]

    @property
    def set_bytes(self) -> int:
        """Of the smallest thing that a contender reads: what is rotated must not fit the cache for any."""
        return self.N * self.K // 2


def _cases(rows: Iterable[int], size: int, *dtypes: torch.dtype, train: Iterable[int] = ()) -> list[NF4LinearCase]:
    """Decoding with so many rows, then training with so many."""
    found = [NF4LinearCase(M, size, size, dtype) for dtype in dtypes for M in rows]
    return found + [NF4LinearCase(M, size, size, dtype, True) for dtype in dtypes for M in train]


SUITES = {
    "gpu": _cases((1, 4, 16, 64, 512), 4096, torch.bfloat16, train=(512, 2048, 8192))
    + [NF4LinearCase(1, 14336, 4096, torch.bfloat16), NF4LinearCase(8192, 14336, 4096, torch.bfloat16, True)],
    "tiny": _cases((1, 33), 128, torch.bfloat16, train=(33,)),  # bitsandbytes' CPU code needs whole blocks in a row
    "cpu": _cases((1, 2, 4, 8, 64, 512), 4096, torch.float32, torch.bfloat16, train=(64, 512))
    + [replace(case, precision="medium") for case in _cases((1, 8, 64, 512), 4096, torch.float32)],
    "speed": _cases((1, 64), 512, torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    dy: Tensor
    weight: pk.NF4Weight
    dense: Tensor
    """The values in the case's dtype."""


Layer = Callable[[Tensor], Tensor]


def of_layers(
    layers: Iterable[tuple[int, int]], M: int, R: int, dtype: torch.dtype, dropout: float
) -> list[NF4LinearCase]:
    """The cases of a model's linear layers, each given as its (in, out) features; R and dropout make no difference."""
    return [NF4LinearCase(M, N, K, dtype, train) for K, N in layers for train in (False, True)]


def work(sizes: dict[str, float], dtype: str, floor: bool) -> tuple[float, float]:
    """Bytes that must move, and FLOPs: of the whole step."""
    M, N, K, item = sizes["M"], sizes["N"], sizes["K"], getattr(torch, dtype).itemsize
    steps = 2 if sizes["step"] == "train" else 1
    weight = N * K * item if floor and M > _FEW_ROWS else N * K * (0.5 + 1 / 64 + 4 / (64 * 256))
    return steps * (weight + item * M * (N + K)), steps * 2 * M * N * K


def make(case: NF4LinearCase, device: str, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, size: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device) * size

    weight = pk.nf4_quantize(draw(case.N, case.K, case.K**-0.5), double_quant=True)
    x = draw(case.M, case.K).to(case.dtype).requires_grad_(case.train)
    return Inputs(x, draw(case.M, case.N).to(case.dtype), weight, pk.nf4_dequantize(weight, case.dtype))


def read(case: NF4LinearCase, inputs: Inputs) -> Layer:
    """The floor of a few rows: every byte of the weight once, by the fastest reduction that PyTorch has."""
    tensors = [inputs.weight.packed, inputs.weight.absmax]
    words = [t.view(torch.int64 if t.nbytes % 8 == 0 else torch.uint8) for t in tensors]
    return lambda x: sum(one.sum() for one in words)


def dense(case: NF4LinearCase, inputs: Inputs) -> Layer:
    """The floor of many rows: what the product costs over a weight that is not 4-bit."""
    return lambda x: F.linear(x, inputs.dense)


def ours(case: NF4LinearCase, inputs: Inputs) -> Layer:
    return lambda x: pk.nf4_linear(x, inputs.weight)


def by_hand(case: NF4LinearCase, inputs: Inputs) -> Layer:
    return lambda x: F.linear(x, pk.nf4_dequantize(inputs.weight, case.dtype))


def bitsandbytes(case: NF4LinearCase, inputs: Inputs) -> Layer:
    """Linear4bit over the very same bytes; in eval mode its CPU code repacks them at the first call."""
    layer = linear4bit(replace(inputs.weight, dtype=case.dtype), case.dtype).train(case.train)
    if not case.train:
        with torch.no_grad():
            layer(inputs.x)
    return layer


@contextmanager
def _precision(case: NF4LinearCase) -> Iterator[None]:
    if case.precision == "highest":  # Torch's default: nothing to do in a step that is timed
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def step(case: NF4LinearCase, layer: Layer, inputs: Inputs) -> tuple[Tensor, ...]:
    """y, and dx where the case trains."""
    with torch.set_grad_enabled(case.train), _precision(case):
        y = layer(inputs.x)
        return (y.detach(), *torch.autograd.grad(y, inputs.x, inputs.dy)) if case.train else (y,)


def forward(case: NF4LinearCase, layer: Layer, inputs: Inputs) -> Callable[[bool], tuple[Tensor, ...]]:
    with _precision(case):
        y = layer(inputs.x)

    def backward(keep: bool) -> tuple[Tensor, ...]:
        with _precision(case):
            return torch.autograd.grad(y, inputs.x, inputs.dy, retain_graph=keep)

    return backward


def value_errors(case: NF4LinearCase, layer: Layer, inputs: Inputs, narrow: bool) -> dict[str, float]:
    """Worst |value - fp64 truth| / bound on sampled rows. `narrow` grants what bitsandbytes' CPU code does: values and
    scales rounded to bf16 each, x and y too; the precision "medium" grants the factors to everybody."""
    rows = torch.randperm(case.M, generator=torch.Generator().manual_seed(0))[:_SAMPLED_ROWS].to(inputs.x.device)
    y, *dx = step(case, layer, inputs)
    values = bounds_nf4.values(inputs.weight).to(y.device)
    factor = torch.bfloat16 if narrow or case.precision == "medium" else case.dtype
    weight = bounds.Approx.exact(values)
    for _ in range(2 if narrow else factor.itemsize == 2):
        weight = weight.rounded(factor)
    found = {}
    for name, value, left, right in (("y", y, inputs.x, weight.t), ("dx", dx and dx[0], inputs.dy, weight)):
        if name == "dx" and not case.train:
            continue
        left = bounds.Approx.exact(left[rows])
        left = left if factor == case.dtype else left.rounded(factor)
        product = left.matmul(right, case.dtype).rounded(torch.bfloat16 if narrow else case.dtype)
        found[name] = worst(value[rows], product.value, product.error)
    return found


def _field(case: NF4LinearCase, device: str) -> list[tuple]:
    """(name, role, implementation, rival, build); the first floor is the one that ratios are to."""
    torch_version, bnb = f"torch {torch.__version__}", f"bitsandbytes {version('bitsandbytes')}"
    few = case.M <= _FEW_ROWS and not case.train
    return [
        *([("read of the 4-bit weight", "floor", torch_version, "", read)] if few else []),
        ("linear over a dense weight", "peer" if few else "floor", torch_version, _OURS if few else "", dense),
        (_OURS, "ours", OWNERS["nf4_linear_fwd", device.upper()], "", ours),
        ("bitsandbytes", "peer", bnb, _OURS, bitsandbytes),
        ("dequantise, then PyTorch", "peer", f"ours, {torch_version}", _OURS, by_hand),
    ]


def contenders(
    case: NF4LinearCase, device: str, seed: int = 0, field: Sequence[tuple] | None = None
) -> list[Contender]:
    """Every contender of the case, or of another `field`, bound to rotating input sets that all of them share, drawn
    from `seed` on."""
    sets = [make(case, device, seed + i) for i in range(input_sets(case.set_bytes, device))]
    found = []
    for name, role, implementation, rival, build in field or _field(case, device):
        contender = Contender(name, role, sets=len(sets), implementation=implementation, rival=rival)
        found.append(contender)
        if build is bitsandbytes and version("bitsandbytes") == "none":
            contender.missing = "not installed: pip install bitsandbytes"
            continue
        try:
            layers = [build(case, inputs) for inputs in sets]
        except FAILURES as error:
            contender.missing = because(error)
            continue
        contender.step = lambda i, layers=layers: step(case, layers[i % len(sets)], sets[i % len(sets)])
        if build is not read:
            narrow = build is bitsandbytes and not case.train and device == "cpu"
            contender.check = lambda layers=layers, narrow=narrow: value_errors(case, layers[0], sets[0], narrow)
        if case.train:
            contender.forward = lambda i, layers=layers: forward(case, layers[i % len(sets)], sets[i % len(sets)])
            held = *(t for t in sets[0].weight.tensors() if t is not None), sets[0].dense
            contender.saved = lambda layers=layers, held=held: saved_bytes(lambda: layers[0](sets[0].x), held)
    return found
