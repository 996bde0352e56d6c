"""`make gpu`: build, tests by implementation, ceilings, every case beside floor and peers, a short table; resumable.

    python -m benchmarks.gpu [--device cuda|cpu] [--only lora_linear] [--out DIR] [--tune] [--quick] [--force]

The environment variables DEVICE, ONLY, OUT, TUNE, QUICK and FORCE say the same. No network, no git needed. With
--device cpu the same steps run on tiny shapes: a rehearsal, whose rows go to build/rehearsal and are no result.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from peft_kernels._core import native

from . import environment, paths, rows, summary
from .cases import PRIMITIVES
from .steps import BEFORE, DONE, FAILED, NOT_RUN, OVERRAN, Outcome, Step, log_of, run_steps
from .tune import TUNED

_PY = sys.executable
_BUILD = ("-m", "pip", "install", "--no-build-isolation", "--no-index", "--no-deps", "-e", ".")
_BUILD_INPUTS = ("setup.py", "CMakeLists.txt", "pyproject.toml", "csrc")
_REHEARSAL_EVERY = 40  # of the value tests: a rehearsal of the step, the suite itself runs in `make test`
_QUICK_EVERY = 8


def _built(root: Path) -> bool:
    """Whether the extensions were built after the last change of what they are built from."""
    facts = root / "peft_kernels" / "_build.json"
    inputs = [path for name in _BUILD_INPUTS for path in (root / name, *(root / name).rglob("*")) if path.is_file()]
    if not facts.exists() or facts.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        return False
    missing = json.loads(facts.read_text())["missing"]
    return "_C_cuda" not in missing or shutil.which("nvcc") is None


def _build_step(device: str, root: Path) -> Step:
    if device == "cpu" or _built(root):  # a rehearsal builds nothing: it says what is there
        return Step("build", (_PY, "-m", "peft_kernels"), 60)
    return Step("build", (_PY, *_BUILD), 180)


def implementations(device: str) -> list[str]:
    """Names of the tests' `impl` parameter that differ on this device. On CUDA the op is the extension's kernels and
    what they hand on; the extension may be built by this very run, so nothing is asked of it here."""
    if device == "cpu":
        return ["op", "reference"]
    return ["op[cuda]", *(["triton[cuda]"] if native.HAS_TRITON else []), "reference[cuda]"]


def _test_steps(device: str, only: Sequence[str], quick: bool) -> list[Step]:
    """Values of each implementation by name, then the public functions on the device; the first red test stops all."""
    every = _REHEARSAL_EVERY if device == "cpu" else _QUICK_EVERY if quick else 1
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if device == "cuda" else ()
    pytest = (_PY, "-m", "pytest", "-x", "-q", "-p", "benchmarks.device_tests", *workers, "--every", str(every))
    budget = {"cuda": 150, "cpu": 60}[device]
    found = []
    for primitive in (name for name in only if PRIMITIVES[name].has_ops):
        files = sorted(path.as_posix() for path in Path("tests").glob(f"test_{primitive}*.py"))
        for name in implementations(device):
            command = (*pytest, "--implementation", name, *files)
            found.append(Step(f"values {primitive} {name}", command, budget))
    # Tests of code that never meets the device, or that compile for others, have their place in `make test`.
    names = ("aot", "*mutation", "demo", "benchmarks", "fake_gpu", "run_case", "throughput", "cuda_*")
    names += ("memory*", "vram*", "plot", "step*")
    apart = tuple(f"--ignore-glob=tests/test_{name}.py" for name in names)
    public = (*pytest, "--implementation", "device", "tests", *apart)
    return [*found, Step("public functions", public, budget, stops=(FAILED,))]


def _measure_steps(device: str, only: Sequence[str], work: Path, tune: bool, quick: bool, force: bool) -> list[Step]:
    """Ceilings, then for each primitive its tuning, if asked for, and its suite on what the tuning found."""
    where = ("--device", device)
    found = [Step("ceilings", (_PY, "-m", "benchmarks.ceilings", *where, "--out", str(work)), 60, stops=(FAILED,))]
    flags = ("--quick",) * quick + ("--force",) * (force or tune)  # what was measured before was with other tiles
    for primitive in only:
        env = {}
        if tune and device == "cuda" and primitive in TUNED:
            tuned = work / f"{primitive}_configs.json"
            command = (_PY, "-m", "benchmarks.tune", primitive, "--out", str(tuned), *("--quick",) * quick)
            found.append(Step(f"tune {primitive}", command, 200, stops=()))
            env = {"PEFT_KERNELS_CONFIGS": str(tuned)}
        if tune and primitive in paths.SWEPT:
            command = (_PY, "-m", "benchmarks.paths", primitive, *where, "--csv", str(work / f"{primitive}_paths.csv"))
            found.append(Step(f"paths {primitive}", (*command, *("--tiny",) * (device == "cpu")), 200, stops=()))
        shapes = ("--suite", "gpu", "--model", "llama-3-8b") if device == "cuda" else ("--suite", "tiny")
        command = (_PY, "-m", "benchmarks.throughput", primitive, *shapes, *where)
        command += ("--csv", str(work / f"{primitive}.csv"), *flags)
        found.append(Step(f"measure {primitive}", command, 300, stops=(), env=env))
    sizes = () if device == "cuda" else ("--model", "smollm2-135m", "--layers", "1", "--seq", "16", "--rounds", "2")
    peers = ("peft-lora", "peft-lora-bf16", "peft-lora-liger", "peft-lora-cce")
    step = (_PY, "-m", "benchmarks.step", *where, *sizes, "--method", "lora", "lora-bf16", "qlora", *peers)
    step += ("--csv", str(work / "step.csv"))
    found.append(Step("training step", step, 150, stops=()))
    return [*found, *_memory_steps(device, work)]


def _memory_steps(device: str, work: Path) -> list[Step]:
    """What vram.py predicts beside what the device's allocator gives; the pictures of all that was measured."""
    lora, bitfit = ("lora", "peft-lora"), ("bitfit", "torch-bitfit")
    asked = {"minilm-l6": ((*lora, *bitfit, "full"), ("--batch", "2", "--seq", "16", "--dtype", "fp32"))}
    if device == "cuda":
        asked = {
            "smollm2-135m": ((*lora, "full"), ("--batch", "8", "--seq", "1024")),
            "llama-3-8b": ((*lora, "qlora"), ("--batch", "1", "--seq", "2048")),
            "bert-large": ((*bitfit, "lora"), ("--batch", "32", "--seq", "128")),
        }
    found = []
    for model, (methods, sizes) in asked.items():
        command = (_PY, "-m", "benchmarks.vram", "--model", model, "--method", *methods, *sizes)
        command += ("--measure", device, "--within", "1", "--csv", str(work / f"memory_{model}.csv"))
        found.append(Step(f"memory {model}", command, 90, stops=()))
    if environment.version("matplotlib") != "none":
        found.append(Step("pictures", (_PY, "-m", "benchmarks.plot", str(work)), 60, stops=()))
    return found


def publish(work: Path, out: Path, only: Sequence[str], source: str, outcomes: Sequence[Outcome]) -> list[Path]:
    """Merge what this version measured into `out`: a result file is replaced whole or not at all. Beside the rows, the
    files of the steps that are done."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in (*only, *(f"{primitive}_paths" for primitive in only), "step"):
        found = [row for row in rows.read(work / f"{name}.csv") if row["source"] == source]
        if found:
            rows.write(out / f"{name}.csv", found)
            written.append(out / f"{name}.csv")
    for one in outcomes:
        kind, _, name = one.name.partition(" ")
        pattern = {"ceilings": "ceilings.json", "tune": f"{name}_configs.json", "memory": f"memory_{name}.csv"}
        pattern["pictures"] = "*.png"
        for path in sorted(work.glob(pattern[kind])) if kind in pattern and one.status in (DONE, BEFORE) else ():
            shutil.copyfile(path, out / path.name)
            written.append(out / path.name)
    return written


def _verdict(work: Path, one: Outcome) -> str:
    """The last line of a memory step's log: how far measured is from predicted."""
    log = log_of(work, one.name)
    if not one.name.startswith("memory") or not log.exists():
        return ""
    return ([""] + log.read_text(errors="replace").splitlines())[-1]


def _report(device: str, work: Path, only: Sequence[str], source: str, outcomes: Sequence[Outcome]) -> str:
    parts = [environment.describe(device), summary.ceilings(work / "ceilings.json")]
    for primitive in only:
        found = [row for row in rows.read(work / f"{primitive}.csv") if row["source"] == source]
        parts += [f"\n{primitive}: time over the floor\n", summary.table(found), *summary.problems(found)]
        swept = [row for row in rows.read(work / f"{primitive}_paths.csv") if row["source"] == source]
        parts += ["\nfastest way:", *paths.ranges(swept)] if swept else []
    steps = [row for row in rows.read(work / "step.csv") if row["source"] == source]
    parts += ["\na training step\n", summary.training(steps)]
    lines = [(one.name, one.status, f"{one.seconds:.0f} s", one.note or _verdict(work, one)) for one in outcomes]
    return "\n".join([*parts, "", rows.markdown(("step", "status", "took", ""), lines)])


def _arguments() -> argparse.Namespace:
    environ = os.environ.get
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default=environ("DEVICE") or default)
    parser.add_argument("--only", choices=sorted(PRIMITIVES), default=environ("ONLY") or None)
    parser.add_argument("--out", type=Path, default=environ("OUT") or None, help="default: benchmarks/results")
    parser.add_argument("--limit", type=float, default=560, help="seconds for all steps together")
    for name, meaning in (
        ("tune", "sweep launch configurations and paths first, and print what to paste"),
        ("quick", "an eighth of the tests, smaller shapes, fewer rounds"),
        ("force", "repeat steps that are done for these sources"),
    ):
        parser.add_argument(f"--{name}", action="store_true", default=bool(environ(name.upper())), help=meaning)
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    device, root = options.device, environment.ROOT
    os.chdir(root)
    only = [options.only] if options.only else sorted(PRIMITIVES)
    slug, source = environment.device_slug(device), environment.source_hash()
    work = root / "build" / "gpu" / slug
    out = options.out or root / ("benchmarks/results" if device == "cuda" else "build/rehearsal")
    print(environment.describe(device), flush=True)
    steps = [_build_step(device, root), *_test_steps(device, only, options.quick)]
    steps += _measure_steps(device, only, work, options.tune, options.quick, options.force)
    outcomes = run_steps(steps, work, source, root, options.limit, options.force)
    written = publish(work, Path(out) / slug, only, source, outcomes)
    print("\n" + _report(device, work, only, source, outcomes))
    print("\n".join(f"wrote {path}" for path in written) + f"\nlogs in {work / 'logs'}")
    if environment.source_hash() != source:
        print("the sources changed during the run: rows of the changed ones are not shown")
    bad = [one for one in outcomes if one.status in (FAILED, OVERRAN, NOT_RUN)]
    if bad:
        print(f"not done: {', '.join(one.name for one in bad)}; the same command goes on from there")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
