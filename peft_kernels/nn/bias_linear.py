"""BiasLinear: nn.Linear, and an activation behind it, with a backward made for training the bias alone."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.bias_grad.activations import check_activation
from ..kernels.bias_grad.autograd import bias_linear
from .base_linear import refusal
from .dispatch import give_dispatch, take_dispatch
from .hooks import move_hooks


def _activated(y: Tensor, activation: str | None) -> Tensor:
    """By Torch, for the layer that has no bias to make a gradient of."""
    if activation is None:
        return y
    if activation.startswith("gelu"):
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.relu(y) if activation == "relu" else F.silu(y)


class BiasLinear(nn.Linear):
    """y = activation(x W^T + bias): nn.Linear's constructor, Parameters and state_dict keys.

    For the backward it keeps the weight if x requires grad, x only if the weight does, and with an activation what
    `peft_kernels.bias_linear` says. No second derivative.

    Args:
        activation: "relu", "gelu" (exact), "gelu_tanh", "silu" or None, computed with the bias gradient in one pass.
            Hooks see the activated output.

    Raises:
        ValueError: another activation.
    """

    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: str | None = None,
    ):
        if activation is not None:
            check_activation(type(self).__name__, activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = None) -> "BiasLinear":
        """A BiasLinear on the very Parameters of an nn.Linear, whose hooks move over with their handles.

        Raises:
            ValueError: not an nn.Linear, or one that cannot be replaced, with the reason.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"BiasLinear cannot replace this layer: {type(linear).__name__} is not nn.Linear")
        reason = refusal(linear)
        if reason is not None:
            raise ValueError(f"BiasLinear cannot replace this layer: {reason}")
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", activation=activation)
        layer.weight, layer.bias = linear.weight, linear.bias
        hook = take_dispatch(linear)
        move_hooks(linear, layer)
        give_dispatch(layer, hook)
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] in weight's dtype (under autocast any floating dtype) -> [..., N]."""
        if self.bias is None:
            return _activated(F.linear(input, self.weight), self.activation)
        return bias_linear(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
