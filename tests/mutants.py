"""What planted faults are made of: each is the reference with one thing wrong, registered in MUTANTS."""

from collections.abc import Callable
from functools import wraps

import torch
from cases import Implementation

from peft_kernels.kernels.lora_linear import reference

FWD = reference.lora_linear_fwd
BWD = reference.lora_linear_bwd
_FWD_NAMES = ("x", "weight", "lora_a", "lora_b", "bias", "seed", "scaling", "threshold")
_BWD_NAMES = ("dy", "x", "weight", "lora_a", "lora_b", "s", "mask", "scaling", "need_dx", "need_dlora_a")
_BWD_NAMES += ("need_dlora_b", "need_dbias")

MUTANTS: dict[str, Implementation] = {}


def forward(fault: Callable) -> Callable:
    """Register `fault(a)`: a holds the op's arguments by name and returns y, s, mask."""

    @wraps(fault)
    def faulty(*args):
        return fault(dict(zip(_FWD_NAMES, args, strict=True)))

    MUTANTS[fault.__name__] = Implementation(fault.__name__, "cpu", faulty, BWD)
    return fault


def backward(fault: Callable) -> Callable:
    """Register `fault(a)`: a holds the op's arguments by name and returns dx, dlora_a, dlora_b, dbias."""

    @wraps(fault)
    def faulty(*args):
        return fault(dict(zip(_BWD_NAMES, args, strict=True)))

    MUTANTS[fault.__name__] = Implementation(fault.__name__, "cpu", FWD, faulty)
    return fault


def run_fwd(a: dict, **changed):
    return FWD(**{**a, **changed})


def run_bwd(a: dict, **changed):
    return BWD(**{**a, **changed})


def with_output(outputs, index: int, new: Callable):
    """The outputs with one replaced, unless it was not asked for."""
    out = list(outputs)
    if out[index].numel():
        out[index] = new(out[index])
    return tuple(out)


def zero_last_row(t):
    return torch.cat([t[:-1], torch.zeros_like(t[-1:])])


def zero_last_column(t):
    return torch.cat([t[:, :-1], torch.zeros_like(t[:, -1:])], dim=1)


def three_bit_significand(t):
    mantissa, exponent = torch.frexp(t.float())
    return torch.ldexp((mantissa * 16).round() / 16, exponent).to(t.dtype)


def sum_in_bf16(left, right, block: int = 16):
    """left @ right with the running sum over blocks of terms kept in bf16."""
    total = torch.zeros(left.shape[0], right.shape[1])
    for start in range(0, left.shape[1], block):
        part = left[:, start : start + block].float() @ right[start : start + block].float()
        total = (total + part).bfloat16().float()
    return total.to(left.dtype)
