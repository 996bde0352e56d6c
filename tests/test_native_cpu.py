"""The C++ CPU kernels, for every instruction set here: values, gradients, dropout, blocking edges, threads."""

import bounds
import checks
import pytest
import torch
from cases import DTYPES, LONG_SUMS, VALUE_CASES, Case, Implementation, inputs

from peft_kernels._core import native
from peft_kernels.kernels.lora_linear import op, reference

_C = native.EXTENSIONS.get("_C_cpu")
pytestmark = [
    pytest.mark.skipif(_C is None, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}"),
    pytest.mark.usefixtures("poisoned"),
]
ISAS = _C.available_isas() if _C else []
IMPL = Implementation("native", "cpu", op.lora_linear_fwd, op.lora_linear_bwd)

EDGES = [
    # Past one chunk of columns (256, bf16 512), one block of rows (288), one panel of ranks (64) and of columns.
    Case(M, N, K, R, dtype, dropout=dropout)
    for dtype in DTYPES
    for M, N, K, R, dropout in (
        (289, 513, 259, 65, 0.1),
        (191, 255, 1027, 257, 0.0),
        (7, 1, 33, 130, 0.5),
        (577, 33, 1, 48, 0.0),
        (288, 70, 520, 65, 0.1),
        (50, 1100, 2100, 16, 0.0),  # of the weight: more than one group of packed columns in fp32, more than one chain
    )
] + [Case(M, 40, 50, 8, torch.float32, adapters=torch.float64) for M in (3, 9)]  # narrowed, by a kernel or before


@pytest.fixture(params=[f"{isa}-{base}" for isa in ISAS for base in ("fused", "blas")])
def isa(request):
    """Every instruction set, with the base product inside the kernels and by the BLAS."""
    before = _C.isa()
    isa, base = request.param.split("-")
    _C.set_isa(isa)
    _C.set_base_product(base)
    yield isa
    _C.set_isa(before)
    _C.set_base_product("auto")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", VALUE_CASES + EDGES, ids=str)
def test_values(isa, case):
    for check in checks.CHECKS:
        check(IMPL, case)


@pytest.mark.parametrize(
    "case", [Case(7000, 20, 13, 5, t) for t in DTYPES] + [Case(5, 40, 5000, 9, t) for t in DTYPES], ids=str
)
def test_sums_of_several_levels(isa, case):
    """Long enough that partial sums over rows, and over columns, are joined into totals."""
    for check in checks.CHECKS:
        check(IMPL, case)


@pytest.mark.parametrize("case", LONG_SUMS, ids=str)
def test_long_sums_of_one_sign(isa, case):
    """The full bound holds here: with no weight every sum is ours."""
    case = Case(case.M, case.N, case.K, case.R, case.dtype, weight=None, positive=True)
    for check in checks.CHECKS:
        check(IMPL, case)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("adapters", [torch.float32, torch.float16], ids=str)
def test_long_sums_of_few_rows(name, adapters):
    """The same where adapters are read in place, in their own dtype."""
    before = _C.isa()
    _C.set_isa(name)
    try:
        case = Case(3, 2500, 2600, 70, torch.float32, weight=None, positive=True, adapters=adapters)
        for check in checks.CHECKS:
            check(IMPL, case)
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize(
    "case",
    [Case(13, 1500, 1600, 3, dtype, positive=True) for dtype in DTYPES[:3]] + [Case(7, 70_001, 20, 3, positive=True)],
    ids=str,
)
def test_long_sums_over_the_weight(case):
    """The full bound for the base product that starts with the low-rank one: up to a vocabulary's length."""
    _C.set_base_product("fused")
    try:
        for check in checks.CHECKS:
            check(IMPL, case)
    finally:
        _C.set_base_product("auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48, 40), (50, 65)], ids=str)
def test_weights_of_any_layout(isa, dtype, shape):
    """Columns first (GPT-2's Conv1D), and strided both ways."""
    M, K = 33, 70
    N = shape[0]
    for turned in (torch.randn(K, N).t(), torch.randn(N, 2 * K)[:, ::2], torch.randn(1, K).expand(N, K)):
        weight, x, dy = turned.to(dtype), torch.randn(M, K).to(dtype), torch.randn(M, shape[0]).to(dtype)
        lora_a, lora_b = torch.randn(shape[1], K).to(dtype), torch.randn(shape[0], shape[1]).to(dtype)
        y, s, mask = op.lora_linear_fwd(x, weight, lora_a, lora_b, None, None, 0.5, 0)
        truth = bounds.forward(x, weight, lora_a, lora_b, None, mask, 0.5)
        bounds.assert_within(y, *truth["y"], "y")
        dx, _, _, _ = op.lora_linear_bwd(dy, x, weight, lora_a, lora_b, s, mask, 0.5, True, False, False, False)
        truth = bounds.backward(dy, x, weight, lora_a, lora_b, s, mask, 0.5)
        bounds.assert_within(dx, *truth["dx"], "dx")


def test_base_product_is_chosen_by_rows_and_layout():
    """Along the weight's lines the BLAS is ahead for longer; off AVX-512 AMD it is always taken."""
    rows = (1, 11, 12, 63, 64, 511, 512, 100_000)
    taken = {
        (bf16, along): [_C.base_product(bf16, M, along) == "fused" for M in rows]
        for bf16 in (True, False)
        for along in (True, False)
    }
    for flags in taken.values():
        assert flags == sorted(flags), "more rows never go back to the BLAS"
    if taken[True, True][-1]:
        assert [sum(taken[key]) for key in ((True, True), (True, False), (False, True), (False, False))] == [2, 4, 6, 6]
    before = _C.isa()
    _C.set_isa(ISAS[0])
    assert ISAS[0] in ("avx512", "avx512bf16") or not any(_C.base_product(False, M, False) == "fused" for M in rows)
    _C.set_isa(before)


@pytest.mark.parametrize("M", [3, 9])
def test_rank_zero_is_refused(M):
    x, lora_a, lora_b = torch.randn(M, 6), torch.zeros(0, 6), torch.zeros(5, 0)
    with pytest.raises(RuntimeError, match="expected a rank of at least 1"):
        op.lora_linear_fwd(x, None, lora_a, lora_b, None, None, 1.0, 0)
    dy, s, mask = torch.randn(M, 5), torch.zeros(M, 0), torch.empty(0, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="expected a rank of at least 1"):
        op.lora_linear_bwd(dy, x, None, lora_a, lora_b, s, mask, 1.0, True, True, True, False)


def test_base_product_by_a_name_that_is_none():
    with pytest.raises(ValueError, match="unknown base product 'mkl'; expected one of auto, blas, fused"):
        _C.set_base_product("mkl")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_any_subset_of_gradients(isa, dtype, dropout):
    checks.check_subsets(IMPL, Case(37, 53, 71, 12, dtype, dropout=dropout))
    checks.check_subsets(IMPL, Case(0, 17, 13, 3, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_run(isa, dtype):
    checks.check_repeats(IMPL, Case(257, 300, 515, 24, dtype, dropout=0.1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_any_number_of_threads(isa, threads, count, dtype):
    threads(count)
    for M in (0, 1, 23, 300):
        case = Case(M, 65, 33, 16, dtype, dropout=0.1 if M else 0.0)
        for check in checks.CHECKS:
            check(IMPL, case)


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_with_several_panels_or_none(threads, count, dtype):
    threads(count)
    for case in (Case(23, 700, 1100, 130, dtype, dropout=0.1), Case(3, 1300, 1320, 160, dtype)):  # packed, and not
        for check in checks.CHECKS:
            check(IMPL, case)


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535, 65536])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 33), (130, 257)], ids=str)
def test_mask_is_the_references(isa, shape, threshold):
    for seed in (0, -1, 0x123456789ABCDEF, -(2**63)):
        key = torch.tensor([seed])
        x = torch.randn(shape)
        _, _, mask = op.lora_linear_fwd(x, None, torch.randn(2, shape[1]), torch.randn(3, 2), None, key, 1.0, threshold)
        expected = reference.dropout_mask(key, *shape, threshold)
        assert torch.equal(bounds.keep_bits(mask, shape[1]), bounds.keep_bits(expected, shape[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_passes_through(isa, dtype):
    """x and s cross the storage type: with A = 1 every finite value comes back as itself (subnormals may flush)."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    x = x[x.isfinite().flatten()]
    one = torch.ones(1, 1, dtype=dtype)
    _, s, _ = op.lora_linear_fwd(x, None, one, one, None, None, 1.0, 0)
    assert ((s == x) | ((x.abs() < torch.finfo(dtype).smallest_normal) & (s == 0))).all()
    for special in (torch.inf, -torch.inf, torch.nan):
        _, s, _ = op.lora_linear_fwd(torch.full_like(one, special), None, one, one, None, None, 1.0, 0)
        assert torch.equal(s, torch.full_like(one, special)) or (s.isnan().all() and special != special)


def test_autocast_does_not_reach_inside():
    data = inputs(Case(37, 53, 71, 12))
    args = data.x, data.weight, data.lora_a, data.lora_b, None, None, data.scaling, 0
    expected = op.lora_linear_fwd(*args)
    with torch.autocast("cpu", torch.bfloat16):
        y, s, _ = op.lora_linear_fwd(*args)
    assert torch.equal(y, expected[0]) and torch.equal(s, expected[1])


def test_gradients_of_a_sum_are_read_without_copies(isa):
    """y.sum().backward() hands down one element expanded to [M, N]."""
    case = Case(37, 53, 71, 12)
    data = inputs(case)
    s = torch.randn(37, 12)
    dy = torch.ones(()).expand(37, 53)
    grads = op.lora_linear_bwd(
        dy, data.x, data.weight, data.lora_a, data.lora_b, s, data.mask, data.scaling, True, True, True, True
    )
    truth = bounds.backward(dy, data.x, data.weight, data.lora_a, data.lora_b, s, data.mask, data.scaling)
    for name, grad in zip(checks.GRADIENTS, grads, strict=True):
        bounds.assert_within(grad, *truth[name], name)


def test_bad_arguments_are_named():
    data = inputs(Case(37, 53, 71, 12))
    with pytest.raises(RuntimeError, match="lora_linear: lora_a has shape"):
        op.lora_linear_fwd(data.x, None, data.lora_a[:, :5], data.lora_b, None, None, 1.0, 0)
    with pytest.raises(RuntimeError, match="lora_linear: x is Int"):
        op.lora_linear_fwd(data.x.int(), None, data.lora_a, data.lora_b, None, None, 1.0, 0)
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'; expected one of portable"):
        _C.set_isa("mmx")


def test_module_says_how_it_was_built():
    info = _C.build_info()
    assert info["torch"] == native.build_facts()["torch"]
    assert _C.isa() == ISAS[-1], "the strongest instruction set is the default"
    assert set(ISAS) <= set(info["isas"])
