"""Planted faults of relu_fwd and act_bwd: each must turn a check red (test_bias_act_mutation.py)."""

import math
from collections.abc import Callable

import act_checks as checks
import torch

from peft_kernels.kernels.bias_grad import activations
from peft_kernels.kernels.bias_grad.activations import ACTIVATIONS, derivative

BACKWARD: dict[str, tuple[Callable, tuple[str, ...]]] = {}
"""Fault -> (an act_bwd, the activations that it touches)."""
FORWARD: dict[str, Callable] = {}
"""Fault -> a relu_fwd."""


def _act_bwd(*args):
    return activations.act_bwd(*args)


def fault(*touched: str) -> Callable:
    """An act_bwd with a fault, for the activations named (all without a name)."""

    def plant(function: Callable) -> Callable:
        BACKWARD[function.__name__] = function, touched or ACTIVATIONS
        return function

    return plant


def slope_fault(*touched: str) -> Callable:
    """act_bwd with another derivative: a function of fp32 or fp64 z."""

    def plant(function: Callable) -> Callable:
        def act_bwd(dy, kept, activation, need_dz, need_dbias, dtype):
            carried = checks.wide(dy.dtype)
            product = dy.to(carried) * function(kept.to(carried), activation)
            dz = product.to(dy.dtype).contiguous() if need_dz else dy.new_empty(0)
            return dz, product.sum(0).to(dtype) if need_dbias else dy.new_empty(0, dtype=dtype)

        BACKWARD[function.__name__] = act_bwd, touched or checks.SMOOTH
        return function

    return plant


@slope_fault("gelu", "gelu_tanh")
def the_other_formula_of_gelu(z, activation):
    return derivative(z, "gelu" if activation == "gelu_tanh" else "gelu_tanh")


@slope_fault()
def another_activation(z, activation):
    return derivative(z, {"gelu": "silu", "gelu_tanh": "silu", "silu": "gelu"}[activation])


@slope_fault("gelu")
def erf_of_z_unscaled(z, activation):
    return 0.5 * torch.erfc(-z) + derivative(z, activation) - 0.5 * torch.erfc(-math.sqrt(0.5) * z)


@slope_fault("gelu")
def the_density_term_dropped(z, activation):
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)


@slope_fault("silu")
def the_slope_dropped(z, activation):
    return torch.sigmoid(z)


@slope_fault("gelu_tanh")
def the_inner_derivative_left_out(z, activation):
    v = activations.TANH_SCALE * z * (1 + activations.TANH_CUBE * z * z)
    s = torch.sigmoid(v)
    return s + (z * activations.TANH_SCALE * s * torch.sigmoid(-v)).nan_to_num()


@slope_fault("gelu_tanh")
def the_cube_by_its_rounded_constant(z, activation):
    v = activations.TANH_SCALE * z * (1 + 0.0447 * z * z)
    density = torch.sigmoid(v) * torch.sigmoid(-v)
    slope = z * density * activations.TANH_SCALE * (1 + 3 * 0.0447 * z * z)
    return torch.sigmoid(v) + torch.where(density > 0, slope, 0)


@slope_fault("gelu")
def a_tail_that_cancels(z, activation):
    """0.5 + 0.5 erf(z / sqrt(2)), below -4 off by more than a bf16 can show."""
    slope = derivative(z, activation) - 0.5 * torch.erfc(-math.sqrt(0.5) * z)
    return 0.5 + 0.5 * torch.erf(math.sqrt(0.5) * z.float()) + slope


@slope_fault()
def infinity_times_zero(z, activation):
    return derivative(z, activation) + z * 0


@slope_fault()
def a_nan_lost(z, activation):
    return derivative(z, activation).nan_to_num()


@slope_fault()
def the_derivative_in_bf16(z, activation):
    return derivative(z, activation).bfloat16().to(z.dtype)


@slope_fault()
def the_sign_of_z_lost(z, activation):
    return derivative(z.abs(), activation)


@slope_fault()
def cut_off_at_4(z, activation):
    return torch.where(z < -4, 0, derivative(z, activation))


@fault()
def rounded_products_summed(dy, kept, activation, need_dz, need_dbias, dtype):
    dz, _ = _act_bwd(dy, kept, activation, True, False, dtype)
    dbias = dz.sum(0, dtype=checks.wide(dy.dtype)).to(dtype) if need_dbias else dy.new_empty(0, dtype=dtype)
    return dz if need_dz else dy.new_empty(0), dbias


@fault()
def dbias_of_dy(dy, kept, activation, need_dz, need_dbias, dtype):
    dz, dbias = _act_bwd(dy, kept, activation, need_dz, need_dbias, dtype)
    return dz, dy.sum(0, dtype=checks.wide(dy.dtype)).to(dtype) if need_dbias else dbias


@fault()
def the_last_row_not_summed(dy, kept, activation, need_dz, need_dbias, dtype):
    dz, _ = _act_bwd(dy, kept, activation, need_dz, False, dtype)
    return dz, _act_bwd(dy[:-1], kept[:-1], activation, False, need_dbias, dtype)[1]


@fault()
def dbias_rounded_to_bf16(dy, kept, activation, need_dz, need_dbias, dtype):
    dz, dbias = _act_bwd(dy, kept, activation, need_dz, need_dbias, dtype)
    return dz, dbias.bfloat16().to(dtype)


@fault()
def dz_cut_instead_of_rounded(dy, kept, activation, need_dz, need_dbias, dtype):
    """The lower half of an fp32 dropped; an fp32 dz loses as many bits."""
    _, dbias = _act_bwd(dy, kept, activation, False, need_dbias, dtype)
    exact = _act_bwd(
        dy.float(), kept if activation == "relu" else kept.float(), activation, need_dz, False, dy.float().dtype
    )[0]
    lost = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 8}[dy.dtype]
    return (exact.view(torch.int32) >> lost << lost).view(torch.float32).to(dy.dtype), dbias


@fault()
def dz_as_dy_is_laid_out(dy, kept, activation, need_dz, need_dbias, dtype):
    dz, dbias = _act_bwd(dy, kept, activation, need_dz, need_dbias, dtype)
    return dz.t().contiguous().t() if need_dz and dy.stride(0) < dy.stride(1) else dz, dbias


@fault()
def dz_where_it_is_not_needed(dy, kept, activation, need_dz, need_dbias, dtype):
    return _act_bwd(dy, kept, activation, True, need_dbias, dtype)


@fault()
def dbias_as_not_needed(dy, kept, activation, need_dz, need_dbias, dtype):
    return _act_bwd(dy, kept, activation, need_dz, need_dbias and need_dz, dtype)


@fault()
def dy_written_to(dy, kept, activation, need_dz, need_dbias, dtype):
    out = _act_bwd(dy, kept, activation, need_dz, need_dbias, dtype)
    if need_dz and dy.numel() and 0 not in dy.stride():
        dy.copy_(out[0])
    return out


@fault()
def the_last_column_not_written(dy, kept, activation, need_dz, need_dbias, dtype):
    dz, dbias = _act_bwd(dy, kept, activation, need_dz, need_dbias, dtype)
    out = torch.empty_like(dz)
    out[..., :-1] = dz[..., :-1]
    return out, dbias


@fault("relu")
def bits_read_from_the_highest(dy, kept, activation, need_dz, need_dbias, dtype):
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    bits = (kept.unsqueeze(2) & weights) != 0
    return _act_bwd(dy, (bits.flip(2) * weights).sum(2, dtype=torch.uint8), activation, need_dz, need_dbias, dtype)


@fault("relu")
def rows_of_the_mask_without_their_last_bits(dy, kept, activation, need_dz, need_dbias, dtype):
    """A row pitch of N // 8 bytes instead of the next whole number."""
    bits = kept.flatten()
    pitch = max(1, dy.shape[1] // 8)
    at = torch.arange(kept.shape[0]).unsqueeze(1) * pitch + torch.arange(kept.shape[1])
    return _act_bwd(dy, bits[at] if bits.numel() else kept, activation, need_dz, need_dbias, dtype)


@fault("relu")
def what_is_stopped_multiplied_by_zero(dy, kept, activation, need_dz, need_dbias, dtype):
    ones, _ = _act_bwd(torch.ones_like(dy), kept, activation, True, False, dtype)
    product = dy * ones
    dbias = product.sum(0, dtype=checks.wide(dy.dtype)).to(dtype) if need_dbias else dy.new_empty(0, dtype=dtype)
    return product.contiguous() if need_dz else dy.new_empty(0), dbias


def forward_fault(function: Callable) -> Callable:
    FORWARD[function.__name__] = function
    return function


@forward_fault
def a_nan_stopped(z):
    return activations.relu_fwd(torch.where(z > 0, z, 0))


@forward_fault
def zero_passes(z):
    _, mask = activations.relu_fwd(torch.where(z == 0, 1, z))
    return activations.relu_fwd(z)[0], mask


@forward_fault
def a_subnormal_stopped(z):
    return activations.relu_fwd(torch.where(z.abs() < torch.finfo(z.dtype).tiny, 0, z))


@forward_fault
def bits_past_the_end_set(z):
    y, mask = activations.relu_fwd(z)
    mask[:, -1:] |= 255 << z.shape[1] % 8 & 255 if z.shape[1] % 8 else 0
    return y, mask


@forward_fault
def y_laid_out_as_z(z):
    y, mask = activations.relu_fwd(z)
    return torch.where(z <= 0, 0, z), mask


@forward_fault
def bits_of_another_row(z):
    y, mask = activations.relu_fwd(z)
    return y, mask.roll(1, 0)
