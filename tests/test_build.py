"""The build: it records what it left out and why, installs without a compiler, and shares Torch's OpenMP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels._core import native

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def _build(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess, dict, list[str]]:
    """setup.py build into tmp_path: the process, _build.json, and the names of the extensions it made."""
    out = tmp_path / "lib"
    command = [sys.executable, "setup.py", "build", "--build-base", tmp_path, "--build-lib", out]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    record = out / "peft_kernels" / "_build.json"
    facts = json.loads(record.read_text()) if record.exists() else {}
    return done, facts, [path.name for path in (out / "peft_kernels").glob("_C_*")]


def test_none_builds_nothing_and_says_so(tmp_path):
    done, facts, made = _build(tmp_path, PEFT_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stdout
    assert made == [] and set(facts["missing"]) == {"_C_cpu", "_C_cuda"}
    assert facts["missing"]["_C_cpu"] == "left out by PEFT_KERNELS_BUILD"
    assert (tmp_path / "lib" / "peft_kernels" / "__init__.py").exists(), "the Python part is there all the same"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="without cmake the reason is another")
def test_without_a_compiler_the_package_still_builds(tmp_path):
    done, facts, made = _build(tmp_path, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout
    assert made == [] and "/nonexistent/c++" in done.stdout
    assert "error" in facts["missing"]["_C_cpu"].lower()
    assert facts["torch"] == torch.__version__


def test_without_cmake_the_package_still_builds(tmp_path):
    done, facts, made = _build(tmp_path, PATH="/nonexistent")
    assert done.returncode == 0, done.stdout
    assert made == [] and facts["missing"]["_C_cpu"] == "cmake not found"


def test_a_part_that_is_named_must_build(tmp_path):
    done, _, _ = _build(tmp_path, PEFT_KERNELS_BUILD="cpu", PATH="/nonexistent")
    assert done.returncode != 0
    assert "PEFT_KERNELS_BUILD asks for cpu, which cannot be built: cmake not found" in done.stdout
    done, _, _ = _build(tmp_path, PEFT_KERNELS_BUILD="gpu")
    assert done.returncode != 0 and "expected auto, none, cpu or cpu,cuda" in done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this Torch has CUDA")
def test_cuda_part_is_decided_by_torch_not_by_a_visible_gpu(tmp_path):
    _, facts, _ = _build(tmp_path, CXX="/nonexistent/c++")
    assert facts["missing"]["_C_cuda"] == f"Torch {torch.__version__} is a build without CUDA"


def test_reason_for_what_is_missing_reaches_the_user():
    for name in ("_C_cpu", "_C_cuda"):
        assert (name in native.EXTENSIONS) != (name in native.MISSING)
        assert name in native.EXTENSIONS or native.MISSING[name]


@pytest.mark.skipif("_C_cpu" not in native.EXTENSIONS, reason=f"_C_cpu: {native.MISSING.get('_C_cpu')}")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the process's memory map")
def test_one_openmp_runtime_in_the_process():
    code = (
        "import torch, peft_kernels; maps = open('/proc/self/maps').read().split();"
        "print(len({p for p in maps if '/lib' in p and ('gomp' in p or 'iomp' in p)}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 1, "a second OpenMP runtime spins against Torch's"
