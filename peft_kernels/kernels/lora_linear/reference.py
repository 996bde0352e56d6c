"""The LoRA linear's maths, once: forward, every gradient, and the dropout mask, in plain PyTorch.

Notation: x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R], s = drop(x) @ lora_a.T [M, R].

    y       = x @ weight.T + bias + scaling * s @ lora_b.T          (Hu et al. 2021, arXiv 2106.09685, eq. 3)
    g       = dy @ lora_b                                           [M, R]
    dx      = dy @ weight + scaling * drop(g @ lora_a)
    dlora_a = scaling * g.T @ drop(x)
    dlora_b = scaling * dy.T @ s
    dbias   = dy.sum(0)

Only the low-rank product is scaled. drop zeroes elements by a 1-bit mask and does not rescale: the
factor 1 / (1 - p) is the same for every element, so it lives in `scaling` (`_shared.drop_levels`).
"""

import torch
from torch import Tensor

PHILOX_ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al. 2011, Random123, table 2)
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """32 x 32 -> 64 bits in int64 without overflow: (high word, low word)."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _philox(seed: Tensor, counter: Tensor) -> list[Tensor]:
    """Philox4x32 words for 64-bit counters, each as int64 in [0, 2**32). seed: int64 [1] is the 64-bit key."""
    key = [seed & _U32, (seed >> 32) & _U32]
    zero = torch.zeros_like(counter)
    c = [counter & _U32, (counter >> 32) & _U32, zero, zero]
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _mulhilo(_PHILOX_M[0], c[0])
        hi1, lo1 = _mulhilo(_PHILOX_M[1], c[2])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(k + w) & _U32 for k, w in zip(key, _PHILOX_W, strict=True)]
    return c


def dropout_mask(seed: Tensor, M: int, K: int, threshold: int) -> Tensor:
    """Which elements of x [M, K] to keep: uint8 [M, ceil(K / 8)], bit j (lowest first) of byte b is k = 8 b + j.

    Byte b of row m takes one Philox call at counter m * ceil(K / 8) + b; its eight 16-bit lanes are the low
    halves of the four words, then their high halves. An element is kept when its lane >= threshold.
    Bits past K are unspecified; readers ignore them.
    """
    row_bytes = -(-K // 8)
    counter = torch.arange(M * row_bytes, dtype=torch.int64, device=seed.device)
    words = _philox(seed, counter)
    lanes = [word & 0xFFFF for word in words] + [word >> 16 for word in words]
    mask = torch.zeros_like(counter)
    for j, lane in enumerate(lanes):
        mask |= (lane >= threshold).to(torch.int64) << j
    return mask.to(torch.uint8).view(M, row_bytes)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x [M, K] with the elements whose mask bit is 0 set to 0 (an empty mask keeps all)."""
    if mask.numel() == 0:
        return x
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    keep = (bits & 1).view(mask.shape[0], -1)[:, : x.shape[1]].bool()
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward. Returns y [M, N] and s [M, R] in x's dtype, and mask (uint8 [M, ceil(K / 8)], [0] without dropout).

    weight None leaves the base product out: y is the low-rank branch alone. lora_a and lora_b may be of another
    floating dtype than x: they are cast, x never is. bias may be of any floating dtype.
    """
    M, K = x.shape
    mask = x.new_empty(0, dtype=torch.uint8) if seed is None else dropout_mask(seed, M, K, threshold)
    s = apply_mask(x, mask) @ lora_a.to(x.dtype).t()
    y = (s @ lora_b.to(x.dtype).t()) * scaling
    if bias is not None:
        y = y + bias.to(x.dtype)
    if weight is not None:
        # The base comes last: added to a 16-bit base, a small delta would round away (tests/test_small_delta.py).
        y = torch.addmm(y, x, weight.to(x.dtype).t())
    return y, s, mask


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    mask: Tensor,
    scaling: float,
    need_dx: bool,
    need_dlora_a: bool,
    need_dlora_b: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward. Returns dx [M, K] in dy's dtype, dlora_a [R, K] and dlora_b [N, R] in the adapters' dtypes, and
    dbias [N] in fp32 (fp64 for fp64).

    What is not needed comes back as an empty [0] tensor. x may be None without dlora_a, s without dlora_b.
    """
    a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
    dx, dlora_a, dlora_b, dbias = (dy.new_empty(0) for _ in range(4))
    if need_dx or need_dlora_a:
        g = dy @ b
    if need_dx:
        dx = apply_mask(g @ a, mask)
        dx = dx * scaling
        if weight is not None:
            dx = torch.addmm(dx, dy, weight.to(dy.dtype))
    if need_dlora_a:
        dlora_a = ((g.t() @ apply_mask(x, mask)) * scaling).to(lora_a.dtype)
    if need_dlora_b:
        dlora_b = ((dy.t() @ s) * scaling).to(lora_b.dtype)
    if need_dbias:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return dx, dlora_a, dlora_b, dbias
