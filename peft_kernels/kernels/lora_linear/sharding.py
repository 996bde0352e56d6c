"""Which placements of DTensors the LoRA linear's ops take, per mesh dimension: replicated, data, column, row parallel.

A dropout mask is drawn by the row and column number in the local tensor. Where x is split, that is another mask than
the whole tensor's, so with a seed x stays whole; ranks of one tensor-parallel group must draw the same seed.
"""

from ..._core.sharding import PARTIAL, REPLICATE


def _for(value, placement):
    return None if value is None else placement


def lora_linear_fwd(x, weight, lora_a, lora_b, bias, seed, scaling, threshold) -> list:
    """Placements of (y, s, mask) and of the arguments."""

    def allow(outputs: list, *placements) -> tuple[list, list]:
        tensors = (x, weight, lora_a, lora_b, bias, seed)
        return outputs, [_for(t, p) for t, p in zip(tensors, placements, strict=True)] + [None, None]

    R = REPLICATE
    found = [allow([R, R, R], R, R, R, R, R, R), allow([1, R, R], R, 0, R, 0, 0, R)]
    if seed is None:
        found.append(allow([0, 0, R], 0, R, R, R, R, R))
        if bias is None:  # every rank would add it
            found.append(allow([PARTIAL, PARTIAL, R], 1, 1, 1, R, R, R))
    return found


def lora_linear_bwd(
    dy, x, weight, lora_a, lora_b, s, mask, scaling, need_dx, need_dlora_a, need_dlora_b, need_dbias
) -> list:
    """Placements of (dx, dlora_a, dlora_b, dbias) and of the arguments. What is not needed is empty: replicated."""
    needed = (need_dx, need_dlora_a, need_dlora_b, need_dbias)
    dropout = mask.shape[0] > 0

    def allow(outputs: list, *placements) -> tuple[list, list]:
        tensors = (dy, x, weight, lora_a, lora_b, s, mask)
        given = [_for(t, p) for t, p in zip(tensors, placements, strict=True)]
        return [p if n else REPLICATE for p, n in zip(outputs, needed, strict=True)], given + [None] * 5

    R, P = REPLICATE, PARTIAL
    found = [allow([R, R, R, R], R, R, R, R, R, R, R), allow([P, P, 0, 0], 1, R, 0, R, 0, R, R)]
    found.append(allow([0, P, P, P], 0, 0, R, R, R, 0, 0 if dropout else R))
    if not dropout:
        found.append(allow([1, 1, P, R], R, 1, 1, 1, R, P, R))
    return found
