"""Layers over a 4-bit weight whose Parameters somebody has put others in the place of."""

import pytest
import torch
from torch import nn

import peft_kernels as pk

K, N = 71, 29
MANGLED = {
    "weight too short": lambda t: t[:-1],
    "weight signed": lambda t: t.to(torch.int8),
    "absmax too short": lambda t: t[:-1],
    "absmax with gaps": lambda t: t.repeat_interleave(2)[::2],
    "nested_absmax narrow": lambda t: t.half(),
    "nested_code elsewhere": lambda t: t.to("meta"),
    "nested_offset gone": lambda t: None,
}


@pytest.mark.parametrize("rows", [1, 40, 600])  # around where the base is dequantised first
@pytest.mark.parametrize("how", MANGLED)
@pytest.mark.parametrize("adapters", [False, True], ids=["NF4Linear", "FusedLoRALinear"])
def test_a_parameter_that_no_longer_fits_is_refused_by_name(adapters, how, rows):
    """A forward does not ask what it hands to the ops: they do, before they read."""
    layer = pk.NF4Linear(K, N, double_quant=True, dtype=torch.bfloat16)
    if adapters:
        layer = pk.FusedLoRALinear.from_linear(layer, r=5, lora_alpha=8)
    x = torch.randn(rows, K, dtype=torch.bfloat16)
    layer(x)
    name = how.split()[0]
    mangled = MANGLED[how](getattr(layer, name).detach())
    setattr(layer, name, None if mangled is None else nn.Parameter(mangled, requires_grad=False))
    with pytest.raises(ValueError, match=rf"\b{name.replace('weight', 'packed')} is "):
        layer(x)
