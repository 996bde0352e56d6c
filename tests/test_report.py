"""`python -m peft_kernels`: runs everywhere, names every part that is missing and who owns each op."""

import os
import subprocess
import sys

import pytest
import torch

from peft_kernels._core import native, report
from peft_kernels._core.registry import OWNERS


def run(**environment) -> str:
    command = [sys.executable, "-m", "peft_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prints_versions_extensions_and_owners():
    text = run()
    assert torch.__version__ in text
    for name in ("_C_cpu", "_C_cuda", "triton", "CUDA devices"):
        assert name in text
    rows = [line.split() for line in text.splitlines()]
    for (op, key), owner in OWNERS.items():
        assert [op, key, owner] in rows


def test_works_with_every_part_switched_off_and_says_so():
    text = run(PEFT_KERNELS_DISABLE="_C_cpu,_C_cuda,triton")
    assert text.count("switched off by PEFT_KERNELS_DISABLE") == 3
    owners = [line.split()[-1] for line in text.splitlines() if line.startswith("lora_linear_")]
    assert owners == ["reference"] * 4


def test_shows_the_instruction_set_and_the_build(monkeypatch):
    class Extension:
        @staticmethod
        def isa() -> str:
            return "avx512"

    monkeypatch.setitem(native.EXTENSIONS, "_C_cpu", Extension)
    monkeypatch.setattr(native, "build_facts", lambda: {"compiler": "g++ 13", "missing": {"_C_cuda": "no nvcc"}})
    facts = dict(report.facts())
    assert facts["_C_cpu"] == "loaded, avx512"
    assert facts["built with: compiler"] == "g++ 13"
    assert "built with: missing" not in facts


@pytest.mark.parametrize("name", ["_C_cpu", "_C_cuda"])
def test_a_missing_extension_has_a_reason(name):
    assert name in native.EXTENSIONS or native.MISSING[name]
