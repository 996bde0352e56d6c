"""Calls of `peft_kernels.layer_norm` and `rms_norm` for tests: leaves, gradients by name, what is saved."""

import torch
import torch.nn.functional as F
from cases import lay_out
from torch import Tensor

import peft_kernels as pk

M, K = 37, 72
LEAVES = ("x", "residual", "weight", "bias")
FUNCTIONS = {"layer_norm": pk.layer_norm, "rms_norm": pk.rms_norm}
EPS = 1e-5


def leaves(device, dtype=torch.float32, needed=LEAVES, affine=None, shape=(M,), layout="contiguous", k=K) -> dict:
    """x and residual [*shape, K], weight and bias [K] of dtype `affine` as leaves; those in `needed` require grad."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (*shape, k), "residual": (*shape, k), "weight": (k,), "bias": (k,)}
    drawn = {name: torch.randn(size, generator=generator, dtype=torch.float64) + 0.5 for name, size in sizes.items()}
    drawn = {n: t.to(dtype if n in ("x", "residual") else affine or dtype).to(device) for n, t in drawn.items()}
    if layout != "contiguous":
        drawn |= {name: lay_out(drawn[name], layout) for name in ("x", "residual")}
    return {name: t.requires_grad_(name in needed) for name, t in drawn.items()}


def gradient_of(y: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype).to(y.device)


def call(function, args: dict) -> tuple[Tensor, Tensor | None]:
    """y and, where args hold a residual, the total."""
    found = function(args["x"], args.get("weight"), args.get("bias"), EPS, args.get("residual"))
    return found if isinstance(found, tuple) else (found, None)


def torchs(name: str):
    """What the functions stand for, in Torch's own."""

    def function(x, weight, bias, eps, residual):
        total = x if residual is None else x + residual
        if name == "layer_norm":
            y = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
        else:
            y = F.rms_norm(total, total.shape[-1:], weight, eps)
            y = y if bias is None else y + bias
        return y if residual is None else (y, total)

    return function


def run(function, args: dict, use_total: bool = True) -> dict[str, Tensor | None]:
    """y, total and the gradients of one forward and backward, by name."""
    y, total = call(function, args)
    wanted = [y] if total is None or not (use_total and total.requires_grad) else [y, total]
    torch.autograd.backward(wanted, [gradient_of(one, seed) for seed, one in enumerate(wanted, 1)])
    found = {"y": y.detach(), "total": None if total is None else total.detach()}
    return found | {name: t.grad for name, t in args.items()}


def saved(function, args: dict) -> list[Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(function, args)
    return kept


def saved_bytes(function, args: dict) -> int:
    """Bytes of the distinct storages that are saved and are not the weight's or the bias's."""
    owned = {args[name].untyped_storage().data_ptr() for name in ("weight", "bias") if name in args}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved(function, args)}
    return sum(size for address, size in storages.items() if address not in owned)


def assert_same(one: dict, other: dict) -> None:
    for name, value in one.items():
        same = other[name] is None if value is None else torch.equal(value, other[name])
        assert same, f"{name} differs"
