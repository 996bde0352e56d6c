"""What the tests of benchmarks/step.py share: small cases, and peers as if they were installed."""

from dataclasses import replace

import torch

from benchmarks import architectures, memory_methods, vram
from benchmarks.step_contenders import StepCase

SMALL = ("--model", "smollm2-135m", "--layers", "1", "--seq", "16", "--rounds", "2", "--rank", "4", "--device", "cpu")


def case(layers: int = 1, dtype: torch.dtype = torch.float32, model: str = "smollm2-135m") -> StepCase:
    return StepCase(architectures.find(model), layers, 1, 16, memory_methods.Options(4, "all-linear", dtype))


def here(*names: str) -> list[memory_methods.Method]:
    """Methods as if what they need were installed, and ran on a CPU."""
    return [replace(vram.methods()[name], missing="", cuda_only=False) for name in names]
