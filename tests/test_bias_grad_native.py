"""The C++ kernel of bias_grad for every instruction set that is here, on shapes around its tiles, blocks and groups."""

import bias_grad_checks as checks
import pytest
from bias_grad_checks import DTYPES, gradient

from peft_kernels._core import native
from peft_kernels.kernels.bias_grad import op

_C = native.EXTENSIONS.get("_C_cpu")
pytestmark = [
    pytest.mark.skipif(_C is None, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(params=_C.available_isas() if _C else [])
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("check", [*checks.CHECKS, checks.check_same_sign], ids=lambda check: check.__name__)
def test_values(isa, check, dtype):
    check(op.bias_grad, dtype, "cpu")


# A slot of columns (8 to 32), a tile (4096), a group of narrow rows (up to 4096 columns), a chain (44 rows), a block of
# rows (44 at least, 32 of them), a run of a line (65536): one less, one more, and a rest of each.
EDGES = [(45, N) for N in (7, 9, 15, 17, 31, 32, 33, 63, 65, 2047, 2049, 4095, 4097, 8200, 12_289)]
EDGES += [(M, 40) for M in (2, 4, 5, 43, 44, 47, 101, 102, 103, 1407, 1409, 5000)] + [(65_537, 1), (70_000, 2)]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "rows", "transposed"])
def test_edges(isa, layout, dtype):
    for M, N in EDGES:
        checks.check(op.bias_grad, gradient(M, N, dtype, "cpu", layout))
