"""The strength of the QLoRA linear's value tests: each planted fault turns one red, on both sides of the crossing."""

import pytest
import qlora_cases
import torch
from cases import Case

from peft_kernels.kernels.qlora_linear import configs, parts

_REAL = parts._op
_DENSE, _FEW = (configs.DENSE_ROWS + 5,), (7,)


def _cases(rows):
    """Outputs of order 1; 192: whole blocks, 71: blocks across rows."""
    for M in rows:
        for K in (192, 71):
            yield Case(M, 53, K, 12, torch.bfloat16)
            yield Case(M, 53, K, 12, torch.float32, dropout=0.5, adapters=torch.float32)


def _first_red(rows) -> str | None:
    for case in _cases(rows):
        try:
            qlora_cases.check(case, "cpu", True)
        except AssertionError as error:
            return f"{case}: {error}"
    return None


def _fault(name: str, change):
    """parts._op with the arguments of op `name` changed by `change`, which gets them as a list."""

    def faulty(asked: str):
        real = _REAL(asked)
        if asked != name:
            return real
        return lambda *args: real(*change(list(args)))

    return faulty


def _set(index: int, value):
    def change(args: list) -> list:
        args[index] = value(args[index]) if callable(value) else value
        return args

    return change


FAULTS = {
    "dense: another type of levels": ("nf4_dequantize", _set(5, "fp4"), _DENSE),
    "dense: another blocksize's scales": ("nf4_dequantize", _set(1, lambda codes: codes.roll(1)), _DENSE),
    "dense: no offset of the scales": ("nf4_dequantize", _set(4, torch.zeros_like), _DENSE),
    "dense: the bias left out": ("lora_linear_fwd", _set(4, None), _DENSE),
    "branch not scaled": ("lora_linear_fwd", _set(6, 1.0), _DENSE + _FEW),
    "another mask": ("lora_linear_fwd", _set(5, lambda seed: None if seed is None else seed + 1), _DENSE + _FEW),
    "few rows: the branch left out": ("nf4_linear_fwd", _set(7, None), _FEW),
    "few rows: the bias left out": ("nf4_linear_fwd", _set(6, None), _FEW),
    "few rows: the branch twice": ("nf4_linear_fwd", _set(7, lambda delta: 2 * delta), _FEW),
    "few rows: no offset of the scales": ("nf4_linear_fwd", _set(5, torch.zeros_like), _FEW),
    "few rows: the branch not in dx": ("nf4_linear_bwd", _set(6, None), _FEW),
    "few rows: another type of levels in dx": ("nf4_linear_bwd", _set(7, "fp4"), _FEW),
    "gradients not scaled": ("lora_linear_bwd", _set(7, 1.0), _DENSE + _FEW),
    "no mask in the backward": ("lora_linear_bwd", _set(6, lambda mask: mask[:0].flatten()), _DENSE + _FEW),
    "s of another batch": ("lora_linear_bwd", _set(5, lambda s: s.flip(0)), _DENSE + _FEW),
    "dense: dx without the base": ("lora_linear_bwd", _set(2, None), _DENSE),
}


@pytest.mark.parametrize("rows", [_DENSE, _FEW], ids=["dense", "few"])
def test_unmutated_is_green(rows):
    assert _first_red(rows) is None


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name, monkeypatch):
    op, change, rows = FAULTS[name]
    for M in rows:  # each side by itself
        monkeypatch.setattr(parts, "_op", _fault(op, change))
        assert _first_red((M,)) is not None, f"{name} passes every check with {M} rows"


@pytest.mark.parametrize("which", range(4), ids=["dx", "dlora_a", "dlora_b", "dbias"])
def test_a_gradient_lost_is_caught(which, monkeypatch):
    real = parts.backward

    def lossy(*args):
        grads = list(real(*args))
        grads[which] = torch.zeros_like(grads[which])
        return tuple(grads)

    monkeypatch.setattr(parts, "backward", lossy)
    assert _first_red(_DENSE) is not None and _first_red(_FEW) is not None
