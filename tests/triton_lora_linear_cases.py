"""The Triton LoRA linear's value tests: on a GPU, or on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

test_triton_lora_linear.py runs them, in a process of their own where there is no GPU.
"""

import bounds
import checks
import pytest
import torch
import triton
import triton.language as tl
from cases import LONG_SUMS, RANKS, VALUE_CASES, Case, Implementation, inputs

from peft_kernels.kernels._shared.dropout import draw_mask_bytes
from peft_kernels.kernels.lora_linear import reference, triton_impl
from peft_kernels.kernels.lora_linear.configs import PATHS, force
from peft_kernels.kernels.lora_linear.tiles import Tile
from peft_kernels.kernels.lora_linear.triton_launch import precision

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
# The interpreter's time goes by the number of tiles: the small ones that exact fp32 takes on a GPU would take minutes.
LARGE_TILES = {
    "gemm": Tile(64, 128, 128, 4, 2),
    "down": Tile(64, 128, num_warps=4, num_stages=2, span=1024),
    "bwd_dy": Tile(64, 128, num_warps=4, num_stages=2, span=512),
    "bwd_da": Tile(64, 128, num_warps=4, num_stages=2, span=512),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(path, case):
    tiles = LARGE_TILES if TRITON.device == "cpu" and case.dtype == torch.float32 else {}
    with force(path=path, **tiles):
        for check in checks.CHECKS:
            check(TRITON, case)


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_tiles(dtype, path, descriptors):
    """K and N are multiples of 8, so that the shapes may have descriptors."""
    with force(path=path, descriptors=descriptors, **SMALL_TILES):
        for dropout, R in ((0.0, 3), (0.5, 16), (0.0, 100), (0.5, 136)):
            case = Case(43, 72, 104, R, dtype, dropout=dropout, adapters=torch.float32)
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


# The interpreter takes half a minute for each: there only fp32, whose bound is the tight one, and not 100,000 rows.
INTERPRETED_SUMS = [c for c in LONG_SUMS if c.dtype == torch.float32 and max(c.M, c.N) <= 20_000]


@pytest.mark.parametrize("case", LONG_SUMS if TRITON.device == "cuda" else INTERPRETED_SUMS, ids=str)
def test_long_sums_of_one_sign(case):
    with bounds.sums_in_one_chain():  # the base product may be the BLAS's
        for check in checks.CHECKS:
            check(TRITON, case)


@pytest.mark.parametrize("R", [3, 16])
def test_our_own_long_sums_are_blocked(R):
    """No BLAS in these: the strict bound holds, so the fp32 loops flush and the partial sums are summed in blocks."""
    with force(path="k_extension", **SMALL_TILES):
        checks.check_forward(TRITON, Case(3, 5, 20_000, R, positive=True))
        checks.check_backward(TRITON, Case(4_000, 5, 9, R, positive=True))
        checks.check_backward(TRITON, Case(2, 6_000, 7, R, positive=True))


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


def test_the_mask_of_a_negative_seed():
    """All 64 bits of the seed are the key."""
    data = inputs(Case(3, 8, 40, 4, dropout=0.5), TRITON.device)
    seed = torch.tensor([-(2**63) + 5], device=TRITON.device)
    mask = triton_impl.lora_linear_fwd(data.x, None, data.lora_a, data.lora_b, None, seed, 1.0, data.threshold)[2]
    expected = reference.dropout_mask(seed, 3, 40, data.threshold)
    assert torch.equal(bounds.keep_bits(mask, 40), bounds.keep_bits(expected, 40))


@triton.jit
def _draw_kernel(seed_ptr, counter_ptr, out_ptr, threshold, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    packed = draw_mask_bytes(tl.load(seed_ptr), tl.load(counter_ptr + offs), threshold, ROUNDS)
    tl.store(out_ptr + offs, packed)


def test_mask_counters_are_64_bit():
    """Past 2**32 bytes of mask the high word counts: masks of that size are too large to make here, their bytes not."""
    counters = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7, 2**62, 5], device=TRITON.device)
    seed = torch.tensor([123456789012345], device=TRITON.device)
    out = torch.empty(8, dtype=torch.uint8, device=TRITON.device)
    _draw_kernel[(1,)](seed, counters, out, 30_000, ROUNDS=reference.PHILOX_ROUNDS, BLOCK=8)
    words = reference._philox(seed, counters)
    lanes = [word & 0xFFFF for word in words] + [word >> 16 for word in words]
    expected = sum((lane >= 30_000).to(torch.int64) << j for j, lane in enumerate(lanes))
    assert torch.equal(out.to(torch.int64), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_float64_is_the_reference(dropout):
    for check in checks.CHECKS:
        check(TRITON, Case(37, 53, 71, 12, torch.float64, dropout=dropout))


def test_tf32_only_when_asked():
    """fp32 products follow torch.get_float32_matmul_precision()."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("R", [16, 64, 130])
def test_the_declared_workspace_is_what_is_allocated(R, path, monkeypatch):
    """Nothing larger than declared is made beside the results; on CPU tensors, by counting what `empty` gives."""
    made = []
    original = torch.Tensor.new_empty

    def counting(tensor, *size, **options):
        out = original(tensor, *size, **options)
        made.append(out.numel() * out.element_size())
        return out

    data = inputs(Case(130, 300, 200, R, torch.bfloat16), TRITON.device)
    with force(path=path, **SMALL_TILES, dy_passes=1 if R <= 128 else 2):
        monkeypatch.setattr(torch.Tensor, "new_empty", counting)
        args = (data.x, data.weight, data.lora_a, data.lora_b, data.bias, None, 2.0, 0)
        results = triton_impl.lora_linear_fwd(*args)
        held = sum(out.numel() * out.element_size() for out in results)
        assert sum(made) - held == triton_impl.lora_linear_fwd_workspace(*args)
        made.clear()
        args = (data.dy, data.x, data.weight, data.lora_a, data.lora_b, *results[1:], 2.0, True, True, True, True)
        grads = triton_impl.lora_linear_bwd(*args)
        held = sum(out.numel() * out.element_size() for out in grads)
        declared = triton_impl.lora_linear_bwd_workspace(*args)
        assert max(made) <= declared <= sum(made) - held
