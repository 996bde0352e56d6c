"""A LoRA case over a 4-bit weight: its inputs, the public call, and the truth of its output and gradients."""

from dataclasses import replace

import bounds
import torch
from cases import Case, Inputs, inputs
from public_call import SEED, drawn_seed
from torch import Tensor

import peft_kernels as pk

LEAVES = ("x", "lora_a", "lora_b", "bias")


def quantized(data: Inputs, double_quant: bool, quant_type: str = "nf4", blocksize: int = 64) -> pk.NF4Weight:
    weight = data.weight if data.weight.dtype != torch.float64 else data.weight.float()
    return pk.nf4_quantize(weight, quant_type, blocksize, double_quant)


def leaves(data: Inputs, needed=LEAVES) -> dict[str, Tensor | None]:
    found = {name: getattr(data, name) for name in LEAVES}
    return {
        name: None
        if tensor is None
        else tensor.detach().requires_grad_(name in needed)
        if name == "x"
        else tensor.detach().clone().requires_grad_(name in needed)
        for name, tensor in found.items()
    }


def call(args: dict, weight: pk.NF4Weight, case: Case, function=None) -> Tensor:
    """The public function under a fixed seed, so that the dropout mask is the same in every call."""
    torch.manual_seed(SEED)
    function = function or pk.qlora_linear
    return function(args["x"], weight, args["lora_a"], args["lora_b"], case.scaling, args["bias"], case.dropout)


def run(case: Case, device: str, double_quant=True, needed=LEAVES, function=None, **kind):
    """Output and gradients, by name, of one forward and backward."""
    data = inputs(case, device)
    args = leaves(data, needed)
    y = call(args, quantized(data, double_quant, **kind), case, function)
    y.backward(data.dy)
    return y.detach(), {name: None if tensor is None else tensor.grad for name, tensor in args.items()}


def check(case: Case, device: str, double_quant: bool, needed=LEAVES, **kind) -> None:
    """y and every gradient against the LoRA linear's truth over the values that the 4-bit weight stands for.

    They are given in fp32: the bounds allow the one rounding to x's dtype that a kernel may make of them.
    """
    data = inputs(case, device)
    y, grads = run(case, device, double_quant, needed, **kind)
    data = replace(data, seed=drawn_seed(device) if case.dropout else None)
    weight = pk.nf4_dequantize(quantized(data, double_quant, **kind), torch.float32)
    args = data.x, weight, data.lora_a, data.lora_b
    truth = bounds.backward(data.dy, *args, None, data.mask, data.scaling)
    assert y.dtype == case.dtype
    bounds.assert_within(y, *bounds.forward(*args, data.bias, data.mask, data.scaling)["y"], "y")
    for name, grad in grads.items():
        leaf = getattr(data, name)
        if name not in needed or leaf is None:
            assert grad is None, f"{name} does not require grad and got one"
            continue
        assert grad.dtype == leaf.dtype
        wide = bounds.Approx(*truth[f"d{name}"])
        last = wide.rounded(leaf.dtype) if name == "bias" else wide
        bounds.assert_within(grad, last.value, last.error, f"d{name}")
