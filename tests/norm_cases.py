"""Inputs of norm's checks, and what one of them must give: forward, and backward from given and from own statistics."""

from collections.abc import Callable
from dataclasses import dataclass

import bounds
import bounds_norm
import torch
from bounds_norm import Statistics
from cases import lay_out
from torch import Tensor

from peft_kernels.kernels.norm import op, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENTS = ("dx", "dweight", "dbias")


@dataclass(frozen=True)
class Run:
    """An implementation: the two ops, called with the ops' arguments."""

    fwd: Callable
    bwd: Callable


def run_of(name: str) -> Run:
    """What the tests' `impl` of this name, "reference", "op" or "triton" with or without "[cuda]", is for these ops."""
    owner = {"reference": reference, "op": op, "triton": op.triton_impl}[name.partition("[")[0]]
    return Run(owner.norm_fwd, owner.norm_bwd)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Data:
    """The arguments of one forward and backward; y, and dy with it, is in the accumulator's dtype if `wide_y`."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None = None
    dtotal: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    rms: bool = False
    wide_y: bool = False

    @property
    def y_dtype(self) -> torch.dtype:
        return wide(self.x.dtype) if self.wide_y else self.x.dtype

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def forward(self, run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return run.fwd(self.x, self.residual, self.weight, self.bias, self.eps, self.rms, self.y_dtype)


@dataclass(frozen=True)
class Kind:
    """Which arguments there are: weight and bias by dtype, "own" being x's and "other" a wider or narrower one."""

    rms: bool = False
    residual: bool = False
    weight: str | None = "own"
    bias: str | None = "own"
    wide_y: bool = False

    def __str__(self) -> str:
        words = ["rms" if self.rms else "layer"] + ["residual"] * self.residual + ["wide"] * self.wide_y
        return "-".join(words + [f"weight-{self.weight}", f"bias-{self.bias}"])


KINDS = (
    Kind(),
    Kind(residual=True, weight="other", bias="own", wide_y=True),
    Kind(weight=None, bias=None),
    Kind(residual=True, weight=None),
    Kind(weight="other", bias="other"),
    Kind(weight="double", bias="double"),
    Kind(bias=None),
    Kind(rms=True, bias=None),
    Kind(rms=True, weight=None),
    Kind(rms=True, residual=True, weight="other", bias="other", wide_y=True),
    Kind(rms=True, residual=True, weight=None, bias=None),
    Kind(rms=True, bias="other", wide_y=True),
)
FULL = (Kind(residual=True), Kind(rms=True, residual=True))


def data(M: int, K: int, dtype: torch.dtype, device: str, kind: Kind = FULL[0], layout: str = "contiguous") -> Data:
    """Rows of mean and spread about 1, gradients of order 1."""
    generator = torch.Generator().manual_seed(M + K)
    dtypes = {"own": dtype, "other": torch.bfloat16 if dtype == torch.float32 else torch.float32}
    dtypes["double"] = torch.float64

    def draw(*shape: int, dtype: torch.dtype = dtype, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype).to(device)

    x, residual, dtotal = (draw(M, K, mean=mean) for mean in (1, 0, 0))
    dy = draw(M, K, dtype=wide(dtype) if kind.wide_y else dtype)  # a wide one with digits that x's dtype has not
    weight, bias = (draw(K, dtype=dtypes.get(what, dtype), mean=0.5) for what in (kind.weight, kind.bias))
    laid = [lay_out(one, layout) for one in (x, residual, dy, dtotal)]
    return Data(
        x=laid[0],
        residual=laid[1] if kind.residual else None,
        dy=laid[2],
        dtotal=laid[3] if kind.residual else None,
        weight=None if kind.weight is None else weight,
        bias=None if kind.bias is None else bias,
        rms=kind.rms,
        wide_y=kind.wide_y,
    )


def what_of(one: Data) -> str:
    kept = "".join(f" {name}" for name in ("residual", "weight", "bias") if getattr(one, name) is not None)
    return f"of {'rms' if one.rms else 'layer'} norm {list(one.x.shape)} {one.x.stride()}{kept}"


def check_outputs(run: Run, one: Data) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, total, mean and rstd within the bounds; returns what was normalised, mean and rstd."""
    y, total, mean, rstd = one.forward(run)
    dtype, what = one.x.dtype, what_of(one)
    normalised = one.x
    if one.residual is None:
        assert tuple(total.shape) == (0,), f"total {what}: there is no residual, yet it has shape {list(total.shape)}"
    else:
        assert total.dtype == dtype and total.is_contiguous(), f"total {what} is {total.dtype} {total.stride()}"
        bounds.assert_within(total, *bounds_norm.total(one.x, one.residual), f"total {what}")
        normalised = total
    truth = bounds_norm.forward(normalised, one.weight, one.bias, one.eps, one.rms, one.y_dtype)
    kinds = {"y": (y, one.y_dtype), "mean": (mean, wide(dtype)), "rstd": (rstd, wide(dtype))}
    if one.rms:
        assert tuple(kinds.pop("mean")[0].shape) == (0,), f"mean {what}: RMSNorm has none"
    for name, (found, expected) in kinds.items():
        assert found.dtype == expected and found.is_contiguous(), f"{name} {what} is {found.dtype} {found.stride()}"
        bounds.assert_within(found, *truth[name], f"{name} {what}")
    return normalised, None if one.rms else mean, rstd


def check_gradients(run: Run, one: Data, x, mean, rstd, truth, dtype, needed=(True,) * 3) -> None:
    """The gradients asked for in their dtypes and within the bounds of `truth`, the others empty."""
    if not (needed[0] or needed[1]):
        x = mean = rstd = None
    dtotal, weight = (one.dtotal, one.weight) if needed[0] else (None, None)
    grads = run.bwd(one.dy, dtotal, x, mean, rstd, weight, one.rms, *needed, dtype, one.x.dtype)
    for name, grad, kind, wanted in zip(GRADIENTS, grads, (one.x.dtype, dtype, dtype), needed, strict=True):
        assert grad.dtype == kind and grad.is_contiguous(), f"{name} {what_of(one)} is {grad.dtype} {grad.stride()}"
        if wanted:
            bounds.assert_within(grad, *truth[name], f"{name} {what_of(one)}")
        else:
            assert tuple(grad.shape) == (0,), f"{name} was not asked for, yet has shape {list(grad.shape)}"


def given_statistics(x: Tensor, one: Data) -> tuple[Tensor | None, Tensor]:
    """The true mean and rstd, rounded: what a forward that this implementation did not make would have kept."""
    found = bounds_norm.statistics(x, one.eps, one.rms)
    mean = None if one.rms else found.mean.value[:, 0].to(wide(x.dtype))
    return mean, found.rstd.value[:, 0].to(wide(x.dtype))


def check(run: Run, one: Data) -> None:
    """The forward; the backward from statistics that are exact as given; the backward of the own forward."""
    x, *own = check_outputs(run, one)
    given = given_statistics(x, one)
    dtype = one.y_dtype
    for kept, found in (
        (given, Statistics.given(*given)),
        (own, bounds_norm.statistics(x, one.eps, one.rms)),
    ):
        truth = bounds_norm.backward(one.dy, one.dtotal, x, found, one.weight, one.rms, dtype, one.x.dtype)
        check_gradients(run, one, x, *kept, truth, dtype)
