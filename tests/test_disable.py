"""PEFT_KERNELS_DISABLE: a name that is no part of the package is warned of."""

import pytest

from peft_kernels._core import native


def test_an_unknown_part_is_warned_of(monkeypatch, recwarn):
    monkeypatch.setenv("PEFT_KERNELS_DISABLE", "_C_cpu, triton,_C_cuda")
    native._warn_of_unknown(native._disabled())
    assert not recwarn.list
    monkeypatch.setenv("PEFT_KERNELS_DISABLE", "_C_cpu, tritn")
    with pytest.warns(UserWarning, match=r"names \['tritn'\]; there are \['_C_cpu', '_C_cuda', 'triton'\]"):
        native._warn_of_unknown(native._disabled())
