"""The Triton activation pass's value tests: on a GPU, or on CPU tensors under Triton's interpreter.

test_bias_act_triton.py runs them, in a process of their own where there is no GPU.
"""

import act_checks as checks
import pytest
import torch
from act_checks import ACTIVATIONS, DTYPES, mask_of, pair, wide

from peft_kernels.kernels._shared import columns
from peft_kernels.kernels.bias_grad import triton_act
from peft_kernels.kernels.bias_grad.configs import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = checks.run_of("triton")
pytestmark = pytest.mark.usefixtures("poisoned")


# Where an element lies is one code for all but ReLU, whose bits are packed: the interpreter is slow.
WHERE = (checks.check_needs, checks.check_tiny)
WHAT = (checks.check_every_number, checks.check_not_finite, checks.check_sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("check", "activation"),
    [(check, activation) for check in WHAT for activation in ACTIVATIONS]
    + [(check, activation) for check in WHERE for activation in ("relu", "silu")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_values(check, activation, dtype):
    check(RUN, activation, dtype, DEVICE)


@pytest.mark.parametrize(("activation", "dtype"), [("relu", torch.float16), ("silu", torch.bfloat16)], ids=str)
def test_layouts(activation, dtype):
    checks.check_layouts(RUN, activation, dtype, DEVICE)


def test_repeats():
    checks.check_repeats(RUN, "silu", torch.bfloat16, DEVICE)


@pytest.mark.parametrize(("activation", "dtype"), [("relu", torch.bfloat16), ("silu", torch.float32)], ids=str)
def test_offsets_of_64_bits(activation, dtype):
    checks.check_far(RUN, activation, dtype, DEVICE)


PLANS = triton_act._act_plan, triton_act._relu_plan, columns._plan


@pytest.fixture
def small_tiles(monkeypatch):
    """Spans of several chains, many parts, tiles narrower than the matrix: what large shapes have."""
    for plan in PLANS:
        plan.cache_clear()
    monkeypatch.setattr(triton_act, "pick_act", lambda *_: Tile(4, 16, 64))
    monkeypatch.setattr(columns, "pick_sum", lambda N: columns.SumTile(4, 16))
    yield
    for plan in PLANS:
        plan.cache_clear()


@pytest.mark.parametrize(("activation", "dtype"), [("relu", torch.bfloat16), ("gelu", torch.float32)], ids=str)
def test_small_tiles(small_tiles, activation, dtype):
    for shape in ((65, 17), (130, 40), (11, 5)):
        for layout in ("contiguous", "transposed"):
            dy, z = pair(*shape, dtype, DEVICE, layout)
            checks.check(RUN, dy, z, activation)
            if activation == "relu":
                checks.check_relu(RUN, z)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (100, 8), (2000, 8)], ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_declared_workspace_is_what_is_allocated(activation, needs, shape, monkeypatch):
    made, original = [], torch.Tensor.new_empty

    def counting(tensor, *size, **options):
        out = original(tensor, *size, **options)
        made.append(out.numel() * out.element_size())
        return out

    dy, z = pair(*shape, torch.bfloat16, DEVICE)
    kept = mask_of(z) if activation == "relu" else z
    args = dy, kept, activation, *needs, wide(dy.dtype)
    monkeypatch.setattr(torch.Tensor, "new_empty", counting)
    outputs = triton_act.act_bwd(*args)
    declared = triton_act.act_bwd_workspace(*args)
    if dy.numel():
        assert sum(made) == declared + sum(t.numel() * t.element_size() for t in outputs)
    else:
        assert declared == 0
