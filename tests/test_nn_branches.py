"""Several active adapters of one layer in training: what each one's dropout and bias bring to the result."""

import torch
from torch import nn

from peft_kernels import FusedLoRALinear

SIZE = 64


def identities(second_p: float) -> tuple[FusedLoRALinear, torch.Tensor]:
    """x = 1 through base 0 + bias 5, adapter 1 of scaling 1, adapter "second" of scaling 2 with lora_bias 10."""
    layer = FusedLoRALinear.from_linear(nn.Linear(SIZE, SIZE, dtype=torch.float64), r=SIZE, lora_alpha=SIZE)
    layer.add_adapter("second", r=SIZE, lora_alpha=2 * SIZE, lora_dropout=second_p, lora_bias=True)
    layer.set_adapter(["default", "second"])
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(5)
        layer.lora_bias["second"].fill_(10)
        for parameter in (*layer.lora_A.values(), *layer.lora_B.values()):
            parameter.copy_(torch.eye(SIZE))
    return layer, torch.ones(32, SIZE, dtype=torch.float64)


def test_the_bias_of_an_adapter_with_dropout_is_neither_dropped_nor_lost():
    layer, x = identities(0.5)
    # 5 + 2 * 10 of the biases, 1 of the first adapter, 0 or 2 / (1 - 0.5) of the second.
    assert set(layer(x).unique().tolist()) == {26.0, 30.0}
    assert set(layer.eval()(x).unique().tolist()) == {28.0}


def test_each_adapter_drops_with_its_own_probability():
    p = 0.875
    layer, x = identities(p)
    y = layer(x)
    assert set(y.unique().tolist()) == {26.0, 42.0}
    # 2048 draws: the share kept is within 6 standard deviations of 1 - p.
    kept = (y == 42).double().mean()
    assert abs(kept - (1 - p)) < 6 * (p * (1 - p) / y.numel()) ** 0.5
    layer.set_adapter(["second", "default"])
    assert set(layer(x).unique().tolist()) == {26.0, 42.0}
