"""Functions that a GPU serves by other operators than a CPU, called as there: what they keep for backward differs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_ATTENTION = F.scaled_dot_product_attention
_CAPTURABLE = "_get_capturable_supported_devices"  # every module of torch.optim has it under its own name


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    out = torch.native_dropout(input, p, True)[0]
    return input.copy_(out) if inplace else out


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, **more) -> Tensor:
    return _ATTENTION(query, key, value, attn_mask, 0.0, **more)


def _capturable(supports_xla: bool = True) -> list[str]:
    return ["cpu"]  # where the fake tensors are


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, dropout keeps a mask of one byte per element, where a CPU keeps one of the input's dtype; attention draws
    its dropout again in backward, where a CPU leaves flash attention and keeps the whole matrix; optimizers may be
    capturable. Not thread-safe.

    A mode would be the cleaner way, but backward leaves modes before it computes a checkpoint again.
    """
    changed = [(F, "dropout", _dropout), (F, "scaled_dot_product_attention", _attention)]
    optimizers = [module for name, module in sys.modules.items() if name.startswith("torch.optim.")]
    changed += [(module, _CAPTURABLE, _capturable) for module in optimizers if hasattr(module, _CAPTURABLE)]
    before = [getattr(module, name) for module, name, _ in changed]
    for module, name, function in changed:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(changed, before, strict=True):
            setattr(module, name, function)
