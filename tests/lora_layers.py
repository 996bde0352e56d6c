"""Small FusedLoRALinear layers with no zero anywhere, for the tests of the module and of models made of it."""

import bounds
import pytest
import torch
from torch import nn

from peft_kernels import FusedLoRALinear

K, N, R = 19, 13, 5


def randomise(layer: nn.Module) -> None:
    """No zero anywhere, all of order 1: a product that is left out must show."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()


def make(linear: nn.Module | None = None, dtype=torch.float64, **settings) -> FusedLoRALinear:
    linear = (nn.Linear(K, N) if linear is None else linear).to(dtype)
    layer = FusedLoRALinear.from_linear(linear, **{"r": R, "lora_alpha": 8, **settings})
    randomise(layer)
    return layer


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K)


def check_within(results: dict, truth: bounds.Bounded) -> None:
    for name, value in results.items():
        bounds.assert_within(value, *truth[name], name)
