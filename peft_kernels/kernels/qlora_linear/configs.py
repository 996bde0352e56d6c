"""From how many rows on the 4-bit base is dequantised, once, and multiplied as a 16-bit one.

Below, the 4-bit linear takes the branch as its addend: it holds no dequantised weight, and where it reads the 4-bit
bytes in place a product of few rows costs their time. Above, the dequantised weight, written and read once, is 4.5
bytes an element of traffic against 2 M flops, a tenth of the product at 512 rows on two CPU cores and a quarter on an
H100 (model), and the LoRA linear's GEMM has the branch inside it.

Measured on two cores of a Zen 5, N = K = 2048, R = 16, forward and backward in ms, in place / dequantised, M = 128 to
2048: bf16 3.5 / 4.3, 6.3 / 7.3, 12.0 / 12.3, 22.8 / 22.6, 45.1 / 43.1; fp32 6.3 / 7.8, 11.7 / 12.9, 22.7 / 23.4,
45.3 / 45.1, 90.5 / 87.7: level from 512 to 1024. On two of a Zen 4 (`python -m benchmarks.paths qlora_linear`, commit
b40118d), over the frozen linear: bf16 1.08 / 1.23, 1.14 / 1.19, 1.14 / 1.11, 1.13 / 1.04, 1.11 / 1.03; fp32 0.83 /
1.02, 0.86 / 0.92, 0.88 / 0.85, 0.88 / 0.86, 0.93 / 0.86: dequantised from 512 on.

On a GPU nothing is measured: from 65 rows on its 4-bit linear dequantises too, by chunks, of which a product of 512
rows leaves many multiprocessors idle (model).
"""

from collections.abc import Iterator
from contextlib import contextmanager

DENSE_ROWS = 512
_forced: list[bool] = []


@contextmanager
def force(dense: bool) -> Iterator[None]:
    """Inside, x of any number of rows is multiplied by the dequantised weight, or none is; not thread-safe."""
    _forced.append(dense)
    try:
        yield
    finally:
        _forced.pop()


def is_dense(M: int) -> bool:
    """Whether x of M rows is multiplied by the dequantised weight."""
    return _forced[-1] if _forced else M >= DENSE_ROWS
