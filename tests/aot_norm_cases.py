"""The machine-code gate's part for norm: its kernels at every tile of configs.py; test_aot.py collects it."""

import aot
import pytest
import torch

from peft_kernels.kernels._shared import columns
from peft_kernels.kernels.lora_linear.parts import PARTS
from peft_kernels.kernels.norm import triton_impl

M = 8192
WIDTHS = (3, 768, 4096, 8192, 16_384, 20_000)
"""K of several rows a tile, of a row that sums go with, of one without, and of rows that stay in no registers."""


def _launches(K: int, dtype: torch.dtype, rms: bool, needed: tuple[bool, bool, bool]) -> list[aot.Launch]:
    """A forward and a backward with everything that may be there, from tensors that have no memory."""
    wide = torch.float32

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, mean = tensor(M, K), tensor(K, dtype=wide), tensor(M, dtype=wide)
    with aot.recording(triton_impl, columns) as launches:
        if all(needed):
            triton_impl.norm_fwd(x, tensor(M, K), weight, weight, 1e-5, rms, dtype)
        triton_impl.norm_bwd(tensor(M, K), tensor(M, K), x, mean, mean, weight, rms, *needed, wide, dtype)
    return launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", PARTS)
def test_norms(arch, dtype):
    """No spills, a block within an SM's registers and shared memory, 128-bit loads where a thread has 16 bytes of a
    tile: AMD's warps are twice as wide. LayerNorm alone: RMSNorm's kernels are these less the mean."""
    part, seen, faults = PARTS[arch], set(), []
    wide = ("global_load_dwordx4", "buffer_load_dwordx4") if arch == "gfx942" else ("LDG.E.128",)
    for K in WIDTHS:
        for needed in ((True, True, True), (True, False, True), (True, False, False), (False, True, True)):
            for launch in _launches(K, dtype, False, needed):
                what = f"{launch.kernel.__name__} {K} {launch.keywords}"
                same = launch.kernel.__name__, tuple(launch.keywords.items()), K % 16
                if same in seen:
                    continue
                seen.add(same)
                compiled = aot.compile_launch(launch, arch)
                threads = launch.keywords["num_warps"] * (64 if arch == "gfx942" else 32)
                each = launch.keywords.get("BLOCK_M", 0) * launch.keywords.get("BLOCK_K", 0) // threads
                vector = K > 3 and each * dtype.itemsize >= 16
                for fault, found in (
                    (f"{compiled.spills} spills", compiled.spills),
                    (f"{compiled.shared} bytes of shared memory", compiled.shared > part.shared_bytes),
                    (f"{compiled.registers} registers", arch != "gfx942" and compiled.registers * threads > 65_536),
                    ("no 128-bit load", vector and not compiled.count(*wide)),
                ):
                    if found:
                        faults.append(f"{what}: {fault}")
    assert not faults, "\n".join(faults)
