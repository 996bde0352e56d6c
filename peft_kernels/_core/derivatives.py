"""When an autograd.Function is needed, and a backward that can run once: differentiating it says what is wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def recorded(function: str, *tensors: Tensor | None) -> bool:
    """Whether autograd must see what `function` makes of these, to differentiate it.

    Where it need not, an autograd.Function is only in the way of a small kernel, as every layer is that decodes.

    Raises:
        RuntimeError: within a transform of torch.func, or compiled within a level of forward mode. Of a tensor that has
            a tangent, the autograd.Function raises it.
    """
    # Tensors of a transform hide that they are differentiated, and those of forward mode require no grad: an op alone
    # would drop their derivatives. The Function would not always refuse them: torch.compile leaves it out where nothing
    # seems to require grad. No public name says that there are such tensors; Function.apply asks the same.
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{function}: functorch transforms (torch.func's vmap, grad, jvp, functionalize and their like) are not "
            "supported; x may have any leading dimensions, and torch.autograd.grad differentiates"
        )
    if forward_ad._current_level >= 0:
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{function}: compiled within torch.autograd.forward_ad, and it has no jvp")
        return True
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, message, gradients, origin, *args):
        ctx.message = message
        return gradients(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.message)


def first_only(message: str, gradients: Callable[..., Any], *args: Any, origin: Tensor | None = None) -> Any:
    """gradients(*args), for the backward of an autograd.Function; a second derivative raises RuntimeError(message).

    Under create_graph the gradients must not pass for constants: a node that raises stands behind them, and before it
    stand those of `args`. Where one is neither an input nor an output of the Function, nothing stands before it:
    `origin` is then an output of it, which may be empty.
    """
    return _Recorded.apply(message, gradients, origin, *args) if torch.is_grad_enabled() else gradients(*args)
