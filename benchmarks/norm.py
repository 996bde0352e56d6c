"""LayerNorm's and RMSNorm's contenders: passes over the same bytes as the floor, ours, PyTorch's and Liger's."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.norm import configs

from .environment import version
from .failures import FAILURES, because
from .held import saved_bytes
from .measure import Backward, Contender, input_sets
from .norm_case import EPS, Inputs, Layer, NormCase, begin, leaves, make_inputs, value_errors

_OURS = "peft_kernels"
_WITH_WEIGHT = f"{_OURS}, weight too"

Build = Callable[[NormCase, Inputs], Layer]


def of_layers(layers: Iterable[tuple[int, int]], M: int, R: int, dtype: torch.dtype, dropout: float) -> list[NormCase]:
    """The norms over a model's hidden size: what most of its linear layers read. R and dropout make no difference."""
    K = Counter(K for K, _ in layers).most_common(1)[0][0]
    return [NormCase(M, K, dtype), NormCase(M, K, dtype, "rms_norm"), NormCase(M, K, dtype, "rms_norm", residual=True)]


def work(sizes: dict[str, float], dtype: str, floor: bool) -> tuple[float, float]:
    """Bytes that must move forward and backward, and about as many operations."""
    M, K, residual = int(sizes["M"]), int(sizes["K"]), bool(sizes.get("residual", 0))
    dtype = getattr(torch, dtype)
    forward = configs.floor_bytes_forward(M, K, dtype, residual)
    return forward + configs.floor_bytes_backward(M, K, dtype, residual), 16 * M * K


def ours(*trained: str) -> Build:
    def build(case: NormCase, inputs: Inputs) -> Layer:
        mine = leaves(inputs, *trained)
        weight, bias = (mine.get(name, getattr(inputs, name)) for name in ("weight", "bias"))
        function = getattr(pk, case.kind)

        def forward() -> tuple[Tensor, ...]:
            out = function(mine["x"], weight, bias, EPS, mine.get("residual"))
            return out if case.residual else (out,)

        return Layer(forward, mine)

    return build


def by_torch(compiled: bool = False) -> Build:
    """With the same requires_grad as ours: the bias alone trains."""

    def build(case: NormCase, inputs: Inputs) -> Layer:
        mine = leaves(inputs, "bias")

        def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            total = x if residual is None else x + residual
            if case.kind == "rms_norm":
                y = F.rms_norm(total, (case.K,), weight, EPS)
            else:
                y = F.layer_norm(total, (case.K,), weight, bias, EPS)
            return (y,) if residual is None else (y, total)

        run = torch.compile(forward, dynamic=False) if compiled else forward
        return Layer(lambda: run(mine["x"], mine.get("residual"), inputs.weight, mine.get("bias")), mine)

    return build


def liger(case: NormCase, inputs: Inputs) -> Layer:
    """Liger's functions, which always make the gradients of weight and bias."""
    from liger_kernel.ops import (  # a peer: only here when it is installed
        LigerFusedAddRMSNormFunction,
        LigerLayerNormFunction,
        LigerRMSNormFunction,
    )

    mine = leaves(inputs, "weight", "bias")

    def forward() -> tuple[Tensor, ...]:
        x, weight = mine["x"], mine["weight"]
        if case.kind == "layer_norm":
            return (LigerLayerNormFunction.apply(x, weight, mine["bias"], EPS),)
        if case.residual:
            return LigerFusedAddRMSNormFunction.apply(x, mine["residual"], weight, EPS)
        # As for Llama, but not in place: that would write dx over dy, which the other contenders read.
        return (LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False),)

    return Layer(forward, mine)


def _floor(inputs: Inputs) -> Backward:
    """As many large tensors read and written. Forward: x -> y, or x and residual -> their sum, and one more written;
    backward: dy, x -> dx, or those and the gradient of the sum."""
    if inputs.residual is None:
        inputs.x.clone()
        return lambda keep: inputs.dy + inputs.x
    total = torch.add(inputs.x, inputs.residual)
    torch.empty_like(total).fill_(0)
    return lambda keep: torch.addcmul(inputs.dtotal, inputs.dy, inputs.x)


def _field(case: NormCase, device: str) -> list[tuple[str, str, str, str, Build]]:
    """(name, role, implementation, rival, build) of every contender but the floor."""
    owner, torch_version = OWNERS["norm_bwd", device.upper()], f"torch {torch.__version__}"
    found = [(_OURS, "ours", owner, "", ours("bias"))]
    if case.kind == "layer_norm":
        # Set beside ours as a rival is: what the bias gradient adds.
        found.append((f"{_OURS}, nothing trained", "ours", owner, _OURS, ours()))
    found += [
        (_WITH_WEIGHT, "ours", owner, "", ours("weight", "bias")),
        ("PyTorch", "peer", torch_version, _OURS, by_torch()),
    ]
    if case.compiled:
        found.append(("PyTorch, torch.compile", "peer", torch_version, _OURS, by_torch(compiled=True)))
    if device == "cuda" and not (case.kind == "layer_norm" and case.residual):
        found.append(("Liger", "peer", f"liger-kernel {version('liger-kernel')}", _WITH_WEIGHT, liger))
    return found


def _contender(
    case: NormCase, sets: list[Inputs], name: str, role: str, implementation: str, rival: str, build: Build
) -> Contender:
    contender = Contender(name, role, sets=len(sets), implementation=implementation, rival=rival)
    if name == "Liger" and version("liger-kernel") == "none":
        contender.missing = "not installed: pip install liger-kernel"
        return contender
    try:
        layers = [build(case, inputs) for inputs in sets]
    except FAILURES as error:
        contender.missing = because(error)
        return contender
    contender.forward = lambda i: begin(layers[i % len(sets)], sets[i % len(sets)])
    contender.step = lambda i: contender.forward(i)(False)
    contender.check = lambda: value_errors(case, sets[0], layers[0], role == "peer")
    if not name.endswith("compile"):  # its graph keeps tensors that no hook sees
        kept = [sets[0].weight, *([] if sets[0].bias is None else [sets[0].bias])]
        contender.saved = lambda: saved_bytes(lambda: layers[0].forward()[0], kept)
    return contender


def contenders(case: NormCase, device: str, seed: int = 0) -> list[Contender]:
    """Every contender of the case, bound to rotating input sets that all of them share, drawn from `seed` on."""
    sets = [make_inputs(case, device, seed + i) for i in range(input_sets(case.set_bytes, device))]
    floor = Contender("copies", "floor", sets=len(sets), implementation=f"torch {torch.__version__}")
    floor.forward = lambda i: _floor(sets[i % len(sets)])
    floor.step = lambda i: floor.forward(i)(False)
    return [floor, *(_contender(case, sets, *one) for one in _field(case, device))]
