"""When an autograd.Function is needed, and a backward that can run once: differentiating it says what is wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd must see what is made of these, to differentiate it or to refuse to.

    Where it need not, an autograd.Function is only in the way of a small kernel, as every layer is that decodes.
    """
    # Tensors of a transform hide that they are differentiated, and those of forward mode require no grad: an op alone
    # would drop their derivatives. No public name says that there are such tensors; Function.apply asks the same.
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


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
