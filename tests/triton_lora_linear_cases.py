"""The Triton LoRA linear's value tests: on a GPU, or on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

test_triton_lora_linear.py runs them, in a process of their own where there is no GPU.
"""

import bounds
import checks
import pytest
import torch
from cases import LONG_SUMS, RANKS, VALUE_CASES, Case, Implementation, inputs

from peft_kernels.kernels.lora_linear import reference, triton_impl
from peft_kernels.kernels.lora_linear.configs import PATHS, force, pick_config
from peft_kernels.kernels.lora_linear.tiles import Tile

TRITON = Implementation(
    "triton", "cuda" if torch.cuda.is_available() else "cpu", triton_impl.lora_linear_fwd, triton_impl.lora_linear_bwd
)
pytestmark = pytest.mark.usefixtures("poisoned")

# float64 has no kernels of its own: test_float64_is_the_reference.
CASES = [case for case in VALUE_CASES if case.dtype != torch.float64]
# Tiles smaller than the shapes: loops of several steps, split sums, ragged last tiles.
SMALL_TILES = {
    "gemm": Tile(16, 32, 16, 4, 2, group_m=2),
    "down": Tile(16, 32, num_warps=4, num_stages=2, span=64),
    "bwd_dy": Tile(16, 32, num_warps=4, num_stages=2, span=32),
    "bwd_da": Tile(16, 32, num_warps=4, num_stages=2, span=32),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(path, case):
    with force(path=path):
        for check in checks.CHECKS:
            check(TRITON, case)


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_tiles(dtype, path, descriptors):
    """K and N are multiples of 8, so that the shapes may have descriptors."""
    with force(path=path, descriptors=descriptors, **SMALL_TILES):
        for dropout in (0.0, 0.5):
            for R in (3, 16, 100, 136):
                case = Case(75, 104, 136, R, dtype, dropout=dropout, adapters=torch.float32)
                for check in checks.CHECKS:
                    check(TRITON, case)


@pytest.mark.parametrize("weight", ["contiguous", "transposed", "rows"])
@pytest.mark.parametrize("subtiles", [1, 2])
def test_weight_layouts_with_descriptors(weight, subtiles):
    """A transposed weight (GPT-2's Conv1D) is read by descriptors too."""
    with force(path="k_extension", descriptors=True, gemm=Tile(32, 32, 32, 4, 2, subtiles=subtiles)):
        for check in checks.CHECKS:
            check(TRITON, Case(75, 104, 136, 12, torch.bfloat16, weight=weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("R", [*RANKS, 130])
def test_two_passes_over_dy(R, dtype):
    """The plan for ranks that do not fit in registers, at every rank."""
    with force(dy_passes=2, **SMALL_TILES):
        checks.check_backward(TRITON, Case(37, 53, 71, R, dtype, dropout=0.1))
        checks.check_subsets(TRITON, Case(9, 17, 13, R, dtype))


@pytest.mark.parametrize("R", RANKS)
def test_fp32_adapters_over_bf16(R):
    for path in PATHS:
        with force(path=path):
            checks.check_round_trip(TRITON, Case(37, 53, 71, R, torch.bfloat16, adapters=torch.float32, dropout=0.1))


# 100,000 rows of 512-row programs take minutes in the interpreter; a GPU runs them all.
@pytest.mark.parametrize("case", [c for c in LONG_SUMS if TRITON.device == "cuda" or max(c.M, c.N) <= 20_000], ids=str)
def test_long_sums_of_one_sign(case):
    with bounds.sums_in_one_chain():  # the base product may be the BLAS's
        for check in checks.CHECKS:
            check(TRITON, case)


@pytest.mark.parametrize("R", [3, 16])
def test_our_own_long_sums_are_blocked(R):
    """No BLAS in these: the strict bound holds, so the fp32 loops flush and the partial sums are summed in blocks."""
    with force(path="k_extension", **SMALL_TILES):
        checks.check_forward(TRITON, Case(3, 5, 20_000, R, positive=True))
        checks.check_backward(TRITON, Case(5_000, 5, 9, R, positive=True))
        checks.check_backward(TRITON, Case(2, 8_000, 7, R, positive=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("path", PATHS)
def test_any_subset_of_gradients(path, dropout):
    with force(path=path):
        checks.check_subsets(TRITON, Case(37, 53, 71, 12, torch.bfloat16, dropout=dropout))
        checks.check_subsets(TRITON, Case(9, 17, 13, 3, dropout=dropout, weight=None))


@pytest.mark.parametrize("path", PATHS)
def test_same_bits_every_run_and_inputs_untouched(path):
    with force(path=path):
        checks.check_repeats(TRITON, Case(130, 260, 300, 24, torch.bfloat16, dropout=0.1))
        checks.check_repeats(TRITON, Case(37, 53, 71, 3, layout="transposed"))


def test_mask_counts_in_64_bits():
    """The counters of a mask of more than 2**32 bytes: the kernel's row offset is carried into the high word."""
    M, K = 3, 40
    data = inputs(Case(M, 8, K, 4, dropout=0.5), TRITON.device)
    mask = triton_impl.lora_linear_fwd(data.x, None, data.lora_a, data.lora_b, None, data.seed, 1.0, data.threshold)[2]
    assert torch.equal(bounds.keep_bits(mask, K), bounds.keep_bits(data.mask, K))
    negative = torch.tensor([-(2**63) + 5], device=TRITON.device)
    mask = triton_impl.lora_linear_fwd(data.x, None, data.lora_a, data.lora_b, None, negative, 1.0, 30_000)[2]
    expected = reference.dropout_mask(negative, M, K, 30_000)
    assert torch.equal(bounds.keep_bits(mask, K), bounds.keep_bits(expected, K))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_float64_is_the_reference(dropout):
    for check in checks.CHECKS:
        check(TRITON, Case(37, 53, 71, 12, torch.float64, dropout=dropout))


def test_tf32_only_when_asked():
    """fp32 products follow torch.get_float32_matmul_precision()."""
    from peft_kernels.kernels.lora_linear.triton_launch import precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_model_plans_for_cpu_tensors_too():
    assert pick_config(37, 53, 71, 12, torch.bfloat16, 90).path in PATHS
