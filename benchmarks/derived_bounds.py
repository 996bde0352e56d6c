"""The test-suite's derived bounds for the benchmarks, so that the two cannot drift."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

from torch import Tensor, float64

_TESTS = Path(__file__).resolve().parent.parent / "tests"


def load(name: str) -> ModuleType:
    """tests/<name>.py, as the module that the files beside it import by that name; by path, for `tests` itself is many
    packages' name."""
    found = sys.modules.get(name)
    if found is None:
        spec = importlib.util.spec_from_file_location(name, _TESTS / f"{name}.py")
        found = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return found


bounds = load("bounds")


def worst(value: Tensor, truth: Tensor, bound: Tensor) -> float:
    """The largest |value - truth| / bound; inf where a value is no number or the shape another."""
    if value.shape != truth.shape:
        return math.inf
    error = ((value.to(float64) - truth).abs() / bound).max().item() if value.numel() else 0.0
    return math.inf if math.isnan(error) else error
