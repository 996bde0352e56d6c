"""The checks of norm, each a function of an implementation: tests and planted faults run the same."""

from dataclasses import replace

import bounds
import bounds_norm
import numpy as np
import torch
from bounds_norm import Statistics
from cases import LAYOUTS, lay_out
from norm_cases import (
    FULL,
    GRADIENTS,
    KINDS,
    Data,
    Kind,
    Run,
    check,
    check_gradients,
    data,
    given_statistics,
    what_of,
    wide,
)
from torch import Tensor

SIZES = [(M, K) for M in (0, 1, 17) for K in (1, 3, 8, 33, 384, 1000, 4096)]
SIZES += [(1000, K) for K in (1, 8, 33)] + [(3, 20_011), (2, 16_385)]
LARGE = ((1030, 768, FULL[0]), (261, 4099, FULL[1]), (40_011, 5, FULL[0]), (37, 8200, FULL[0]))
"""Past every tile, block and span: many rows, many columns, ragged ends of both."""


def check_sizes(run: Run, dtype: torch.dtype, device: str) -> None:
    for M, K in SIZES:
        for kind in FULL:
            check(run, data(M, K, dtype, device, kind))


def check_kinds(run: Run, dtype: torch.dtype, device: str) -> None:
    for kind in KINDS:
        for M, K in ((19, 40), (5, 601)):
            check(run, data(M, K, dtype, device, kind))


def check_subsets(run: Run, dtype: torch.dtype, device: str) -> None:
    """Each of the 8 subsets of gradients, with what is not needed left out, with and without dtotal and weight."""
    for kind in (*FULL, Kind(weight="other"), Kind(rms=True, wide_y=True)):
        one = data(21, 90, dtype, device, kind)
        for out in {dtype, wide(dtype)}:
            given = given_statistics(one.x, one)
            found = Statistics.given(*given)
            truth = bounds_norm.backward(one.dy, one.dtotal, one.x, found, one.weight, one.rms, out, dtype)
            for bits in range(8):
                check_gradients(run, one, one.x, *given, truth, out, tuple(bool(bits >> i & 1) for i in range(3)))
            if one.rms:  # a mean is what nobody reads then
                ones = torch.ones_like(given[1])
                check_gradients(run, one, one.x, ones, given[1], truth, out)


def check_layouts(run: Run, dtype: torch.dtype, device: str) -> None:
    for layout in LAYOUTS:
        for shape, kind in (((1, 40), FULL[0]), ((37, 33), FULL[0]), ((203, 24), FULL[1]), ((9, 24), Kind())):
            check(run, data(*shape, dtype, device, kind, layout))
    one = data(24, 56, dtype, device)
    twice = {name: row.repeat_interleave(2)[::2] for name, row in (("weight", one.weight), ("bias", one.bias))}
    check(run, replace(one, **twice))
    check(run, replace(one, x=one.x[:, :1].expand(24, 56)))  # constant rows of stride 0
    check(run, replace(one, dy=one.dy[:1, :1].expand(24, 56)))  # what y.sum().backward() gives


def check_offsets(run: Run, dtype: torch.dtype, device: str) -> None:
    """|mean| >> std: the variance of centred values keeps its digits, E[x**2] - E[x]**2 loses them."""
    sizes = {torch.float32: (30, 1e3, -1e4), torch.float64: (1e4, 1e9)}.get(dtype, (30, -300))
    for offset in sizes:
        for K in (33, 512, 5000):
            one = data(7, K, dtype, device, Kind())
            check(run, replace(one, x=(one.x.double() + offset).to(dtype)))


def check_constant_rows(run: Run, dtype: torch.dtype, device: str) -> None:
    """var = 0: eps alone keeps rstd finite."""
    for value in (0.0, 1.0, -0.3, 100.0):
        for eps in (1e-5, 1e-12):
            one = data(6, 100, dtype, device, Kind())
            flat = replace(one, x=torch.full_like(one.x, value), eps=eps, dy=one.dy / 2**14)
            check(run, flat)
            check(run, replace(flat, rms=True))


def check_eps(run: Run, dtype: torch.dtype, device: str) -> None:
    """As large as the variance, so that where it is added shows; and none."""
    for kind in FULL:
        for eps in (1.5, 0.0):
            check(run, replace(data(11, 70, dtype, device, kind), eps=eps))


def check_long_rows(run: Run, dtype: torch.dtype, device: str) -> None:
    """Sums over 65,536 terms of one sign and over a few more: a row cut into blocks, with a rest."""
    for K in (65_536, 70_003):
        one = data(2, K, dtype, device, Kind())
        one = replace(one, x=one.x.abs(), dy=one.dy.abs(), weight=one.weight.abs())
        check(run, one)
        check(run, replace(one, rms=True))


def _assert_pattern(found: Tensor, truth: Tensor, name: str) -> None:
    """Not finite in the same places as the truth."""
    same = found.isfinite() == truth.isfinite()
    assert same.all(), f"{name}: finite where the truth is not, or the other way round, at {(~same).nonzero()[:4]}"


def check_rows_not_finite(run: Run, dtype: torch.dtype, device: str) -> None:
    """inf and NaN in x stay in their rows of y, mean, rstd and dx, and never reach dbias."""
    for rms in (False, True):
        one = data(23, 40, dtype, device, Kind(rms=rms))
        x = one.x.clone()
        x[3, 5], x[7, 0], x[11, 39], x[22, 8] = torch.inf, torch.nan, -torch.inf, torch.inf
        rows = x.isfinite().all(1)
        good = replace(one, x=x[rows], dy=one.dy[rows])
        y, _, mean, rstd = replace(one, x=x).forward(run)
        grads = run.bwd(one.dy, None, x, None if rms else mean, rstd, one.weight, rms, *(True,) * 3, dtype, dtype)
        truth = bounds_norm.forward(x, one.weight, one.bias, one.eps, rms, dtype)
        found = bounds_norm.statistics(x, one.eps, rms)
        gradients = bounds_norm.backward(one.dy, None, x, found, one.weight, rms, dtype, dtype)
        for name, out in (("y", y), ("rstd", rstd), *((("mean", mean),) if not rms else ())):
            _assert_pattern(out, truth[name][0], name)
        for name, out in zip(GRADIENTS, grads, strict=True):
            _assert_pattern(out, gradients[name][0], name)
        bounds.assert_within(grads[2], *gradients["dbias"], "dbias")
        kept = bounds_norm.forward(good.x, one.weight, one.bias, one.eps, rms, dtype)
        bounds.assert_within(y[rows], *kept["y"], "y beside rows that are not finite")
        found = bounds_norm.statistics(good.x, one.eps, rms)
        kept = bounds_norm.backward(good.dy, None, good.x, found, one.weight, rms, dtype, dtype)
        bounds.assert_within(grads[0][rows], *kept["dx"], "dx beside rows that are not finite")


def check_sums_not_finite(run: Run, dtype: torch.dtype, device: str) -> None:
    """inf and NaN in dy come out as a plain sum gives them, in their column of dweight and dbias and in no other."""
    one = data(517, 40, dtype, device, Kind())
    dy, inf = one.dy.clone(), torch.inf
    for column, values in enumerate(((inf,), (-inf,), (inf, -inf), (torch.nan,), (inf, inf))):
        for i, value in enumerate(values):
            dy[71 + 300 * i, 7 * column] = value
    mean, rstd = given_statistics(one.x, one)
    found = Statistics.given(mean, rstd)
    truth = bounds_norm.backward(dy, None, one.x, found, one.weight, False, wide(dtype), dtype)
    for layout in ("contiguous", "transposed", "columns"):
        args = lay_out(dy, layout), None, one.x, mean, rstd, one.weight, False, *(True,) * 3, wide(dtype), dtype
        for name, sums in zip(GRADIENTS[1:], run.bwd(*args)[1:], strict=True):
            value, error = truth[name]
            same = torch.where(value.isfinite(), True, torch.isclose(sums.double(), value, equal_nan=True))
            assert same.all(), f"{name}: {sums.tolist()}, expected {value.tolist()}"
            finite = value.isfinite()
            bounds.assert_within(sums[finite], value[finite], error[finite], name)


def check_tiny(run: Run, dtype: torch.dtype, device: str) -> None:
    """Values near the bottom of the range, where only the underflow terms of the bounds are left."""
    for rms in (False, True):
        one, least = data(30, 40, dtype, device, Kind(rms=rms)), torch.finfo(dtype).smallest_normal
        check(run, replace(one, x=one.x * least, dy=one.dy * least))


def check_repeats(run: Run, dtype: torch.dtype, device: str) -> None:
    """The same bits each time, and nothing that was given written to."""
    for layout in ("contiguous", "transposed", "columns"):
        for kind in (*FULL, Kind()):
            one = data(97, 130, dtype, device, kind, layout)
            before = {name: tensor.clone() for name, tensor in one.tensors().items()}
            first = [None if t is None else t.clone() for t in outputs(run, one)]
            for _ in range(2):
                for i, (a, b) in enumerate(zip(first, outputs(run, one), strict=True)):
                    assert torch.equal(a, b), f"output {i} {what_of(one)} differs between two runs"
            for name, tensor in one.tensors().items():
                assert torch.equal(tensor, before[name]), f"{name} was written to"


def outputs(run: Run, one: Data) -> list[Tensor]:
    """Every output of a forward and of its backward, which must leave what was saved as it was."""
    y, total, mean, rstd = one.forward(run)
    x = one.x if one.residual is None else total
    kept = [x.clone(), mean.clone(), rstd.clone()]
    stats = None if one.rms else mean, rstd
    grads = run.bwd(one.dy, one.dtotal, x, *stats, one.weight, one.rms, *(True,) * 3, wide(x.dtype), x.dtype)
    assert all(map(torch.equal, kept, (x, mean, rstd))), "the backward wrote to what was saved"
    return [y, total, mean, rstd, *grads]


def check_same_sign(run: Run, dtype: torch.dtype, device: str) -> None:
    """A million terms of one sign: too narrow an accumulator stops growing, one long fp32 chain drifts."""
    one = data(1_000_000, 3, dtype, device, Kind(weight=None))
    size = one.dy.abs() / (64 if dtype == torch.float16 else 1)  # the sums must fit
    given = given_statistics(one.x, one)
    above = (one.x > given[0][:, None]).to(dtype)
    for dy in (size, size * (2 * above - 1)):
        truth = bounds_norm.backward(dy, None, one.x, Statistics.given(*given), None, False, wide(dtype), dtype)
        check_gradients(run, replace(one, dy=dy), one.x, *given, truth, wide(dtype))


def check_far(run: Run, dtype: torch.dtype, device: str) -> None:
    """Elements more than 2**31 apart: offsets are 64-bit numbers. On a CPU the memory between is never touched."""
    apart = 2**30 + 24

    def far(values: Tensor, strides: tuple[int, int]) -> Tensor:
        size = 2 * apart + 64
        if device == "cpu":
            memory = torch.from_numpy(np.zeros(size * dtype.itemsize, dtype=np.uint8)).view(dtype)
        else:
            memory = torch.empty(size, dtype=dtype, device=device)
        return memory.as_strided(values.shape, strides).copy_(values)

    for strides in ((apart, 1), (apart, 3), (1, apart), (3, apart)):
        one = data(*((3, 20) if strides[0] == apart else (20, 3)), dtype, device)
        for name in ("x", "residual", "dy", "dtotal"):
            check(run, replace(one, **{name: far(getattr(one, name), strides)}))
        plain = replace(one, residual=None, dtotal=None)  # x as the backward reads it
        check(run, replace(plain, x=far(one.x, strides)))


CHECKS = (
    check_sizes,
    check_kinds,
    check_subsets,
    check_layouts,
    check_offsets,
    check_constant_rows,
    check_eps,
    check_long_rows,
    check_rows_not_finite,
    check_sums_not_finite,
    check_tiny,
    check_repeats,
)
"""What every implementation goes through in every dtype; the two left out take longer."""
