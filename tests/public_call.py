"""Calls of `peft_kernels.lora_linear` for tests: leaves that require grad, one seed, the gradients by name."""

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
