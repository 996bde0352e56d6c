"""The launch cache: what it compiles for, what it hands over, and on which device; with kernels that only record."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="the launch cache serves Triton kernels, and Triton is optional")

from peft_kernels.kernels._shared.launch import Plan, launch


class Pointer:
    """What launch() asks of a tensor."""

    def __init__(self, dtype=torch.bfloat16, address=1024, device=0):
        self.dtype, self._address, self._device = dtype, address, device

    def data_ptr(self) -> int:
        return self._address

    def get_device(self) -> int:
        return self._device


class Kernel:
    """A JITFunction's face: calling it "compiles"; the compiled code records what it is called with."""

    arg_names = ("x_ptr", "y_ptr", "M", "FLAG", "BLOCK")

    def __init__(self, interpreted=False):
        self.slow, self.fast, self.interpreted = [], [], interpreted

    def __getitem__(self, grid):
        def first(*args, **keywords):
            self.slow.append((grid, args, keywords))
            return None if self.interpreted else Compiled(self)

        return first


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.fast.append((grid, args))


@pytest.fixture(autouse=True)
def on_device_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def plan() -> Plan:
    return Plan((7, 2, 1), {"BLOCK": 64, "FLAG": True}, num_warps=8, num_stages=2)


def test_the_second_call_goes_to_the_compiled_code_with_the_constants_in_the_kernels_order():
    kernel, one, x, y = Kernel(), plan(), Pointer(), Pointer()
    launch(kernel, one, (x,), (y,), (3,))
    assert kernel.slow == [((7, 2, 1), (x, y, 3), {"BLOCK": 64, "FLAG": True, "num_warps": 8, "num_stages": 2})]
    other_x, other_y = Pointer(), Pointer()
    launch(kernel, one, (other_x,), (other_y,), (3,))
    assert len(kernel.slow) == 1 and kernel.fast == [((7, 2, 1), (other_x, other_y, 3, True, 64))]


@pytest.mark.parametrize(
    "x, scalars",
    [
        (Pointer(torch.float16), (3,)),
        (Pointer(address=1032), (3,)),
        (Pointer(), (1,)),
        (Pointer(), (48,)),
    ],
    ids=["dtype", "alignment", "one", "divisible"],
)
def test_whatever_triton_specialises_on_compiles_anew(x, scalars):
    kernel, one = Kernel(), plan()
    launch(kernel, one, (Pointer(),), (Pointer(),), (3,))
    launch(kernel, one, (x,), (Pointer(),), scalars)
    assert len(kernel.slow) == 2 and not kernel.fast


def test_another_kernel_of_the_same_plan_is_another_entry():
    one, first, second = plan(), Kernel(), Kernel()
    for kernel in (first, second, first):
        launch(kernel, one, (Pointer(),), (Pointer(),), (3,))
    assert (len(first.slow), len(first.fast), len(second.slow), len(second.fast)) == (1, 1, 1, 0)


def test_the_interpreter_and_tensors_without_a_gpu_are_never_kept():
    for kernel, x in ((Kernel(interpreted=True), Pointer()), (Kernel(), Pointer(device=-1))):
        one = plan()
        for _ in range(2):
            launch(kernel, one, (x,), (Pointer(),), (3,))
        assert len(kernel.slow) == 2 and not kernel.fast and not one.compiled


def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch):
    inside = []

    @contextmanager
    def device(index):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: index)
        inside.append(index)
        yield
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    monkeypatch.setattr(torch.cuda, "device", device)
    kernel, one = Kernel(), plan()
    for index in (0, 1, 1, 0):
        launch(kernel, one, (Pointer(device=index),), (Pointer(device=index),), (3,))
    assert inside == [1, 1] and len(kernel.slow) == 2 and len(kernel.fast) == 2


def test_many_batch_sizes_do_not_grow_a_plan_without_end():
    kernel, one = Kernel(), plan()
    for M in range(2, 1000):
        launch(kernel, one, (Pointer(),), (Pointer(),), (M,))
    assert len(one.compiled) <= 256
