"""From how many rows on the 4-bit base is dequantised, once, and multiplied as a 16-bit one.

Below, the 4-bit linear takes the branch as its addend: it holds no dequantised weight, and where it reads the 4-bit
bytes in place a product of few rows costs their time. Above, the dequantised weight, written and read once, is 4.5
bytes an element of traffic against 2 M flops, a tenth of the product at 512 rows on two CPU cores and a quarter on an
H100 (model), and the LoRA linear's GEMM has the branch inside it.

Measured on two cores of a Zen 5, N = K = 2048, R = 16, forward and backward in ms, in place / dequantised: bf16, M = 64
2.3 / 3.2, 128 3.8 / 4.9, 256 6.8 / 7.5, 512 12.6 / 12.4; fp32 4.4 / 6.4, 6.6 / 8.1, 11.7 / 12.7, 22.5 / 22.9. On a GPU
nothing is measured: from 65 rows on its 4-bit linear dequantises too, and the two differ by where the branch is added.
"""

DENSE_ROWS = 512


def is_dense(M: int) -> bool:
    """Whether x of M rows is multiplied by the dequantised weight."""
    return M >= DENSE_ROWS
