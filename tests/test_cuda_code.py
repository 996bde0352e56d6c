"""What nvcc makes of the CUDA kernels, read without a GPU: no spills, no serialised wgmma, the instructions meant."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOPPER = sorted((ROOT / "csrc").glob("*/*_sm90.cu"))
PROBE = ROOT / "tests" / "cuda_host" / "probe.cu"
GENERAL = [path for path in sorted((ROOT / "csrc").glob("*/*.cu")) if path not in HOPPER] + [PROBE]
ARCHS = ("80", "90a", "100")
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

WANTED_GENERAL = {
    "act.cu": ("LDG.E.128", "STG.E.128"),
    "bias_grad.cu": ("LDG.E.128",),
    "nf4_dequantize.cu": ("LDG.E.EF", "STG.E.128", "STG.E.EF.128"),
    "nf4_linear.cu": ("LDG.E.EF.128", "LDG.E.EF.64", "LDG.E.EF ", "LDS.128", "HMMA.16816.F32.BF16", "HMMA.16816.F32 "),
    "nf4_quantize.cu": ("LDG.E.EF.128",),
    "norm_fwd.cu": ("LDG.E.EF.128", "STG.E.128", "MUFU.RSQ"),
    "norm_bwd.cu": ("LDG.E.EF.128", "STG.E.128"),
    "probe.cu": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 "),
}

_ACT = {"WideActRows": 128, "WideReluRows": 128, "AnyActRows": 80, "AnyReluRows": 80, "AnyRows": 48}
_ACT |= {"8WideReluI": 128, "7AnyReluI": 128}

MOST_REGISTERS = {
    "act.cu": _ACT,
    "bias_grad.cu": {"WideRows": 80, "AnyRows": 48},
    "nf4_dequantize.cu": {"Lb1ELb0E": 64, "Lb1ELb1E": 64, "Lb0ELb0E": 80, "Lb0ELb1E": 80},
    "nf4_linear.cu": {"Li1ELi1ELi": 128, "Li1ELi2ELi": 128, "Li2ELi4ELi": 255, "Li2ELi8ELi": 255, "parts_kernel": 64}
    | {"simt_kernelIfLi4E": 255, "Li1EEEv": 128, "Li2EEEv": 128},
    "nf4_quantize.cu": {"nf4_quantize_kernel": 80, "nf4_quantize_scales_kernel": 64},
    "norm_fwd.cu": {"held_kernel": 80, "looped_kernel": 64},
    "norm_bwd.cu": {"rows_kernel": 128, "looped_kernel": 64, "parts_kernel": 48},
    "probe.cu": {"kernel": 64},
}
"""By a part of the kernel's name: what its launch bounds leave a thread (act, bias_grad: 256 threads, 2-5 blocks)."""


RECIPROCAL = re.compile(r"FADD\.FTZ R\d+, -R\d+, -RZ ;|FSETP\.NEU\.FTZ")
"""Within __frcp_rn, which is right for subnormals too: a change of sign, and a look whether it has to take care."""


def compiled(source: Path, out: Path, arch: str = "90a") -> str:
    """nvcc's messages: registers, stack and spills of every kernel, and its warnings."""
    target = f"arch=compute_{arch},code=sm_{arch}"
    command = [NVCC, "-O3", "-std=c++17", "-gencode", target, "-cubin", "-Xptxas=-v"]
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def disassembled(cubin: Path) -> str:
    tool = shutil.which("cuobjdump") or Path(NVCC).resolve().parent / "cuobjdump"
    if not Path(tool).exists():
        aot = pytest.importorskip("aot", reason="without cuobjdump of the toolkit Triton's is used")
        tool = aot.TOOLS / "cuobjdump"
    return subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout


def machine_code(source: Path, cubin: Path, arch: str = "90a") -> tuple[str, str]:
    """nvcc's messages and the SASS, after what holds for every kernel: no stack, no spills, no warnings."""
    messages = compiled(source, cubin, arch)
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", messages)
    assert kernels, messages
    assert all(set(found) == {"0"} for found in kernels), f"stack or spills in {source.name}:\n{messages}"
    assert "warning" not in messages.lower(), messages
    sass = disassembled(cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass), f"local memory in {source.name}"
    return messages, sass


@pytest.mark.parametrize("source", HOPPER, ids=lambda path: path.name)
def test_hopper_kernels(source, tmp_path):
    messages, sass = machine_code(source, tmp_path / "kernels.cubin")
    assert "serialized" not in messages and "C75" not in messages, messages
    for opcode in WANTED[source.name]:
        assert opcode in sass, f"{source.name}: no {opcode}"


def registers_of(messages: str) -> dict[str, int]:
    """Registers per thread by mangled kernel name."""
    found = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", messages, re.DOTALL)
    return {name: int(count) for name, count in found}


def loads_in_flight(function: str, opcode: str) -> int:
    """The most loads that a kernel issues before it adds anything."""
    issued = re.sub(r"\b(FADD|HADD2)", "\n+\n", function).split("\n+\n")
    return max(len(re.findall(rf"\b{re.escape(opcode)}\b", part)) for part in issued)


def check_bias_grad(sass: str) -> None:
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 13
    for kernel in kernels:
        name = kernel.partition("\n")[0]
        loads = loads_in_flight(kernel, "LDG.E.128" if "WideRows" in name else "LDG.E")
        assert loads >= 8, f"{loads} loads in flight in {name}"


PASS = re.compile(r"PassI(.+?)Li(\d)ELb(\d)ELb(\d)ELb(\d)E")


def rows_loads(name: str) -> int:
    """How many 16-byte loads of dy and x a thread of the norm's row pass issues at once, from its mangled name."""
    dtypes, pieces, *needed = PASS.search(name).groups()
    dx, dweight, _ = (flag == "1" for flag in needed)
    of_dy = 2 if dtypes.endswith("f") and dtypes != "ff" else 1
    rows = 4 if not dx else 2 if pieces == "1" and of_dy == 1 else 1
    return rows * int(pieces) * (of_dy + (dx or dweight))


def check_norm(sass: str) -> None:
    """All loads of a row before anything is added; 16-byte stores but for mean, rstd and the columns' sums."""
    for kernel in sass.split("Function : ")[1:]:
        name = kernel.partition("\n")[0]
        held = re.search(r"held_kernel.*Li(\d)E", name)
        wanted = int(held[1]) if held else rows_loads(name) if "rows_kernel" in name else 0
        loads = loads_in_flight(kernel, "LDG.E.EF.128")
        assert loads >= wanted, f"{loads} loads in flight in {name}, not {wanted}"
        narrow = len(re.findall(r"\bSTG\.E(?!\.128)", kernel))
        allowed = 1 if "parts_kernel" in name else 2 if "norm_fwd" in name else 0
        assert narrow <= allowed, f"{narrow} stores of less than 16 bytes in {name}"


def check_nf4_dequantize(sass: str) -> None:
    """Codes and scales of eight pieces on their way before anything is multiplied, and every piece one store."""
    kernels = [kernel for kernel in sass.split("Function : ")[1:] if "Lb1ELb" in kernel.partition("\n")[0]]
    assert len(kernels) == 3 * 2
    for kernel in kernels:
        name, nested = kernel.partition("\n")[0], "Lb1ELb1E" in kernel.partition("\n")[0]
        loads = len(re.findall(r"\bLDG\.E", re.split(r"\b(?:FMUL|STG)\b", kernel)[0]))
        assert loads >= (8 * 4 if nested else 8 * 2), f"{loads} loads in flight in {name}"
        assert len(re.findall(r"\bSTG\.E\.(?:EF\.)?128", kernel)) == 2 * 8, name


def check_nf4_quantize(sass: str) -> None:
    """Four pieces on their way before the first is looked at, by one load each."""
    kernels = [kernel for kernel in sass.split("Function : ")[1:] if re.search(r"kernelI.*Lb1ELb", kernel[:200])]
    assert len(kernels) == 3 * 2
    for kernel in kernels:
        assert len(re.findall(r"\bLDG\.E\.EF\.128", kernel.partition("SHFL")[0])) == 4, kernel.partition("\n")[0]


def check_nf4_linear(sass: str) -> None:
    """Every piece of W is one load, twice in the code: ahead of the loop, and in it for the step to come."""
    for kernel in sass.split("Function : ")[1:]:
        name = kernel.partition("\n")[0]
        if "parts_kernel" in name:
            continue
        tiles, size = re.search(r"Li(\d)ELi\dELi(\d+)E", name).groups() if "mma" in name else (2, 16)
        wide = {4: "LDG.E.EF", 8: "LDG.E.EF.64", 16: "LDG.E.EF.128"}[int(size)]
        loads = len(re.findall(rf"\b{re.escape(wide)} ", kernel))
        pieces = 2 * int(tiles) * 32 // int(size) if "mma" in name else 4
        assert loads == 2 * pieces, f"{loads} loads of {wide} in {name}, not {2 * pieces}"


def check_act(sass: str) -> None:
    """Both operands of four rows on their way before anything is added, and no dz in pieces."""
    kernels = [kernel for kernel in sass.split("Function : ")[1:] if "Wide" in kernel.partition("\n")[0]]
    assert len(kernels) == 3 * (4 + 4 + 1)
    for kernel in kernels:
        name = kernel.partition("\n")[0]
        operands = 1 if "WideRelu" in name else 2
        assert len(re.findall(r"\bLDG\.E\.128", kernel)) >= 4 * operands, name
        assert len(re.findall(r"\bSTG\.E\.128", kernel)) >= 4, name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", GENERAL, ids=lambda path: path.name)
def test_general_kernels(source, arch, tmp_path):
    messages, sass = machine_code(source, tmp_path / "kernels.cubin", arch)
    for name, registers in registers_of(messages).items():
        limits = [most for part, most in MOST_REGISTERS[source.name].items() if part in name]
        assert len(limits) == 1 and registers <= limits[0], f"{name} has {registers} registers, of {limits}"
    for opcode in WANTED_GENERAL[source.name]:
        assert opcode in sass, f"{source.name}: no {opcode}"
    # Flushing subnormals would lose what compensation keeps.
    flushed = re.findall(r"\b(?:FADD|FMUL|FFMA|FSETP)\S*\.FTZ.*;", sass)
    assert not [one for one in flushed if not RECIPROCAL.match(one) or source.name != "nf4_quantize.cu"], flushed
    if source.name == "bias_grad.cu":
        check_bias_grad(sass)
    if source.name.startswith("norm"):
        check_norm(sass)
    if source.name == "act.cu":
        check_act(sass)
    if source.name == "nf4_dequantize.cu":
        check_nf4_dequantize(sass)
    if source.name == "nf4_linear.cu":
        check_nf4_linear(sass)
    if source.name == "nf4_quantize.cu":
        check_nf4_quantize(sass)


def test_loads_in_flight_are_counted():
    rolled = "LDG.E.128.CONSTANT R12 FADD R1 LDG.E.128 R4 LDG.E.128 R8 HADD2.F32 R2 LDG.E.128 R12 LDG.E.64 R2"
    assert loads_in_flight(rolled, "LDG.E.128") == 2 and loads_in_flight(rolled, "LDG.E") == 2
