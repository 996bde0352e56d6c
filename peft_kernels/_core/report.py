"""What `python -m peft_kernels` prints: versions, the compiled parts or why they are missing, who owns each op."""

import platform
from importlib import metadata

import torch
from tabulate import tabulate

from . import native
from .registry import OWNERS


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension(name: str) -> str:
    if name not in native.EXTENSIONS:
        return native.MISSING[name]
    module = native.EXTENSIONS[name]
    return f"loaded, {module.isa()}" if hasattr(module, "isa") else "loaded"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none visible"
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    return "; ".join(found)


def facts() -> list[tuple[str, str]]:
    """(name, value) of what decides how fast this installation is."""
    rows = [
        ("peft_kernels", _version("peft_kernels")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton") if native.HAS_TRITON else native.MISSING["triton"]),
        ("_C_cpu", _extension("_C_cpu")),
        ("_C_cuda", _extension("_C_cuda")),
        ("CUDA devices", _devices()),
    ]
    built = {name: value for name, value in native.build_facts().items() if name != "missing"}
    return rows + [(f"built with: {name}", str(value)) for name, value in built.items()]


def owners() -> list[tuple[str, str, str]]:
    """(op, dispatch key, who runs it); any other device runs the reference."""
    return [(op, key, owner) for (op, key), owner in sorted(OWNERS.items())]


def report() -> str:
    return f"{tabulate(facts(), tablefmt='plain')}\n\n{tabulate(owners(), ('op', 'device', 'kernel'))}"
