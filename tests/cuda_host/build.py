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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
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


def _object(cache: Path, tree: dict[str, str], source: str) -> Path:
    """The object file of one source, compiled unless the cache has it."""
    inputs = _included(tree, source)
    key = hashlib.sha256(repr((_run([CXX, "--version"]), FLAGS, sorted(inputs.items()))).encode()).hexdigest()[:24]
    folder = cache / key
    out = folder / "object.o"
    if not out.exists():
        for path, text in inputs.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        include = f"-I{folder / 'tests/cuda_host'}"
        partial = folder / "partial.o"
        _run([CXX, *FLAGS, include, "-x", "c++", "-c", str(folder / source), "-o", str(partial)])
        partial.rename(out)
    return out


def library(cache: Path, source: str, faults: Iterable[Fault] = ()) -> ctypes.CDLL:
    """The C API of one .cu file (its path in the repository) beside the shim's, for this CPU.

    Processes may ask for it at once: one compiles, the others wait. Each library is a shim of its own.
    """
    tree = _tree(faults)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [_object(cache, tree, path) for path in ("tests/cuda_host/simt.cpp", source)]
        out = objects[1].with_name(f"with_{objects[0].parent.name}.so")
        if not out.exists():
            partial = out.with_suffix(".partial")
            _run([CXX, "-shared", *map(str, objects), "-o", str(partial)])
            partial.rename(out)
    loaded = ctypes.CDLL(str(out))
    loaded.simt_error.restype = ctypes.c_char_p
    loaded.simt_alloc.restype = ctypes.c_void_p
    loaded.simt_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    loaded.simt_free.argtypes = [ctypes.c_void_p]
    return loaded
