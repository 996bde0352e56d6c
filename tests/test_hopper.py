"""That the CUDA extension's Hopper kernels run where they should, and side by side. Values: test_lora_linear.py."""

import pytest
import torch
from cases import ALIGNED_CASES, Case, inputs

from peft_kernels._core import native
from peft_kernels.kernels.lora_linear import op

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and "_C_cuda" in native.EXTENSIONS

pytestmark = pytest.mark.skipif(not HOPPER, reason="the CUDA extension's kernels are for compute capability 9.0")


@pytest.mark.parametrize("case", ALIGNED_CASES, ids=str)
def test_the_hopper_kernels_take_what_they_are_for(device, case):
    """All of the aligned cases but those with a reason: else the tests above would have tested Triton again."""
    data = inputs(case, device)
    said = op.general_because(data.x, data.weight, data.lora_a, data.lora_b, case.dropout > 0)
    odd = case.weight is None or case.R > 128 or "rows" in (case.weight, case.layout)
    odd |= case.layout in ("expanded", "offset") or case.adapters not in (None, torch.float32)
    assert bool(said) == (odd or (case.dropout > 0 and case.K % 128 != 0)), said


def test_passes_back_to_back_give_the_bits_they_give_alone(device):
    """Each starts while the one before ends: what one writes the next must not read too early."""
    data = inputs(Case(2048, 1024, 1024, 64, torch.bfloat16, dropout=0.1), device)
    _, s, mask = op.lora_linear_fwd(
        data.x, data.weight, data.lora_a, data.lora_b, data.bias, data.seed, data.scaling, data.threshold
    )
    args = data.dy, data.x, None, data.lora_a, data.lora_b, s, mask, data.scaling, False, True, True, False
    torch.cuda.synchronize()
    alone = op.lora_linear_bwd(*args)
    torch.cuda.synchronize()
    for grads in [op.lora_linear_bwd(*args) for _ in range(20)]:
        assert all(map(torch.equal, grads, alone))
