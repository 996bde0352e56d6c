"""Drives CMake for the compiled extensions; everything else about the package is in pyproject.toml.

PEFT_KERNELS_BUILD: auto (default) | cpu | cpu,cuda | none. In auto a part that cannot be built is left out and the
reason goes into peft_kernels/_build.json; a part that is named must build. PEFT_KERNELS_CUDA_ARCHS: e.g. "80;90a;100",
for the CUDA files that are not of one architecture (those named *_sm90.cu are).
"""

import functools
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
EXTENSION = {"cpu": "_C_cpu", "cuda": "_C_cuda"}
CUDA_ARCHS = "80;90a;100"

_TORCH_FACTS = """
import json, torch
from pathlib import Path
from torch.utils import cpp_extension
lib = Path(torch.__file__).parent / "lib"
openmp = sorted(p for d in (lib, lib.parent.parent / "torch.libs") for p in d.glob("lib[gi]*omp*.so*"))
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "abi": int(torch.compiled_with_cxx11_abi()),
    "include": cpp_extension.include_paths(), "lib": str(lib), "openmp": str(openmp[0]) if openmp else ""}))
"""


@functools.cache
def torch_facts() -> dict:
    """Version and paths of the Torch to build against, {} without one.

    Isolated builds (`pip install .`) hide the environment that the package is for; -I looks past pip's hiding, so that
    the extensions are compiled against the Torch they will run with and no second one is downloaded.
    """
    for flags in ([], ["-I"]):
        run = subprocess.run(
            [sys.executable, *flags, "-c", _TORCH_FACTS], capture_output=True, text=True, cwd=ROOT / "csrc"
        )
        if run.returncode == 0:
            return json.loads(run.stdout.splitlines()[-1])
    return {}


def wanted_parts() -> tuple[list[str], bool]:
    """The parts to build, and whether one that fails is an error."""
    choice = os.environ.get("PEFT_KERNELS_BUILD", "auto").strip() or "auto"
    if choice in ("auto", "none"):
        return (list(EXTENSION) if choice == "auto" else []), False
    parts = [part.strip() for part in choice.split(",")]
    unknown = set(parts) - set(EXTENSION)
    if unknown:
        raise SystemExit(f"PEFT_KERNELS_BUILD is {choice!r}: expected auto, none, cpu or cpu,cuda")
    return parts, True


def pybind11_include(torch: dict) -> str:
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return pybind11.get_include()
    return torch["include"][0]  # Torch carries a copy


def nvcc_major() -> str:
    """ "13" for an nvcc of CUDA 13.0."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return said.partition("release ")[2].partition(".")[0]


def obstacle(part: str, torch: dict) -> str:
    """Why `part` cannot be built here, or ''."""
    if not torch:
        return "no Torch to build against"
    if shutil.which("cmake") is None:
        return "cmake not found"
    if part == "cuda" and torch["cuda"] is None:
        return f"Torch {torch['version']} is a build without CUDA"
    if part == "cuda" and shutil.which("nvcc") is None:
        return "nvcc not found"
    if part == "cuda" and nvcc_major() != torch["cuda"].split(".")[0]:
        return f"nvcc is of CUDA {nvcc_major()}, Torch of CUDA {torch['cuda']}: the runtime it brings may not run here"
    return ""


class CMakeBuild(build_ext):
    """Builds every part with CMake and writes _build.json beside the extensions."""

    def run(self) -> None:
        parts, strict = wanted_parts()
        torch = torch_facts() if parts else {}
        package = ROOT / "peft_kernels" if self.inplace else Path(self.build_lib).resolve() / "peft_kernels"
        package.mkdir(parents=True, exist_ok=True)
        missing = {}
        for part, name in EXTENSION.items():
            for stale in package.glob(f"{name}.*"):
                stale.unlink()
            reason = "left out by PEFT_KERNELS_BUILD" if part not in parts else obstacle(part, torch)
            reason = reason or self.cmake(part, torch, package)
            if reason:
                missing[name] = reason
                if strict and part in parts:
                    raise SystemExit(f"PEFT_KERNELS_BUILD asks for {part}, which cannot be built: {reason}")
                print(f"peft_kernels: {name} is left out: {reason}", file=sys.stderr)
        facts = {
            "torch": torch.get("version"),
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "compiler": {part: self.compiler_name(part) for part in parts if EXTENSION[part] not in missing},
            "missing": missing,
        }
        (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def build_dir(self, part: str) -> Path:
        return Path(self.build_temp).resolve() / part

    def cmake(self, part: str, torch: dict, package: Path) -> str:
        """Configure and build one part; '' or the last line that says what went wrong."""
        directory = self.build_dir(part)
        definitions = {
            "PART": part,
            "TORCH_INCLUDE_DIRS": ";".join(torch["include"]),
            "TORCH_LIB_DIR": torch["lib"],
            "TORCH_VERSION": torch["version"],
            "TORCH_OPENMP_LIBRARY": torch["openmp"],
            "CXX11_ABI": torch["abi"],
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "PYBIND11_INCLUDE_DIR": pybind11_include(torch),
            "EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "OUTPUT_DIR": package,
            "CUDA_ARCHS": os.environ.get("PEFT_KERNELS_CUDA_ARCHS", CUDA_ARCHS),
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT), "-B", str(directory), *generator]
        shutil.rmtree(directory / "CMakeFiles", ignore_errors=True)
        (directory / "CMakeCache.txt").unlink(missing_ok=True)
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (configure, ["cmake", "--build", str(directory), "--parallel", jobs]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout)
            if done.returncode:
                errors = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower()]
                return (errors or [f"{command[0]} failed"])[0]
        return ""

    def compiler_name(self, part: str) -> str:
        """Name and version of the C++ compiler that CMake found."""
        found = {}
        for cache in self.build_dir(part).glob("CMakeFiles/*/CMakeCXXCompiler.cmake"):
            for line in cache.read_text().splitlines():
                name, _, value = line.removeprefix("set(").rstrip(")").partition(" ")
                found[name] = value.strip('"')
        return f"{found.get('CMAKE_CXX_COMPILER_ID')} {found.get('CMAKE_CXX_COMPILER_VERSION')}"

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "peft_kernels"
        return [str(path) for pattern in ("_C_*", "_build.json") for path in package.glob(pattern)]


# Without a Torch in sight pip has to bring one into the isolated build; setuptools hands setup_requires to it.
setup(
    ext_modules=[Extension(f"peft_kernels.{name}", []) for name in EXTENSION.values()],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if wanted_parts()[0] == [] or torch_facts() else ["torch>=2.11"],
)
