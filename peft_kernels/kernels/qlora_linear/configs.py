"""From how many rows on the 4-bit base is dequantised, once, and multiplied as a 16-bit one.

Below, kernels read the 4-bit bytes in place: a product of M rows takes their time from N K / 2 bytes of weights as long
as 2 M flops a weight go unnoticed. Above, the dequantised weight, written and read once, is 4.5 bytes an element of
traffic against 2 M flops: at 512 rows a tenth of the product on two CPU cores, a quarter on an H100, and the rest runs
at a dense product's rate, with the branch inside it (lora_linear's K-extension).
"""

DENSE_ROWS = 65


def is_dense(M: int) -> bool:
    """Whether x of M rows is multiplied by the dequantised weight."""
    return M >= DENSE_ROWS
