"""The machine-code gate's part for 4-bit weights: their kernels in every plan; test_aot.py collects it."""

import aot
import pytest
import torch

from peft_kernels._core.parts import PARTS
from peft_kernels.formats.nf4 import BLOCKSIZES
from peft_kernels.kernels._shared import nf4 as shared
from peft_kernels.kernels.nf4 import triton_impl

N, K = 14336, 4096
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stored(numel: int, blocksize: int, nested: bool) -> tuple:
    """A weight's tensors without memory."""
    packed, blocks = tensor(-(-numel // 2), dtype=torch.uint8), -(-numel // blocksize)
    if not nested:
        return packed, tensor(blocks), None, None, None
    return packed, tensor(blocks, dtype=torch.uint8), tensor(-(-blocks // 256)), tensor(256), tensor(1)


def wide(arch: int | str, what: str) -> tuple[str, ...]:
    """Opcodes of 128-bit loads or stores ("load", "store")."""
    if arch == "gfx942":
        return f"global_{what}_dwordx4", f"buffer_{what}_dwordx4"
    return ("LDG.E.128",) if what == "load" else ("STG.E.128",)


def limits(compiled: aot.Compiled, arch: int | str, what: str) -> list[str]:
    """What of a kernel does not fit `arch`."""
    faults = [f"{what}: {compiled.spills} spills"] if compiled.spills else []
    if compiled.shared > PARTS[arch].shared_bytes:
        faults.append(f"{what}: {compiled.shared} bytes of shared memory")
    if arch != "gfx942" and compiled.registers > 255:
        faults.append(f"{what}: {compiled.registers} registers")
    return faults


def _dequantizing(dtype: torch.dtype, arch: int | str) -> list[aot.Launch]:
    """Whole weights, rows and columns of one; on one part all blocksizes, which change a shift."""
    every = arch == 80 and dtype == torch.bfloat16
    with aot.recording(shared, triton_impl) as launches:
        for nested in (False, True):
            for blocksize in BLOCKSIZES if every else (64,):
                triton_impl.nf4_dequantize(*stored(N * K, blocksize, nested), "nf4", blocksize, N * K, dtype)
            triton_impl.nf4_dequantize(*stored(1001, 64, nested), "fp4", 64, 1001, dtype)
            shared.dequantize(stored(N * K, 64, nested), "nf4", 64, tensor(1, 2048 * K, dtype=dtype), 2048 * K)
            shared.dequantize(stored(N * K, 64, nested), "nf4", 64, tensor(N, 768, dtype=dtype), 768, K)
    return launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", PARTS)
def test_nf4_dequantize(arch, dtype):
    """No spills, registers for six blocks an SM, a thread's bytes in one load and its values in one store, and nested
    scales as a product and a sum: nothing there is to be fused."""
    faults = []
    for launch in _dequantizing(dtype, arch):
        compiled, keys = aot.compile_launch(launch, arch), launch.keywords
        what = f"{keys}"
        faults += limits(compiled, arch, what)
        fused = (
            compiled.count("v_fma_f32", "v_fmac", "v_mad_f", "v_pk_fma") if arch == "gfx942" else compiled.count("FFMA")
        )
        if fused:
            faults.append(f"{what}: {fused} fused additions")
        if not keys["WHOLE"]:
            continue
        if compiled.registers > 42:
            faults.append(f"{what}: {compiled.registers} registers")
        if not compiled.count(*wide(arch, "store")):
            faults.append(f"{what}: no 128-bit store")
        scales = keys["NESTED"] * 4  # their own codes are bytes: one for each of a thread's groups
        bytewise = compiled.count("global_load_ubyte", "buffer_load_ubyte", "LDG.E.U8")
        if bytewise > scales:
            faults.append(f"{what}: {bytewise} loads of single bytes")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", PARTS)
def test_nf4_quantize(arch, dtype):
    """In bf16 every blocksize: no spills, registers for three blocks an SM, 128-bit loads of the weight."""
    faults = []
    with aot.recording(shared, triton_impl) as launches:
        for blocksize in BLOCKSIZES if dtype == torch.bfloat16 else (32, 4096):
            triton_impl.nf4_quantize(tensor(N, K, dtype=dtype), "nf4", blocksize)
        triton_impl.nf4_quantize(tensor(N, K, dtype=dtype), "fp4", 64)
        triton_impl.nf4_quantize_scales(tensor(N * K // 64), tensor(256))
    with aot.recording(triton_impl) as odd:
        triton_impl.nf4_quantize(tensor(33, 35, dtype=dtype), "fp4", 64)
    for launch, vector in [(launch, True) for launch in launches] + [(launch, False) for launch in odd]:
        compiled = aot.compile_launch(launch, arch)
        what = f"{launch.kernel.__name__} {launch.keywords}"
        faults += limits(compiled, arch, what)
        if compiled.registers > 80:
            faults.append(f"{what}: {compiled.registers} registers")
        if vector and not compiled.count(*wide(arch, "load")):
            faults.append(f"{what}: no 128-bit load")
    assert not faults, "\n".join(faults)
