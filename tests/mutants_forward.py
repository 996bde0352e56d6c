"""Planted faults of the forward and of its mask."""

import torch
from mutants import forward, run_fwd, sum_in_bf16, three_bit_significand, with_output, zero_last_column, zero_last_row

from peft_kernels.kernels._shared import drop_levels
from peft_kernels.kernels.lora_linear import reference


@forward
def y_without_the_scale(a):
    return run_fwd(a, scaling=1.0)


@forward
def y_scales_the_base_too(a):
    return with_output(run_fwd(a, scaling=1.0), 0, lambda y: y * a["scaling"])


@forward
def y_scales_twice(a):
    return run_fwd(a, scaling=a["scaling"] ** 2)


@forward
def y_without_the_delta(a):
    return run_fwd(a, scaling=0.0)


@forward
def y_without_the_base(a):
    return run_fwd(a, weight=None)


@forward
def y_without_the_bias(a):
    return run_fwd(a, bias=None)


@forward
def bias_scaled(a):
    return run_fwd(a, bias=None if a["bias"] is None else a["bias"] * a["scaling"])


@forward
def scale_without_the_dropout_factor(a):
    return run_fwd(a, scaling=a["scaling"] * (1 - a["threshold"] / drop_levels.DROP_LEVELS))


@forward
def y_last_row_dropped(a):
    return with_output(run_fwd(a), 0, zero_last_row)


@forward
def y_last_column_dropped(a):
    return with_output(run_fwd(a), 0, zero_last_column)


@forward
def y_tail_tile_not_written(a):
    def stale(y):
        out = torch.empty_like(y)
        rows = y.shape[0] // 16 * 16
        out[:rows] = y[:rows]
        return out

    return with_output(run_fwd(a), 0, stale)


@forward
def rank_rounded_down_to_a_multiple_of_8(a):
    R = a["lora_a"].shape[0] // 8 * 8
    _, s, mask = run_fwd(a)
    return run_fwd(a, lora_a=a["lora_a"][:R], lora_b=a["lora_b"][:, :R])[0], s, mask


@forward
def last_rank_ignored(a):
    return run_fwd(a, lora_a=zero_last_row(a["lora_a"]))


@forward
def s_misses_the_last_k(a):
    return run_fwd(a, lora_a=zero_last_column(a["lora_a"]))


@forward
def base_misses_the_last_k(a):
    return run_fwd(a, weight=None if a["weight"] is None else zero_last_column(a["weight"]))


@forward
def lora_b_read_as_its_transpose(a):
    N, R = a["lora_b"].shape
    return run_fwd(a, lora_b=a["lora_b"].reshape(R, N).t())


@forward
def strides_of_x_ignored(a):
    x = a["x"]
    return run_fwd(a, x=x.as_strided(x.shape, (x.shape[1], 1)) if x.stride() == (1, x.shape[0]) else x)


@forward
def s_of_another_adapter(a):
    return with_output(run_fwd(a), 1, lambda s: s.flip(1))


@forward
def s_saved_with_the_scale(a):
    return with_output(run_fwd(a), 1, lambda s: s * a["scaling"])


@forward
def s_saved_without_dropout(a):
    return with_output(run_fwd(a), 1, lambda s: a["x"] @ a["lora_a"].to(a["x"].dtype).t())


@forward
def s_rounded_like_fp8(a):
    return with_output(run_fwd(a, lora_a=three_bit_significand(a["lora_a"])), 1, three_bit_significand)


@forward
def delta_from_an_s_rounded_like_fp8(a):
    y, s, mask = run_fwd(a)
    error = (three_bit_significand(s) - s) @ a["lora_b"].to(s.dtype).t() * a["scaling"]
    return y + error, s, mask


@forward
def base_summed_in_bf16(a):
    if a["weight"] is None:
        return run_fwd(a)
    y, s, mask = run_fwd(a, weight=None)
    return y + sum_in_bf16(a["x"], a["weight"].t()), s, mask


@forward
def mask_applied_one_row_off(a):
    y, s, mask = run_fwd(a)
    if mask.numel():
        x = reference.apply_mask(a["x"], mask.roll(1, 0))
        s = x @ a["lora_a"].to(x.dtype).t()
    return y, s, mask


@forward
def mask_bits_from_the_top(a):
    def reverse(mask):
        return sum(((mask >> j) & 1) << (7 - j) for j in range(8)).to(torch.uint8)

    return with_output(run_fwd(a), 2, reverse)


@forward
def mask_inverted(a):
    return with_output(run_fwd(a), 2, lambda mask: ~mask)


@forward
def mask_from_another_seed(a):
    return run_fwd(a, seed=None if a["seed"] is None else a["seed"] + 1)


@forward
def mask_keeps_lanes_above_the_threshold_only(a):
    y, s, mask = run_fwd(a)
    if a["seed"] is not None:
        mask = reference.dropout_mask(a["seed"], *a["x"].shape, a["threshold"] + 1)
    return y, s, mask


@forward
def last_bit_differs_between_runs(a):
    return with_output(run_fwd(a), 0, lambda y: torch.nextafter(y, y + torch.rand_like(y) * 2 - 1))
