"""What nvcc makes of the CUDA kernels, read without a GPU: no spills, no serialised wgmma, the instructions meant."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOPPER = sorted((ROOT / "csrc").glob("*/*_sm90.cu"))
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree"),
    pytest.mark.skipif(NVCC is None, reason="needs nvcc, which is no Python package"),
]

WANTED = {
    "lora_gemm_sm90.cu": ("HGMMA.64x256x16", "UTMALDG", "UTMASTG"),
    "lora_dy_sm90.cu": ("HGMMA.64x64x16", "UTMALDG", "STAS.128", "LDG.E.128"),
    "lora_x_sm90.cu": ("HMMA.16816", "LDSM.16.M88.4", "LDSM.16.MT88.4", "UTMALDG"),
}
"""Opcodes that the code must hold: the matrix instructions meant, TMA for what is large, wide accesses for the rest."""


def compile_for_hopper(source: Path, out: Path) -> str:
    """nvcc's messages: registers, stack and spills of every kernel, and its warnings."""
    command = [NVCC, "-O3", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas=-v"]
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def disassembled(cubin: Path) -> str:
    tool = shutil.which("cuobjdump") or Path(NVCC).resolve().parent / "cuobjdump"
    if not Path(tool).exists():
        aot = pytest.importorskip("aot", reason="without cuobjdump of the toolkit Triton's is used")
        tool = aot.TOOLS / "cuobjdump"
    return subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("source", HOPPER, ids=lambda path: path.name)
def test_hopper_kernels(source, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    messages = compile_for_hopper(source, cubin)
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", messages)
    assert kernels, messages
    assert all(set(found) == {"0"} for found in kernels), f"stack or spills in {source.name}:\n{messages}"
    assert "serialized" not in messages and "C75" not in messages, messages
    assert "warning" not in messages.lower(), messages
    sass = disassembled(cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass), f"local memory in {source.name}"
    for opcode in WANTED[source.name]:
        assert opcode in sass, f"{source.name}: no {opcode}"
