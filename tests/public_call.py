"""Calls of `peft_kernels.lora_linear` for tests: leaves that require grad, one seed, the gradients by name."""

from dataclasses import replace

import bounds
import torch
from cases import Case, Inputs, inputs
from torch import Tensor

import peft_kernels as pk

LEAVES = ("x", "weight", "lora_a", "lora_b", "bias")
SEED = 1234


def leaves(data: Inputs, needed=LEAVES) -> dict[str, Tensor | None]:
    """The differentiable arguments as new leaves; those in `needed` require grad."""
    found = {name: getattr(data, name) for name in LEAVES}
    return {
        name: None if tensor is None else tensor.detach().clone().requires_grad_(name in needed)
        for name, tensor in found.items()
    }


def call(args: dict, case: Case, function=None) -> Tensor:
    """The public function under a fixed seed, so that the dropout mask is the same in every call."""
    torch.manual_seed(SEED)
    return (function or pk.lora_linear)(
        args["x"], args["weight"], args["lora_a"], args["lora_b"], case.scaling, args["bias"], case.dropout
    )


def gradients(args: dict) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.grad for name, tensor in args.items()}


def run(case: Case, device: str, needed=LEAVES, function=None) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output and gradients of one forward and backward."""
    data = inputs(case, device)
    args = leaves(data, needed)
    y = call(args, case, function)
    y.backward(data.dy)
    return y.detach(), gradients(args)


def drawn_seed(device: str) -> Tensor:
    """The seed that a call draws from the default generator (documented: `torch.manual_seed` reproduces it)."""
    torch.manual_seed(SEED)
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


def assert_same(one: dict, other: dict, what: str) -> None:
    """Bit for bit the same gradients."""
    for name, grad in one.items():
        same = other[name] is None if grad is None else torch.equal(grad, other[name])
        assert same, f"{name}: the gradient differs {what}"


def check_gradients(case: Case, device: str, needed=LEAVES) -> None:
    """Output and gradients against fp64 truth: those of `needed`, in their leaf's dtype, and no other."""
    data = inputs(case, device)
    y, grads = run(case, device, needed)
    data = replace(data, seed=drawn_seed(device) if case.dropout else None)
    args = data.x, data.weight, data.lora_a, data.lora_b
    truth = bounds.backward(data.dy, *args, None, data.mask, data.scaling)
    dweight = bounds.Approx.exact(data.dy).t.matmul(bounds.Approx.exact(data.x), case.dtype).rounded(case.dtype)
    truth |= {"dweight": (dweight.value, dweight.error)}
    bounds.assert_within(y, *bounds.forward(*args, data.bias, data.mask, data.scaling)["y"], "y")
    for name, grad in grads.items():
        if name not in needed:
            assert grad is None, f"{name} does not require grad and got one"
            continue
        leaf = getattr(data, name)
        assert grad.dtype == leaf.dtype
        value, bound = truth[f"d{name}"]
        # The op returns dbias in fp32: it is rounded once more for a bias of 16 bits.
        last = bounds.Approx(value, bound).rounded(leaf.dtype) if name == "bias" else bounds.Approx(value, bound)
        bounds.assert_within(grad, last.value, last.error, f"d{name}")
