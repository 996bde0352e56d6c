"""Seeds, a fresh compiler, poisoned memory, and the implementations that the value tests run on, by name."""

import os
import sys

import pytest
import torch
from cases import implementations

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers share the cores: with a full set of threads each, they wait for one another (measured 10 x slower).
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

if torch.cuda.is_available():
    # cuBLAS may otherwise add split-K partial sums in 16 bits: a rounding that no bound here allows.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", implementations(), ids=lambda one: one.name)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Dynamo leaves code for good that raised while it was traced once, and that it has compiled too often."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def device() -> str:
    """Where tests of the public functions run: the GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN (integers: the largest value), in Python and in C++: an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # warn_only: on CUDA some matmuls would raise without CUBLAS_WORKSPACE_CONFIG, which is not the point here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
