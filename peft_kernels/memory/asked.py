"""What predict_memory is asked, checked: every mistake is named before a step runs on it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from .trace import plain_tensors


def check_callables(build: object, loss: object, optimizer: object) -> None:
    """Before anything is built.

    Raises:
        ValueError: one cannot be called; `build` is a model, which its own call does not make.
    """
    for name, what, one in (
        ("build", "a function without arguments that makes the model", build),
        ("loss", "a function of the model and the batch", loss),
        ("optimizer", "a function of the trainable parameters that makes the optimizer", optimizer),
    ):
        if not callable(one) or isinstance(one, nn.Module):
            raise ValueError(f"{name} is of type {type(one).__name__}; expected {what}")


def built(build: Callable[[], nn.Module], fake: FakeTensorMode) -> nn.Module:
    """The model, every tensor of it without memory.

    Raises:
        ValueError: not a module; one of its tensors was there before, or is not on the CPU; none requires grad.
    """
    with fake:
        model = build()
    if not isinstance(model, nn.Module):
        raise ValueError(f"build returned a value of type {type(model).__name__}; expected a torch.nn.Module")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for inner in plain_tensors(tensor):
            if getattr(inner, "fake_mode", None) is not fake:
                raise ValueError(
                    f"build returned a model whose {name} was made outside it, a {type(inner).__name__} "
                    f"{list(inner.shape)}; expected every tensor to be made while build runs, where none takes memory"
                )
            if inner.device.type != "cpu":
                raise ValueError(
                    f"build put {name} on {inner.device}; expected cpu: it takes no memory there, and arch says "
                    "which GPU is meant"
                )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("build: no parameter of the model requires grad, so that there is no training step")
    return model


def without_memory(batch: Mapping[str, Any], fake: FakeTensorMode) -> dict[str, Any]:
    """The batch with fake tensors for those in it; what is no tensor stays as it is.

    Raises:
        ValueError: no mapping, or a tensor that is not on the CPU.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch is of type {type(batch).__name__}; expected a mapping of argument names to tensors")
    for path, leaf in tree_flatten_with_path(dict(batch))[0]:
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            raise ValueError(
                f"batch{keystr(path)} is on {leaf.device}; expected cpu: only its shape and dtype matter, and arch "
                "says which GPU is meant"
            )

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # autograd would not keep it
            tensor = tensor.clone()
        return fake.from_tensor(tensor, static_shapes=True)

    return tree_map_only(Tensor, convert, dict(batch))


def made_optimizer(optimizer: Callable[..., torch.optim.Optimizer], trainable: list) -> torch.optim.Optimizer:
    made = optimizer(trainable)
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(f"optimizer returned a value of type {type(made).__name__}; expected a torch.optim.Optimizer")
    return made
