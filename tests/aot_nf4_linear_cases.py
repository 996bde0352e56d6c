"""The machine-code gate's part for the 4-bit linear's kernels for few rows; test_aot.py collects it."""

import aot
import pytest
import torch
from aot_nf4_cases import limits, stored, tensor, wide

from peft_kernels._core.parts import PARTS
from peft_kernels.kernels.nf4_linear import configs, triton_impl

N, K = 14336, 4096
CALLS = [
    (M, N, columns, dtype, blocksize, nested, beside)
    for M in (1, 17, 64)
    for columns, dtype, blocksize, nested, beside in (
        (K, torch.bfloat16, 64, True, False),
        (K, torch.bfloat16, 4096, False, True),
        (K, torch.float16, 32, True, True),
        (96, torch.bfloat16, 64, False, True),  # in one part: bias and addend are the product kernel's
    )
]
"""Every tile of M; a scale for a quarter, half and all of a tile of K; one kernel and two."""


def _launches(call: tuple, arch: int | str, monkeypatch) -> list[aot.Launch]:
    M, N, K, dtype, blocksize, nested, beside = call
    monkeypatch.setattr(triton_impl, "arch_of", lambda device: arch)
    bias, addend = (tensor(N), tensor(M, N, dtype=dtype)) if beside else (None, None)
    with configs.force(path="rows"), aot.recording(triton_impl) as launches:  # also where chunks are chosen
        x, weight = tensor(M, K, dtype=dtype), stored(N * K, blocksize, nested)
        triton_impl.nf4_linear_fwd(x, *weight, bias, addend, "nf4", blocksize, N)
    return launches


def _product_faults(launch: aot.Launch, compiled: aot.Compiled, arch: int | str, what: str) -> list[str]:
    """The part's matrix instruction, 16-byte copies that run ahead, nothing fused, four programs for each SM."""
    matrix = {90: "HGMMA", 100: "UTCHMMA", "gfx942": "v_mfma"}.get(arch, "HMMA")
    faults = [] if compiled.count(matrix) else [f"{what}: no {matrix}"]
    if arch == "gfx942":
        if not compiled.count(*wide(arch, "load")):
            faults.append(f"{what}: no 128-bit load")
        return faults
    if not compiled.count_wide_copies():
        faults.append(f"{what}: no 128-bit copy")
    if compiled.count("FFMA"):
        faults.append(f"{what}: {compiled.count('FFMA')} fused additions")
    if launch.keywords["BLOCK_M"] == 16 and compiled.registers > 128:
        faults.append(f"{what}: {compiled.registers} registers")
    return faults


@pytest.mark.parametrize("arch", PARTS)
def test_nf4_linear(arch, monkeypatch):
    """Every tile, in one part and in several: no spills, and what the plan counts on."""
    faults, seen = [], set()
    for call in CALLS:
        launches = _launches(call, arch, monkeypatch)
        assert launches and launches[0].kernel.__name__ == "_nf4_rows_kernel"
        for launch in launches:
            what = f"{launch.kernel.__name__} {call[:3]} {launch.keywords}"
            if what in seen:
                continue
            seen.add(what)
            compiled = aot.compile_launch(launch, arch)
            faults += limits(compiled, arch, what)
            if launch is launches[0]:
                faults += _product_faults(launch, compiled, arch, what)
    assert not faults, "\n".join(faults)
