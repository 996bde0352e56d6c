"""A delta far below one rounding step of the base still counts: what early training, where B is near 0, lives on."""

import pytest
import torch


def _slope(change, delta):
    """How much of delta is found in change: the least-squares factor, and its standard error."""
    norm = (delta**2).sum()
    slope = (change * delta).sum() / norm
    return slope, ((change - slope * delta).std() / norm.sqrt())


@pytest.mark.parametrize("M", [2, 256])
def test_a_delta_below_the_base_s_rounding_survives_in_bf16(impl, M):
    N, K, R = 4096 * 64 // M if M < 64 else 256, 128, 8
    x, weight, lora_a = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((M, K), (N, K), (R, K)))
    lora_b = torch.randn(N, R).mul(4e-5).bfloat16()
    x, weight, lora_a, lora_b = (t.to(impl.device) for t in (x, weight, lora_a, lora_b))

    def y(b):
        return impl.fwd(x, weight, lora_a, b, None, None, 2.0, 0)[0].double()

    delta = 2.0 * x.double() @ lora_a.double().t() @ lora_b.double().t()
    base = x.double() @ weight.double().t()
    assert delta.std() < torch.finfo(torch.bfloat16).eps / 4 * base.std()
    slope, error = _slope(y(lora_b) - y(torch.zeros_like(lora_b)), delta)
    # One rounding of the sum is unbiased; six standard errors, and half of the delta is far outside of them.
    assert 6 * error < 0.5
    assert abs(slope - 1) < 6 * error + 0.02
