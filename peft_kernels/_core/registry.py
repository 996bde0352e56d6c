"""define_op: a schema, its reference, its fake, its Triton kernel and its declared temporaries, in one call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import native

_NAMESPACE = "peft_kernels"
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")

OWNERS: dict[tuple[str, str], str] = {}
"""(op, dispatch key) -> "native", "triton" or "reference": which kernel runs, decided at import."""

WORKSPACE: dict[str, Callable[..., int]] = {}
"""op -> function of the op's arguments giving the bytes of temporaries that it allocates inside, at most.

A fake kernel shows a memory predictor only the outputs; this table shows it the rest. For tensors that are on no GPU it
answers for the one that `planned_for` names.
"""

_planned = [90]


@contextmanager
def planned_for(arch: int) -> Iterator[None]:
    """Inside, plans for tensors on a CPU are those of compute capability `arch` (90 for 9.0); not thread-safe."""
    _planned.append(arch)
    try:
        yield
    finally:
        _planned.pop()


def planned_arch() -> int:
    return _planned[-1]


def define_op(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: Callable | None = None,
    workspace: Callable[..., int] | None = None,
) -> Callable:
    """Register `schema` under `torch.ops.peft_kernels` and return the callable op.

    The reference becomes the default kernel, so the op works on every device. A C++ extension that
    implements the op (`TORCH_LIBRARY_IMPL`) owns its key; on CUDA `triton` comes next, and takes what the extension
    does not, under the op's name with "_general" behind it.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{_NAMESPACE}::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    for key in ("CPU", "CUDA"):
        if native.has_native_kernel(qualified, key):
            OWNERS[name, key] = "native"
            if key == "CUDA":  # its kernels are for some GPUs, dtypes and layouts: it hands the rest on by this name
                _LIBRARY.define(schema.replace(name, f"{name}_general", 1))
                _LIBRARY.impl(f"{name}_general", triton or reference, key)
        elif key == "CUDA" and triton is not None:
            _LIBRARY.impl(name, triton, key)
            OWNERS[name, key] = "triton"
        else:
            OWNERS[name, key] = "reference"
    if workspace is not None:
        WORKSPACE[name] = workspace
    return getattr(torch.ops.peft_kernels, name).default
