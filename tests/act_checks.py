"""The checks of relu_fwd and act_bwd, each a function of an implementation: tests and planted faults run the same."""

from collections.abc import Callable
from dataclasses import dataclass

import bounds
import bounds_act
import numpy as np
import torch
from bias_grad_checks import DTYPES, gradient, wide
from cases import LAYOUTS, lay_out
from torch import Tensor

from peft_kernels.kernels.bias_grad import activations, op
from peft_kernels.kernels.bias_grad.activations import ACTIVATIONS

__all__ = ["ACTIVATIONS", "DTYPES", "wide"]

SMOOTH = ACTIVATIONS[1:]
SIZES = ((0, 5), (3, 0), (1, 1), (1, 9), (3, 8), (17, 33), (70, 1000), (1000, 3))
LARGE = ((4100, 72), (519, 4099), (5, 20_011), (30_011, 2))
"""Past every tile, block and span: many rows, many columns, ragged ends of both."""


@dataclass(frozen=True)
class Run:
    """One implementation: functions of the ops' arguments."""

    relu_fwd: Callable
    act_bwd: Callable


def run_of(name: str) -> Run:
    """What the tests' `impl` of this name, "reference", "op" or "triton" with or without "[cuda]", is for these ops."""
    kind = name.partition("[")[0]
    if kind == "triton":
        return Run(op.triton_act.relu_fwd, op.triton_act.act_bwd)
    one = activations if kind == "reference" else op
    return Run(one.relu_fwd, one.act_bwd)


def mask_of(z: Tensor) -> Tensor:
    """The mask that relu_fwd must give, made by NumPy."""
    passes = ~(z.detach().cpu().double().numpy() <= 0)
    return torch.from_numpy(np.packbits(passes, axis=1, bitorder="little")).to(z.device)


def pair(M: int, N: int, dtype: torch.dtype, device: str, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """dy and z [M, N] in this layout; z within 8, where derivatives are neither 0 nor 1."""
    return gradient(M, N, dtype, device, layout), lay_out(2 * gradient(N, M, dtype, device).t().contiguous(), layout)


def check(run: Run, dy: Tensor, z: Tensor, activation: str, dtype: torch.dtype | None = None) -> None:
    """dz, and dbias in dy's dtype and in the accumulator's (or in `dtype` alone), within the bounds."""
    kept = mask_of(z) if activation == "relu" else z
    for out in {dtype} if dtype else {dy.dtype, wide(dy.dtype)}:
        dz, dbias = run.act_bwd(dy, kept, activation, True, True, out)
        assert dz.dtype == dy.dtype and dz.is_contiguous(), f"dz is {dz.dtype} with strides {dz.stride()}"
        assert dbias.dtype == out and dbias.is_contiguous(), f"dbias is {dbias.dtype}, asked for {out}"
        what = f"of {activation}, dy {list(dy.shape)} {dy.stride()}, z {z.stride()}"
        for name, value in bounds_act.act_bwd(dy, kept, activation, out).items():
            bounds.assert_within(dz if name == "dz" else dbias, *value, f"{name} {what}")


def check_relu(run: Run, z: Tensor) -> None:
    """y and the mask of relu_fwd, exactly."""
    y, mask = run.relu_fwd(z)
    what = f"of z {list(z.shape)} {z.stride()} {z.dtype}"
    assert y.dtype == z.dtype and y.shape == z.shape and y.is_contiguous(), f"y {what} is {y.dtype} {y.stride()}"
    expected = torch.where(z <= 0, 0, z)
    assert torch.equal(y.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0)), f"y {what} differs"
    assert mask.dtype == torch.uint8 and mask.is_contiguous() and torch.equal(mask, mask_of(z)), f"mask {what} differs"


def check_sizes(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    for shape in SIZES:
        check(run, *pair(*shape, dtype, device), activation)
        if activation == "relu":
            check_relu(run, pair(*shape, dtype, device)[1])


def check_layouts(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    """Any strides of dy and of z, together and apart."""
    for shape in ((1, 40), (17, 33), (203, 300)):
        plain = pair(*shape, dtype, device)
        for layout in LAYOUTS:
            dy, z = pair(*shape, dtype, device, layout)
            for one, other in ((dy, z), (dy, plain[1]), (plain[0], z)):
                check(run, one, other, activation, wide(dtype))
            if activation == "relu":
                check_relu(run, z)
    dy, z = pair(40, 70, dtype, device)
    check(run, dy[:1, :1].expand(40, 70), z, activation)  # what y.sum().backward() gives
    check(run, dy[::2, 3:40:3], z[1::2, 4:41:3], activation)


def numbers(dtype: torch.dtype, device: str) -> Tensor:
    """z [rows, 256] to know a derivative by: every finite number of 16 bits; of wider dtypes a dense choice."""
    if dtype.itemsize == 2:
        z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        info = torch.finfo(dtype)
        powers = torch.logspace(-1074 if dtype == torch.float64 else -149, 1023, 40_000, 2.0, dtype=torch.float64)
        powers = powers[powers <= info.max]
        z = torch.cat([powers, -powers, torch.linspace(-20, 20, 40_001, dtype=torch.float64)])
        z = torch.cat([z.to(dtype), torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny], dtype=dtype)])
    z = z[z.isfinite()]
    return torch.nn.functional.pad(z, (0, -len(z) % 256)).view(-1, 256).to(device)


def check_every_number(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    """The derivative itself, dy being 1, and with it the limits at huge and at tiny z."""
    z = numbers(dtype, device)
    check(run, torch.ones_like(z), z, activation, wide(dtype))
    if activation == "relu":
        check_relu(run, z)


def check_not_finite(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    """0 and 1 at z's infinities, NaN for NaN, in their element and column and in no other; dy's inf and NaN pass."""
    inf, nan = torch.inf, torch.nan
    dy, z = torch.ones(57, 40, dtype=dtype, device=device), torch.ones(57, 40, dtype=dtype, device=device)
    one = 1.0 if activation == "relu" else nan
    faults = ((1, -inf, 0.0), (1, inf, 1.0), (1, nan, one), (nan, 1, nan), (inf, 3, inf), (-inf, 3, -inf))
    for i, (dy_value, z_value, _) in enumerate(faults):
        dy[20 + i, 5 * i + 3], z[20 + i, 5 * i + 3] = dy_value, z_value
    kept = mask_of(z) if activation == "relu" else z
    for layout in ("contiguous", "transposed", "columns"):
        args = lay_out(dy, layout), kept if activation == "relu" else lay_out(kept, layout)
        dz, dbias = run.act_bwd(*args, activation, True, True, wide(dtype))
        assert dz.isfinite().sum() == 57 * 40 - sum(not np.isfinite(f[2]) for f in faults), "dz has others not finite"
        assert dbias.isfinite().sum() == 40 - sum(not np.isfinite(f[2]) for f in faults), "dbias has others not finite"
        for i, (dy_value, z_value, expected) in enumerate(faults):
            found = torch.stack([dz[20 + i, 5 * i + 3], dz[20 + i, 5 * i + 3].new_tensor(expected)])
            what = f"dz for dy {dy_value}, z {z_value} is {found[0].item()}, expected {expected}"
            assert torch.equal(*found.nan_to_num(nan=-77.0, posinf=77.0, neginf=-78.0)), what
            column = dbias[5 * i + 3].item()
            what = f"dbias for dy {dy_value}, z {z_value} is {column}, expected {expected}"
            assert np.isfinite(expected) or np.array_equal(column, expected, equal_nan=True), what
    if activation == "relu":
        check_relu(run, torch.tensor([[inf, -inf, nan, -nan, 0.0, -0.0, 1.0, -1.0, nan]], dtype=dtype, device=device))
        dz, _ = run.act_bwd(dy * inf, torch.zeros_like(kept), "relu", True, False, wide(dtype))
        assert (dz == 0).all(), "what ReLU stops is 0, be dy infinite"


def check_needs(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    """What is not needed is empty; what is, is the same."""
    for shape in ((37, 53), (0, 4), (4, 0)):
        dy, z = pair(*shape, dtype, device)
        kept = mask_of(z) if activation == "relu" else z
        whole = run.act_bwd(dy, kept, activation, True, True, wide(dtype))
        for needs in ((True, False), (False, True), (False, False)):
            found = run.act_bwd(dy, kept, activation, *needs, wide(dtype))
            for name, one, needed, all_of_it in zip(("dz", "dbias"), found, needs, whole, strict=True):
                assert one.dtype == all_of_it.dtype, f"{name} is {one.dtype}"
                same = torch.equal(one, all_of_it) if needed else one.shape == (0,)
                assert same, f"{name} of {list(shape)} with needs {needs} differs"


def check_tiny(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    """dy near the bottom of the range, where only the underflow term of the bound is left."""
    dy, z = pair(300, 40, dtype, device)
    check(run, dy * torch.finfo(dtype).smallest_normal, z, activation)


def check_same_sign(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    """Many terms of one sign: too narrow an accumulator stops growing."""
    dy, z = pair(100_000, 3, dtype, device)
    check(run, dy.abs() / 64, z.abs(), activation)  # the sum must fit into fp16


def check_repeats(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    """The same bits each time, and the inputs not written to."""
    for layout in ("contiguous", "transposed", "columns"):
        dy, z = pair(337, 130, dtype, device, layout)
        kept = mask_of(z) if activation == "relu" else z
        before, first = (dy.clone(), kept.clone()), run.act_bwd(dy, kept, activation, True, True, wide(dtype))
        for _ in range(3):
            again = run.act_bwd(dy, kept, activation, True, True, wide(dtype))
            assert all(torch.equal(*two) for two in zip(first, again, strict=True)), "two runs differ"
        assert torch.equal(dy, before[0]) and torch.equal(kept, before[1]), "an input was written to"


def check_far(run: Run, activation: str, dtype: torch.dtype, device: str) -> None:
    """Elements more than 2**31 apart: offsets are 64-bit numbers. On a CPU the memory between is never touched."""
    apart = 2**30 + 24
    if device == "cpu":
        memory = torch.from_numpy(np.zeros((2 * apart + 64) * dtype.itemsize, dtype=np.uint8)).view(dtype)
    else:
        memory = torch.empty(2 * apart + 64, dtype=dtype, device=device)
    for strides in ((apart, 1), (3, apart)):
        shape = (3, 20) if strides[0] == apart else (20, 3)
        dy, z = pair(*shape, dtype, device)
        check(run, memory.as_strided(shape, strides).copy_(dy), z, activation)
        check(run, dy, memory.as_strided(shape, strides).copy_(z), activation)
        if activation == "relu":
            check_relu(run, memory.as_strided(shape, strides).copy_(z))


CHECKS = (check_sizes, check_layouts, check_every_number, check_not_finite, check_needs, check_tiny, check_repeats)
"""What every implementation goes through in every dtype; the two left out take longer."""
