"""Compile Triton kernels for GPUs that are not there, and read what came out: machine code, registers, memory."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    asm: str  # SASS on NVIDIA, the .amdgcn text on AMD
    registers: int
    spills: int  # bytes of local memory (NVIDIA) or spilled vector registers (AMD)
    shared: int

    def count(self, *opcodes: str) -> int:
        """How many instructions have one of the opcodes (a prefix: "LDG.E.128" counts "LDG.E.128.CONSTANT")."""
        return sum(len(re.findall(rf"\b{re.escape(opcode)}", self.asm)) for opcode in opcodes)

    def count_wide_copies(self) -> int:
        """128-bit copies from global to shared memory that pass the registers by (cp.async)."""
        return len(re.findall(r"\bLDGSTS\S*\.128\b", self.asm))


def target_of(arch: int | str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


def _read_cubin(cubin: bytes) -> tuple[str, int, int]:
    """(SASS, registers, bytes of local memory) through cuobjdump and nvdisasm of the Triton wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    registers = int(re.search(r"REG:(\d+)", text).group(1))
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass.stdout))
    return sass.stdout, registers, local


@dataclass(frozen=True)
class Launch:
    """A recorded call of a kernel: what the launcher would have sent to the GPU."""

    kernel: object
    args: tuple
    keywords: dict  # constexprs and options: num_warps, num_stages, enable_fp_fusion


class _Recorder:
    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **keywords: self.launches.append(Launch(self.kernel, args, keywords))


@contextmanager
def recording(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Inside, the kernels that the modules launch are recorded instead of run, so tensors may be on device "meta"."""
    launches: list[Launch] = []
    replaced = [(m, name, k) for m in modules for name, k in vars(m).items() if isinstance(k, triton.JITFunction)]
    for module, name, kernel in replaced:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


def _specialise(value) -> tuple[str, bool]:
    """(signature, whether a multiple of 16) of an argument, as Triton's own launcher decides."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if value == 1:
        return "constexpr", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def compile_launch(launch: Launch, arch: int | str) -> Compiled:
    """Compile what a recorded call would run, with the same specialisation of its arguments, for `arch`."""
    kernel, keywords = launch.kernel, dict(launch.keywords)
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in keywords}
    signature = {name: "constexpr" for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in keywords.items()}
    attributes = {}
    for index, value in enumerate(launch.args):
        kind, aligned = _specialise(value)
        signature[kernel.arg_names[index]] = kind
        if kind == "constexpr":
            values[(index,)] = value
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    built = triton.compile(ASTSource(kernel, signature, values, attributes), target=target_of(arch), options=options)
    if isinstance(arch, str):
        asm = built.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", asm).group(1))
        spills = sum(map(int, re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", asm)))
        return Compiled(asm, registers, spills, built.metadata.shared)
    return Compiled(*_read_cubin(built.asm["cubin"]), built.metadata.shared)
