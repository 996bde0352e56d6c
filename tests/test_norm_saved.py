"""What layer_norm and rms_norm keep for the backward, beside Torch's own; and what they refuse before any work."""

from functools import partial

import pytest
import torch
from norm_public import FUNCTIONS, LEAVES, K, M, leaves, saved, saved_bytes, torchs

from peft_kernels.kernels.norm import op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOTHING = ("bias",)

pytestmark = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("affine", [None, torch.float32], ids=["same", "fp32-affine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_exact_bytes(device, name, residual, dtype, affine):
    """x or the total, rstd and (but for RMSNorm) mean; nothing where the bias alone trains."""
    kept = M * K * dtype.itemsize + 4 * M * (2 if name == "layer_norm" else 1)
    for needed, expected in ((LEAVES, kept), (("x", "bias"), kept), (("weight",), kept), (NOTHING, 0), ((), 0)):
        args = leaves(device, dtype, needed, affine)
        if not residual:
            del args["residual"]
        assert saved_bytes(FUNCTIONS[name], args) == expected, f"{needed}"


def test_saved_tensors_are_those_that_came(device, name):
    """No copy of x, of the weight or of a contiguous view; the weight only where dx is needed."""
    for needed, names in ((LEAVES, ["x", "weight"]), (("weight", "bias"), ["x"]), (("x",), ["x", "weight"])):
        for shape in ((M,), (2, M)):
            args = leaves(device, torch.bfloat16, needed, torch.float32, shape)
            del args["residual"]
            # Apart from the statistics, the saved tensors end in K.
            kept = {t.untyped_storage().data_ptr() for t in saved(FUNCTIONS[name], args) if t.shape[-1] == K}
            assert kept == {args[leaf].untyped_storage().data_ptr() for leaf in names}, f"{needed} {shape}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", [LEAVES, ("x", "residual", "bias"), ("weight", "bias"), NOTHING], ids="-".join)
def test_no_more_than_torch(device, name, needed, dtype):
    """With the same requires_grad, but for 4 bytes a row and statistic: on a CPU Torch keeps those of 16-bit rows in 16
    bits, and for RMSNorm's weight alone it keeps xhat instead. Its RMSNorm has no bias: added outside it keeps nothing.
    """
    ours, theirs = (saved_bytes(f, leaves(device, dtype, needed)) for f in (FUNCTIONS[name], torchs(name)))
    print(f"saved for backward, {name} + residual [{M}, {K}] {dtype}, {needed}: {ours} bytes, Torch {theirs}")
    assert ours <= theirs + (0 if needed == NOTHING else 4 * M * (2 if name == "layer_norm" else 1))
    if dtype == torch.float32 and "x" in needed:
        assert ours <= theirs
    if needed == NOTHING:
        assert ours == 0 and (theirs > 0) == (name == "layer_norm")


def _bad(device: str) -> dict[str, tuple[dict, str]]:
    """What is wrong -> (changed arguments, what the message must say)."""
    z = partial(torch.zeros, device=device)
    return {
        "no x": ({"x": None}, "x is None; expected a tensor"),
        "x of rank 0": ({"x": z(())}, r"x is torch.float32 \[\] .*expected \[..., K\]"),
        "x of no columns": ({"x": z(4, 0)}, r"x is .*\[4, 0\].*K at least 1"),
        "x of integers": ({"x": z(4, 11, dtype=torch.int64)}, "x is torch.int64.*floating"),
        "weight too long": ({"weight": z(12)}, r"weight is .*\[12\].*expected \[11\] to match x \[4, 11\]"),
        "weight a row": ({"weight": z(1, 11)}, r"weight is .*\[1, 11\].*expected \[11\]"),
        "weight of integers": ({"weight": z(11, dtype=torch.int8)}, "weight is torch.int8.*floating"),
        "weight elsewhere": ({"weight": torch.zeros(11, device="meta")}, "weight is .* on meta.*device of x"),
        "a list for a weight": ({"weight": [1.0] * 11}, "weight is .*expected a tensor"),
        "bias too short": ({"bias": z(1)}, r"bias is .*\[1\].*expected \[11\]"),
        "bias elsewhere": ({"bias": torch.zeros(11, device="meta")}, "bias is .* on meta.*device of x"),
        "residual of another shape": ({"residual": z(11)}, r"residual is .*\[11\].*expected \[4, 11\] as x"),
        "residual of integers": ({"residual": z(4, 11, dtype=torch.int64)}, "residual is torch.int64.*floating"),
    }


@pytest.mark.parametrize("wrong", _bad("cpu"))
def test_bad_input_is_refused_before_any_work(device, monkeypatch, name, wrong):
    changed, message = _bad(device)[wrong]
    z = partial(torch.zeros, device=device)
    monkeypatch.setattr(op, "norm_fwd", lambda *a: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        FUNCTIONS[name](**{"x": z(4, 11), "weight": z(11), "bias": z(11), **changed})
