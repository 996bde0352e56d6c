"""The C++ kernels of relu_fwd and act_bwd for every instruction set here, around their slots, tiles and blocks."""

import act_checks as checks
import bounds
import bounds_act
import pytest
import torch
from act_checks import ACTIVATIONS, DTYPES, SMOOTH, mask_of, pair

from peft_kernels._core import native
from peft_kernels.kernels.bias_grad import op

_C = native.EXTENSIONS.get("_C_cpu")
pytestmark = [
    pytest.mark.skipif(_C is None, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}"),
    pytest.mark.usefixtures("poisoned"),
]

RUN = checks.Run(op.relu_fwd, op.act_bwd)


@pytest.fixture(params=_C.available_isas() if _C else [])
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("check", [*checks.CHECKS, checks.check_same_sign], ids=lambda check: check.__name__)
def test_values(isa, check, activation, dtype):
    check(RUN, activation, dtype, "cpu")


# A slot of columns (8 to 32), a tile (256 to 4096), a group of narrow rows (up to 4096 columns), a chain (44 rows), a
# block of rows (44 at least, 32 of them): one less, one more, and a rest of each.
EDGES = [(23, N) for N in (7, 15, 17, 31, 33, 63, 65, 255, 257, 2047, 2049, 4095, 4097, 8200)]
EDGES += [(M, 40) for M in (2, 21, 22, 45, 101, 102, 103, 703, 705, 1500)] + [(1409, 41), (5000, 1)]
EDGES += [(M, 4100) for M in (1, 3, 4, 5, 43, 44, 45, 89)] + [(1409, 2100)]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "rows", "transposed"])
def test_edges(isa, layout, activation, dtype):
    for M, N in EDGES:
        dy, z = pair(M, N, dtype, "cpu", layout)
        checks.check(RUN, dy, z, activation, checks.wide(dtype))
        if activation == "relu":
            checks.check_relu(RUN, z)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_past_the_cache(isa, activation, dtype):
    """Outputs so large that they are written around the cache, or would be if aligned, are as their parts are."""
    N = (16 << 20) // dtype.itemsize // 256
    for shape in ((257, N), (256, N + 1)):
        dy, z = pair(*shape, dtype, "cpu")
        y, kept = op.relu_fwd(z) if activation == "relu" else (z, z)
        dz, _ = op.act_bwd(dy, kept, activation, True, True, dtype)
        for rows in (slice(0, 100), slice(100, None)):
            part, _ = op.act_bwd(dy[rows], kept[rows], activation, True, False, dtype)
            assert torch.equal(dz[rows], part), f"dz of rows {rows} of {list(shape)} differs"
            assert activation != "relu" or torch.equal(y[rows], op.relu_fwd(z[rows])[0])
        assert activation != "relu" or torch.equal(kept, mask_of(z))


WORST = {"gelu": 6, "gelu_tanh": 8, "silu": 6}
"""Error of act'(z), in units of u of level and slope together, beside what rounding gelu_tanh's v costs: 3 u v."""


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("activation", SMOOTH)
def test_derivatives_are_right_to_a_few_roundings(isa, activation, dtype, record_property):
    """Sums of one row are the derivatives in fp32: every bf16 number, and 160,000 of fp32."""
    z = checks.numbers(dtype, "cpu").view(1, -1)
    _, found = op.act_bwd(torch.ones_like(z), z, activation, False, True, torch.float32)
    level, density, factor, argument = bounds_act.parts(z.double().clamp(-1024, 1024), activation)
    terms, u = level + (factor * density).abs(), bounds.unit_roundoff(torch.float32)
    allowed = WORST[activation] + (3 * argument if activation == "gelu_tanh" else 0)
    lowest = bounds.underflow(torch.float32) * (1 + factor.abs())
    error = (found.double() - (level + factor * density)).abs()
    worst = ((error - lowest).clamp(min=0) / (terms * u)).nan_to_num(nan=0.0) - (allowed - WORST[activation])
    record_property("worst", float(worst.max()))
    print(f"{isa} {activation} {dtype}: {float(worst.max()):.2f} u at {float(z.flatten()[worst.argmax()]):.6g}")
    assert worst.max() <= WORST[activation]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dz_and_dbias_do_not_depend_on_each_other(isa, activation):
    for shape in ((300, 4099), (5000, 24)):
        dy, z = pair(*shape, torch.bfloat16, "cpu")
        kept = mask_of(z) if activation == "relu" else z
        dz, dbias = op.act_bwd(dy, kept, activation, True, True, torch.float32)
        assert torch.equal(dz, op.act_bwd(dy, kept, activation, True, False, torch.float32)[0])
        assert torch.equal(dbias, op.act_bwd(dy, kept, activation, False, True, torch.float32)[1])


WRONG = {
    "activation is 'tanh'": lambda dy, z: (dy, z, "tanh", True, True, dy.dtype),
    "dy has shape": lambda dy, z: (dy[0], z, "gelu", True, True, dy.dtype),
    "kept has shape": lambda dy, z: (dy, z[1:], "gelu", True, True, dy.dtype),
    "the mask of dy": lambda dy, z: (dy, z, "relu", True, True, dy.dtype),
    "kept is": lambda dy, z: (dy, z.double(), "silu", True, True, dy.dtype),
    "dtype is": lambda dy, z: (dy, z, "silu", True, True, torch.float16),
    "dy is": lambda dy, z: (dy.long(), z.long(), "silu", True, True, torch.float32),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        op.act_bwd(*WRONG[message](*pair(4, 6, torch.float32, "cpu")))
