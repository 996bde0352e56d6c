"""The Triton bias_grad's value tests: on a GPU, or on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

test_bias_grad_triton.py runs them, in a process of their own where there is no GPU.
"""

import bias_grad_checks as checks
import pytest
import torch
from bias_grad_checks import DTYPES, gradient, wide

from peft_kernels.kernels._shared import columns
from peft_kernels.kernels.bias_grad import triton_impl
from peft_kernels.kernels.bias_grad.configs import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values(check, dtype):
    check(triton_impl.bias_grad, dtype, DEVICE)


def test_a_million_terms_of_one_sign():
    """In fp32 alone, whose bound is the tight one: the interpreter takes 10 s."""
    checks.check(triton_impl.bias_grad, gradient(1_000_000, 3, torch.float32, DEVICE).abs())


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_offsets_of_64_bits(dtype):
    checks.check_far(triton_impl.bias_grad, dtype, DEVICE)


@pytest.fixture
def small_tiles(monkeypatch):
    """Spans of several chains, many parts, tiles narrower than the matrix: what large shapes have."""
    for plan in (triton_impl._plan, columns._plan):
        plan.cache_clear()
    monkeypatch.setattr(triton_impl, "pick_config", lambda *_: Tile(4, 16, 64))
    monkeypatch.setattr(columns, "pick_sum", lambda N: columns.SumTile(4, 16))
    yield
    for plan in (triton_impl._plan, columns._plan):
        plan.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_small_tiles(small_tiles, dtype):
    for M, N in ((64, 16), (65, 17), (127, 40), (500, 33), (33, 5), (11, 5)):
        for layout in ("contiguous", "transposed", "rows"):
            checks.check(triton_impl.bias_grad, gradient(M, N, dtype, DEVICE, layout))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (100, 8), (2000, 8), (3000, 300)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_declared_workspace_is_what_is_allocated(layout, shape, monkeypatch):
    made, original = [], torch.Tensor.new_empty

    def counting(tensor, *size, **options):
        out = original(tensor, *size, **options)
        made.append(out.numel() * out.element_size())
        return out

    dy = gradient(*shape, torch.bfloat16, DEVICE, layout)
    monkeypatch.setattr(torch.Tensor, "new_empty", counting)
    dbias = triton_impl.bias_grad(dy, wide(dy.dtype))
    declared = triton_impl.bias_grad_workspace(dy, wide(dy.dtype))
    assert sum(made) == (declared + dbias.numel() * 4 if dy.numel() else 0)
