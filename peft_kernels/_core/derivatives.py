"""A backward that can run once: differentiating it says what is wrong instead of giving zeros."""

from collections.abc import Callable
from typing import Any

import torch


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, message, gradients, *args):
        ctx.message = message
        return gradients(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.message)


def first_only(message: str, gradients: Callable[..., Any], *args: Any) -> Any:
    """gradients(*args), for the backward of an autograd.Function; a second derivative raises RuntimeError(message).

    Under create_graph the gradients must not pass for constants: a node that raises stands behind them.
    """
    return _Recorded.apply(message, gradients, *args) if torch.is_grad_enabled() else gradients(*args)
