"""Compiles .cu files and the shim into a library for this CPU, and keeps it under the hash of what went into it."""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HOME = Path(torch.__file__).parent
CXX = shutil.which(os.environ.get("CXX", "c++"))

FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing"]
# Traps need no runtime library in the Python process. No fortified longjmp: it refuses to jump between stacks.
FLAGS += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-U_FORTIFY_SOURCE"]

Fault = tuple[str, str, str]
"""(file below the repository, a text that occurs there once, what to put in its place)."""


def _tree(faults: Iterable[Fault]) -> dict[str, str]:
    """Every file that a library could depend on, by its path in the repository, with the faults planted."""
    paths = [path for end in ("cu", "cuh", "h") for path in (ROOT / "csrc").glob(f"*/*.{end}")]
    paths += [path for end in ("cu", "h", "cpp") for path in HERE.glob(f"*.{end}")]
    paths += [*(ROOT / "csrc").glob("*/bind_cuda.cpp"), *(HERE / "on_cpu").rglob("*.h")]
    tree = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(paths)}
    for path, old, new in faults:
        if tree[path].count(old) != 1:
            raise ValueError(f"{path} holds {tree[path].count(old)} times the text to replace, expected once: {old!r}")
        tree[path] = tree[path].replace(old, new)
    return tree


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _included(tree: dict[str, str], source: str) -> dict[str, str]:
    """The source and all that it includes in quotes, beside itself or from the shim, by path."""
    found, ahead = {}, [source]
    while ahead:
        path = ahead.pop()
        found[path] = tree[path]
        for name in re.findall(r'#include "(.+)"', tree[path]):
            beside = os.path.normpath(f"{os.path.dirname(path)}/{name}")
            target = beside if beside in tree else f"tests/cuda_host/{name}"
            if target not in found:
                ahead.append(target)
    return found


def _object(cache: Path, tree: dict[str, str], source: str, flags: Iterable[str] = FLAGS, beside: str = "") -> Path:
    """The object file of one source, compiled unless the cache has it; `beside`: a folder that it sees besides."""
    inputs = _included(tree, source) | {path: text for path, text in tree.items() if beside and path.startswith(beside)}
    key = hashlib.sha256(repr((_run([CXX, "--version"]), flags, sorted(inputs.items()))).encode()).hexdigest()[:24]
    folder = cache / key
    out = folder / "object.o"
    if not out.exists():
        for path, text in inputs.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        include = f"-I{folder / (beside or 'tests/cuda_host')}"
        partial = folder / "partial.o"
        _run([CXX, include, *flags, "-x", "c++", "-c", str(folder / source), "-o", str(partial)])
        partial.rename(out)
    return out


def _linked(objects: list[Path], flags: Iterable[str] = ()) -> Path:
    key = hashlib.sha256("".join(path.parent.name for path in objects).encode()).hexdigest()[:24]
    out = objects[-1].with_name(f"with_{key}.so")
    if not out.exists():
        partial = out.with_suffix(".partial")
        _run([CXX, "-shared", *map(str, objects), "-o", str(partial), *flags])
        partial.rename(out)
    return out


def library(cache: Path, source: str, faults: Iterable[Fault] = ()) -> ctypes.CDLL:
    """The C API of one .cu file (its path in the repository) beside the shim's, for this CPU.

    Processes may ask for it at once: one compiles, the others wait. Each library is a shim of its own.
    """
    tree = _tree(faults)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        out = _linked([_object(cache, tree, path) for path in ("tests/cuda_host/simt.cpp", source)])
    loaded = ctypes.CDLL(str(out))
    loaded.simt_error.restype = ctypes.c_char_p
    loaded.simt_alloc.restype = ctypes.c_void_p
    loaded.simt_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    loaded.simt_free.argtypes = [ctypes.c_void_p]
    return loaded


def binding(cache: Path, primitive: str, sources: Iterable[str], faults: Iterable[Fault] = ()) -> str:
    """csrc/<primitive>/bind_cuda.cpp over the .cu files that it calls, for this CPU: the namespace of its ops.

    They are registered for the CPU, without schemas: what has no GPU can run the checks, the choices and the products
    of an extension. tests/cuda_host/on_cpu stands in for what Torch and CUDA give a GPU's.
    """
    faults = sorted(faults)
    tree, beside = _tree(faults), "tests/cuda_host/on_cpu/"
    namespace = "cuda_host_" + hashlib.sha256(repr(faults).encode()).hexdigest()[:8]
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-include", "registers.h"]
    flags += [f"-DCUDA_HOST_NAMESPACE={namespace}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-DCUDA_HOST_TORCH={torch.__version__}", f"-isystem{HOME / 'include'}"]  # another is compiled anew
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [_object(cache, tree, path) for path in ("tests/cuda_host/simt.cpp", *sources)]
        objects.append(_object(cache, tree, f"csrc/{primitive}/bind_cuda.cpp", flags, beside))
        out = _linked(objects, [f"-L{HOME / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-z,lazy"])
    ctypes.CDLL(str(out), mode=os.RTLD_LAZY)  # kernels that are never called, Hopper's, may be missing
    return namespace
