"""The activation's backward and the bias gradient in one pass; the floor is another pass over the same bytes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.bias_grad import configs, op

from .derived_bounds import bounds, load, worst
from .measure import PARTS, Contender, input_sets

_OURS = "peft_kernels"

bounds_act = load("bounds_act")


@dataclass(frozen=True)
class ActCase:
    """dy and z [M, N] -> dz [M, N] and dbias [N], all of one dtype."""

    M: int
    N: int
    dtype: torch.dtype
    activation: str = "gelu"
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"M={self.M} N={self.N} act={self.activation}"

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[:1]

    @property
    def set_bytes(self) -> int:
        return 2 * self.M * self.N * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """z and what is kept of it: itself, or ReLU's bits; y for the peer that keeps that."""

    dy: Tensor
    z: Tensor
    kept: Tensor
    y: Tensor


def of_layers(layers: Iterable[tuple[int, int]], M: int, R: int, dtype: torch.dtype, dropout: float) -> list[ActCase]:
    """The activation behind a model's widest linear layer; R and dropout make no difference."""
    return [ActCase(M, max(N for _, N in layers), dtype)]


def work(sizes: dict[str, float], dtype: str, floor: bool) -> tuple[float, float]:
    """Bytes that must move, and about as many operations as a derivative takes."""
    M, N = int(sizes["M"]), int(sizes["N"])
    return configs.act_floor_bytes(M, N, getattr(torch, dtype), "gelu"), 20 * M * N


def make_inputs(case: ActCase, device: str, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    dy, z = (torch.randn(case.M, case.N, generator=generator, device=device).to(case.dtype) for _ in range(2))
    if case.activation == "relu":
        y, kept = op.relu_fwd(z)
        return Inputs(dy, z, kept, y)
    return Inputs(dy, z, z, z)


def floor(inputs: Inputs) -> Tensor:
    """Reads the same large tensors and writes as much: dy + z, or for ReLU, whose bits are next to nothing, a copy."""
    return inputs.dy.clone() if inputs.kept.dtype == torch.uint8 else inputs.dy + inputs.z


def ours(case: ActCase, need_dbias: bool = True) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    return lambda i: op.act_bwd(i.dy, i.kept, case.activation, True, need_dbias, case.dtype)


def _torch_backward(case: ActCase) -> Callable[[Tensor, Tensor], Tensor]:
    aten = torch.ops.aten
    if case.activation == "relu":
        return lambda dy, y: aten.threshold_backward(dy, y, 0)
    if case.activation == "silu":
        return aten.silu_backward
    approximate = "tanh" if case.activation == "gelu_tanh" else "none"
    return lambda dy, z: aten.gelu_backward(dy, z, approximate=approximate)


def apart(case: ActCase) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """PyTorch's own two steps: the activation's backward, then the sum that the linear's backward makes."""
    backward = _torch_backward(case)

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        dz = backward(inputs.dy, inputs.y)
        return dz, dz.sum(0)

    return run


def compiled(case: ActCase) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """The same two under torch.compile, which may fuse them."""
    backward = _torch_backward(case)

    @torch.compile(dynamic=False)
    def both(dy: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        dz = backward(dy, y)
        return dz, dz.sum(0)

    return lambda inputs: both(inputs.dy, inputs.y)


def value_errors(
    case: ActCase, inputs: Inputs, run: Callable[[Inputs], tuple[Tensor, Tensor]], peer: bool = False
) -> dict[str, float]:
    """Worst |value - fp64 truth| / bound of dz and dbias, on sampled columns.

    A peer's derivative may be 0.5 + 0.5 erf(z), whose error is a unit of 1 even where little is left of it, and its
    dbias the sum of rounded dz in one chain.
    """
    dy, N = inputs.dy, case.N
    first = torch.arange(0, N, 8)[:: max(1, N // 64)]
    columns = (first[:, None] + torch.arange(8)).flatten().clamp(max=N - 1).unique().to(dy.device)
    relu = case.activation == "relu"
    kept = inputs.kept[:, (first // 8).to(dy.device)] if relu else inputs.z[:, columns]
    carried = bounds.accumulator(dy.dtype)
    u = bounds.unit_roundoff(carried)
    product = bounds_act.products(dy[:, columns], kept, case.activation)
    if peer and not relu:
        product = bounds.Approx(product.value, product.error + 4 * u * dy[:, columns].abs().to(torch.float64))
    dz = product if relu else product.rounded(dy.dtype)
    terms, units = (dz, max(16.0, 1.5 * case.M**0.5)) if peer else (product, 16.0)  # see tests/bounds.py
    sums = bounds.Approx(terms.value.sum(0), terms.error.sum(0) + units * u * terms.reach.sum(0))
    dbias, found = sums.rounded(dy.dtype), run(inputs)
    errors = {"dz": worst(found[0][:, columns], dz.value, dz.error + bounds.underflow(dy.dtype))}
    if found[1].numel():
        errors["dbias"] = worst(found[1][columns], dbias.value, dbias.error)
    return errors


def contenders(case: ActCase, device: str, seed: int = 0) -> list[Contender]:
    """Every contender of the case, bound to rotating input sets that all of them share, drawn from `seed` on."""
    sets = [make_inputs(case, device, seed + i) for i in range(input_sets(case.set_bytes, device))]
    torch_version, owner = f"torch {torch.__version__}", OWNERS["act_bwd", device.upper()]
    field: list[tuple[str, str, str, str, Callable[[Inputs], object]]] = [
        ("copies", "floor", torch_version, "", floor),
        (_OURS, "ours", owner, "", ours(case)),
        # Set beside ours as a rival is: what the bias gradient adds.
        (f"{_OURS}, dz alone", "ours", owner, _OURS, ours(case, need_dbias=False)),
        ("PyTorch", "peer", torch_version, _OURS, apart(case)),
    ]
    if case.compiled:
        field.append(("PyTorch, torch.compile", "peer", torch_version, _OURS, compiled(case)))
    found = []
    for name, role, implementation, rival, run in field:
        contender = Contender(name, role, sets=len(sets), implementation=implementation, rival=rival)
        contender.step = lambda i, run=run: run(sets[i % len(sets)])
        if role != "floor":
            contender.check = lambda run=run, peer=role == "peer": value_errors(case, sets[0], run, peer)
        found.append(contender)
    return found
