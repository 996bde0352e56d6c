"""Loads the compiled extensions that are there and remembers why the others are not.

Importing this module never fails: a machine without a compiler, a GPU or Triton runs the reference kernels.
"""

import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

_PARTS = {"_C_cpu", "_C_cuda", "triton"}  # what PEFT_KERNELS_DISABLE may name, comma-separated
_PACKAGE = __name__.split(".")[0]
_BUILD_FACTS = Path(__file__).parent.parent / "_build.json"  # written by setup.py beside the extensions

EXTENSIONS: dict[str, ModuleType] = {}
"""Loaded extension modules by name: `_C_cpu`, `_C_cuda`."""

MISSING: dict[str, str] = {}
"""Why an extension, or Triton, is not in use, by name."""


def _disabled() -> set[str]:
    names = os.environ.get("PEFT_KERNELS_DISABLE", "")
    return {name.strip() for name in names.split(",") if name.strip()}


def _warn_of_unknown(names: set[str]) -> None:
    unknown = sorted(names - _PARTS)
    if unknown:
        warnings.warn(f"PEFT_KERNELS_DISABLE names {unknown}; there are {sorted(_PARTS)}", stacklevel=2)


def build_facts() -> dict:
    """What setup.py wrote when the package was built: torch version, compilers, the reason for each part left out."""
    return json.loads(_BUILD_FACTS.read_text()) if _BUILD_FACTS.exists() else {}


def _reason(name: str, error: ImportError) -> str:
    if importlib.util.find_spec(f"{_PACKAGE}.{name}") is not None:
        return f"built, but does not load: {error}"
    facts = build_facts()
    return facts.get("missing", {}).get(name, "not built: install with `pip install .` where a C++ compiler is")


def _load(name: str) -> None:
    if name in _disabled():
        MISSING[name] = "switched off by PEFT_KERNELS_DISABLE"
        return
    try:
        EXTENSIONS[name] = importlib.import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        MISSING[name] = _reason(name, error)


def _find_triton() -> bool:
    if "triton" in _disabled():
        MISSING["triton"] = "switched off by PEFT_KERNELS_DISABLE"
    elif importlib.util.find_spec("triton") is None:
        MISSING["triton"] = "not installed: `pip install triton` for the GPU kernels"
    return "triton" not in MISSING


def has_native_kernel(op: str, key: str) -> bool:
    """Whether a loaded extension implements `op` for dispatch key `key` ("CPU", "CUDA").

    The one place that asks the dispatcher, through a private call that is there in torch 2.11 to 2.14.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


_warn_of_unknown(_disabled())
for _name in ("_C_cpu", "_C_cuda"):
    _load(_name)

HAS_TRITON = _find_triton()
