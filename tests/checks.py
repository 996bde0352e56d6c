"""The checks of the LoRA linear, each a function of an implementation: tests and the mutation suite call the same."""

import bounds
import torch
from cases import Case, Implementation, Inputs, inputs
from torch import Tensor

GRADIENTS = ("dx", "dlora_a", "dlora_b", "dbias")


def _fwd(impl: Implementation, data: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return impl.fwd(data.x, data.weight, data.lora_a, data.lora_b, data.bias, data.seed, data.scaling, data.threshold)


def _bwd(impl: Implementation, data: Inputs, s: Tensor | None, mask: Tensor, needed=(True,) * 4, x="given"):
    x = data.x if isinstance(x, str) else x
    return impl.bwd(data.dy, x, data.weight, data.lora_a, data.lora_b, s, mask, data.scaling, *needed)


def _gradient_dtypes(data: Inputs) -> tuple[torch.dtype, ...]:
    wide = torch.promote_types(data.dy.dtype, torch.float32)
    return data.dy.dtype, data.lora_a.dtype, data.lora_b.dtype, wide


def _assert_gradients(grads, data: Inputs, truth: bounds.Bounded, needed=(True,) * 4) -> None:
    for name, grad, dtype, wanted in zip(GRADIENTS, grads, _gradient_dtypes(data), needed, strict=True):
        if wanted:
            assert grad.dtype == dtype, f"{name} is {grad.dtype}, not {dtype}"
            bounds.assert_within(grad, *truth[name], name)
        else:
            assert tuple(grad.shape) == (0,), f"{name} was not asked for, yet has shape {list(grad.shape)}"


def _assert_same_bits(mask: Tensor, data: Inputs) -> None:
    """Every bit of a column of x is the reference's; bits past K may be anything."""
    expected = data.mask
    assert mask.dtype == torch.uint8 and tuple(mask.shape) == tuple(expected.shape), "the mask's dtype or shape"
    if data.seed is not None:
        K = data.x.shape[1]
        differing = bounds.keep_bits(mask, K) != bounds.keep_bits(expected, K)
        assert not differing.any(), f"{int(differing.sum())} mask bits differ from the reference's"


def check_forward(impl: Implementation, case: Case) -> None:
    """y, s and the mask; the truth is made with the reference's mask, not with the one that came back."""
    data = inputs(case, impl.device)
    y, s, mask = _fwd(impl, data)
    assert y.dtype == s.dtype == case.dtype, f"y is {y.dtype}, s is {s.dtype}, x is {case.dtype}"
    assert y.is_contiguous(), "y is not contiguous"
    _assert_same_bits(mask, data)
    truth = bounds.forward(data.x, data.weight, data.lora_a, data.lora_b, data.bias, data.mask, data.scaling)
    bounds.assert_within(s, *truth["s"], "s")
    bounds.assert_within(y, *truth["y"], "y")


def check_backward(impl: Implementation, case: Case) -> None:
    """Every gradient, from an s and a mask that this implementation did not make."""
    data = inputs(case, impl.device)
    s = bounds.low_rank(data.x, data.lora_a, data.mask).value.to(case.dtype)
    grads = _bwd(impl, data, s, data.mask)
    truth = bounds.backward(data.dy, data.x, data.weight, data.lora_a, data.lora_b, s, data.mask, data.scaling)
    _assert_gradients(grads, data, truth)


def check_round_trip(impl: Implementation, case: Case) -> None:
    """The backward of the implementation's own forward: what it saves is what it needs."""
    round_trip(impl, inputs(case, impl.device))


def round_trip(impl: Implementation, data: Inputs) -> None:
    y, s, mask = _fwd(impl, data)
    truth = bounds.forward(data.x, data.weight, data.lora_a, data.lora_b, data.bias, data.mask, data.scaling)
    bounds.assert_within(y, *truth["y"], "y")
    grads = _bwd(impl, data, s, mask)
    truth = bounds.backward(data.dy, data.x, data.weight, data.lora_a, data.lora_b, None, data.mask, data.scaling)
    _assert_gradients(grads, data, truth)


def check_subsets(impl: Implementation, case: Case) -> None:
    """Each of the 16 subsets of gradients, with x, weight and s left out where they are not needed."""
    data = inputs(case, impl.device)
    s = bounds.low_rank(data.x, data.lora_a, data.mask).value.to(case.dtype)
    truth = bounds.backward(data.dy, data.x, data.weight, data.lora_a, data.lora_b, s, data.mask, data.scaling)
    for bits in range(16):
        needed = tuple(bool(bits >> i & 1) for i in range(4))
        grads = _bwd(impl, data, s if needed[2] else None, data.mask, needed, data.x if needed[1] else None)
        _assert_gradients(grads, data, truth, needed)


def check_repeats(impl: Implementation, case: Case) -> None:
    """The same bits each time, and no input written to."""
    data = inputs(case, impl.device)
    before = {name: tensor.clone() for name, tensor in data.tensors().items()}

    def run() -> list[Tensor]:
        y, s, mask = _fwd(impl, data)
        kept = s.clone(), mask.clone()
        grads = _bwd(impl, data, s, mask)
        assert torch.equal(s, kept[0]) and torch.equal(mask, kept[1]), "the backward wrote to what was saved"
        return [y, s, mask, *grads]

    first = run()
    for _ in range(3):
        for name, one, other in zip(("y", "s", "mask", *GRADIENTS), first, run(), strict=True):
            assert torch.equal(one, other), f"{name} differs between two runs on the same inputs"
    for name, tensor in data.tensors().items():
        assert torch.equal(tensor, before[name]), f"{name} was written to"


CHECKS = (check_forward, check_backward, check_round_trip)
"""What each value case goes through."""
