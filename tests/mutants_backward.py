"""Planted faults of the backward."""

import torch
from mutants import backward, run_bwd, sum_in_bf16, with_output, zero_last_column, zero_last_row

from peft_kernels.kernels.lora_linear import reference


@backward
def masks_of_another_row_in_the_backward(a):
    return run_bwd(a, mask=a["mask"].roll(1, 0) if a["mask"].numel() else a["mask"])


@backward
def mask_not_applied_in_dx(a):
    dx = run_bwd(a, mask=a["mask"].new_empty(0))[0]
    return dx, *run_bwd(a)[1:]


@backward
def mask_not_applied_in_dlora_a(a):
    return with_output(run_bwd(a), 1, lambda _: run_bwd(a, mask=a["mask"].new_empty(0))[1])


@backward
def mask_applied_to_the_base_of_dx(a):
    return with_output(run_bwd(a), 0, lambda dx: reference.apply_mask(dx, a["mask"]))


@backward
def dx_without_the_scale(a):
    return with_output(run_bwd(a), 0, lambda _: run_bwd(a, scaling=1.0)[0])


@backward
def dx_without_the_base(a):
    return with_output(run_bwd(a), 0, lambda _: run_bwd(a, weight=None)[0])


@backward
def dlora_a_without_the_scale(a):
    return with_output(run_bwd(a), 1, lambda d: d / a["scaling"] if a["scaling"] else d)


@backward
def dlora_b_without_the_scale(a):
    return with_output(run_bwd(a), 2, lambda d: d / a["scaling"] if a["scaling"] else d)


@backward
def dx_zero(a):
    return with_output(run_bwd(a), 0, torch.zeros_like)


@backward
def dlora_a_zero(a):
    return with_output(run_bwd(a), 1, torch.zeros_like)


@backward
def dlora_b_zero(a):
    return with_output(run_bwd(a), 2, torch.zeros_like)


@backward
def dbias_misses_a_row(a):
    return with_output(run_bwd(a), 3, lambda d: d - a["dy"][-1] if len(a["dy"]) else d)


@backward
def dbias_summed_in_bf16(a):
    ones = torch.ones(1, len(a["dy"]))
    return with_output(run_bwd(a), 3, lambda d: sum_in_bf16(ones, a["dy"].float())[0].to(d.dtype))


@backward
def g_of_the_wrong_rows(a):
    return with_output(run_bwd(a), 1, lambda _: run_bwd(a, dy=a["dy"].roll(1, 0))[1])


@backward
def dlora_a_misses_the_last_rank(a):
    return with_output(run_bwd(a), 1, zero_last_row)


@backward
def dlora_a_misses_the_tail_of_rows(a):
    rows = a["dy"].shape[0] // 16 * 16
    x, mask = a["x"], a["mask"]
    if x is None:
        return run_bwd(a)
    s = None if a["s"] is None else a["s"][:rows]
    head = run_bwd(a, dy=a["dy"][:rows], x=x[:rows], s=s, mask=mask[:rows] if mask.numel() else mask)
    return with_output(run_bwd(a), 1, lambda _: head[1])


@backward
def dlora_a_summed_in_bf16(a):
    if a["x"] is None:
        return run_bwd(a)
    g = a["dy"] @ a["lora_b"].to(a["dy"].dtype)
    x = reference.apply_mask(a["x"], a["mask"])
    return with_output(run_bwd(a), 1, lambda d: (sum_in_bf16(g.t(), x) * a["scaling"]).to(d.dtype))


@backward
def dlora_b_written_transposed(a):
    return with_output(run_bwd(a), 2, lambda d: d.t().reshape(d.shape))


@backward
def dlora_b_from_another_s(a):
    return with_output(run_bwd(a), 2, lambda _: run_bwd(a, s=a["s"].flip(1))[2])


@backward
def lora_b_used_with_its_ranks_reversed(a):
    return run_bwd(a, lora_b=a["lora_b"].flip(1))


@backward
def dx_last_column_dropped(a):
    return with_output(run_bwd(a), 0, zero_last_column)


@backward
def dlora_b_tail_not_written(a):
    def stale(d):
        out = torch.empty_like(d)
        rows = d.shape[0] // 16 * 16
        out[:rows] = d[:rows]
        return out

    return with_output(run_bwd(a), 2, stale)


@backward
def gradients_of_the_adapters_in_the_wrong_dtype(a):
    return with_output(run_bwd(a), 1, lambda d: d.to(torch.float64))


@backward
def saved_s_overwritten(a):
    grads = run_bwd(a)
    if a["s"] is not None:
        a["s"].mul_(a["scaling"])
    return grads
