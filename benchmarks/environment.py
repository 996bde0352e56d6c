"""Where a figure was measured: the device, driver, versions, threads, commit and date that every row carries."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("peft_kernels", "csrc", "benchmarks", "tests")
_SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".toml")
_DEFAULT_LAST_LEVEL = 32 * 1024**2  # bytes; when the system does not say how large its L3 is


def _output(*command: str) -> str:
    """Standard output of a command, or "" when it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit measured, "+dirty" when tracked files differ from it; "unknown" without git.

    GIT_COMMIT names it where the sources were copied without their repository, or with an older state of it.
    """
    sha = os.environ.get("GIT_COMMIT") or _output("git", "rev-parse", "--short=12", "HEAD")
    if "GIT_COMMIT" in os.environ or not sha:
        return sha or "unknown"
    # Results are written by the very run that asks, so they do not make its sources another version.
    dirty = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return sha + ("+dirty" if dirty else "")


def source_hash() -> str:
    """12 hex digits of the sources' content: names a version where there is no git, and tells edited trees apart."""
    digest = hashlib.sha256()
    files = [path for folder in _SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in _SUFFIXES]
    files += [path for path in ROOT.iterdir() if path.suffix in _SUFFIXES]
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def version(package: str) -> str:
    """The installed version of a distribution, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cpu_model() -> str:
    """The CPU's name. On x86 its family and model too: a virtual machine may call every generation of a maker alike."""
    info = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"^([a-z ]+?)\s*:\s*(.+)$", info.read_text(), re.M)) if info.exists() else {}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']} model {facts['model']})" if "cpu family" in facts else name


def cpu_isa() -> str:
    """The instruction sets that decide a matrix product's speed, from the widest down."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")
    return " ".join(name for name in known if name in flags) or torch.backends.cpu.get_cpu_capability()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {torch.get_num_threads()} threads"


def device_slug(device: str) -> str:
    """The folder of a device's results: its name in lower case, words joined by "-"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def last_level_cache(device: str) -> int:
    """Bytes of the last cache before memory: L2 of a GPU, L3 of a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if not sizes:
        return _DEFAULT_LAST_LEVEL
    return max(int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes)


def environment(device: str) -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else ""
    return {
        "device": device_name(device),
        "driver": driver.splitlines()[0] if driver else "",
        "cuda": (torch.version.cuda or "") if device == "cuda" else "",
        "isa": cpu_isa() if device == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "peft": version("peft"),
        "commit": commit(),
        "source": source_hash(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def describe(device: str) -> str:
    """One line for the head of a printed table."""
    facts = environment(device)
    names = ("device", "isa", "driver", "cuda", "torch", "triton", "peft", "commit", "date")
    return ", ".join(
        f"{name} {facts[name]}" if name not in ("device", "isa") else facts[name] for name in names if facts[name]
    )
