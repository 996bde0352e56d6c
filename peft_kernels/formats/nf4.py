"""The 4-bit formats NF4 and FP4 as bitsandbytes stores them: levels, thresholds, and the record of one weight.

A tensor is taken as one flat row-major list of elements. `blocksize` neighbours share a scale, the largest magnitude
among them (absmax); blocks cross rows where the row length is no multiple of them. Element 2i is the high half of byte
i, element 2i + 1 the low half. An element's value is level[code] * scale in fp32, rounded once to the dtype asked for.

With double quantisation (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3) the scales are stored in 8 bits:
scale[b] = nested_code[absmax[b]] * nested_absmax[b // 256] + nested_offset, a product and a sum, each rounded to fp32.
4.5 bits an element become 4.127 at a blocksize of 64.
"""

from dataclasses import dataclass, fields, replace
from math import prod

import torch
from torch import Tensor

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution, scaled to [-1, 1] with an exact zero (QLoRA, appendix E): code -> value."""

NF4_BOUNDS = (
    -0.8480964303016663,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552542090416,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016633868217468,
    0.6427869200706482,
    0.8614783883094788,
)
"""A value above bound i has a code above i; on it, at most i. The midpoints of the levels as bitsandbytes' CUDA kernels
hold them (read off the machine code of 0.50.2). Those of its CPU code are one unit in the last place away at four
places: 0, 8, 12 and 14."""

FP4_LEVELS = tuple(
    torch.tensor([sign * v for sign in (1, -1) for v in (0.0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)]).tolist()
)
"""Bit 3 is the sign (code 8 is -0.0); the others name a magnitude, not in the order of their size."""

FP4_BOUNDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
"""A magnitude above bound i is at least the (i + 1)th in size; bitsandbytes' constants, which are not all midpoints."""

FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)
"""The codes of the magnitudes in the order of their size."""

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256


def _nested_code() -> tuple[float, ...]:
    magnitudes = []
    for exponent in range(7):  # decade 10^(exponent - 6) has 2^exponent values, in the middles of equal steps
        steps = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes.append(10 ** (exponent - 6) * ((steps[:-1] + steps[1:]) / 2))
    positive = torch.cat(magnitudes)
    return tuple(torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values.tolist())


# Made once, at import: a tensor made later might be one without values, of a memory prediction.
NESTED_CODE = _nested_code()
"""256 values, ascending: the signed dynamic map of Dettmers 2015 (arXiv 1511.04561), in which scales are stored."""


def nested_code(device: torch.device | str = "cpu") -> Tensor:
    """NESTED_CODE as fp32 [256]."""
    return torch.tensor(NESTED_CODE, dtype=torch.float32, device=device)


def check_type(caller: str, quant_type: str, blocksize: int) -> None:
    """Raise ValueError unless both are known."""
    if quant_type not in LEVELS:
        raise ValueError(f"{caller}: quant_type is {quant_type!r}; expected 'nf4' or 'fp4'")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{caller}: blocksize is {blocksize}; expected one of {BLOCKSIZES}")


def check_asked(caller: str, quant_type: str, blocksize: int, double_quant: bool) -> None:
    """Raise ValueError unless all three can be asked for, by their types too: "no" would be taken for a yes."""
    if not isinstance(quant_type, str):
        raise ValueError(f"{caller}: quant_type is {quant_type!r}; expected 'nf4' or 'fp4'")
    if not isinstance(blocksize, int):
        raise ValueError(f"{caller}: blocksize is {blocksize!r}; expected one of {BLOCKSIZES}")
    check_type(caller, quant_type, blocksize)
    if not isinstance(double_quant, bool):
        raise ValueError(f"{caller}: double_quant is {double_quant!r}; expected True or False")


def check_vector(caller: str, name: str, tensor: Tensor, dtype: torch.dtype, length: int, device: torch.device) -> None:
    """Raise ValueError unless it is a dense `dtype` [length] on `device`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{caller}: {name} is {tensor!r}; expected {dtype} [{length}]")
    if tensor.dtype != dtype or tensor.shape != (length,) or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{caller}: {name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on "
            f"{tensor.device}; expected {dtype} [{length}], dense, on {device}"
        )


def check_tensors(
    caller: str,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    numel: int,
) -> None:
    """Raise ValueError unless these are a weight of `numel` elements, naming the tensor that does not fit."""
    check_type(caller, quant_type, blocksize)
    if not isinstance(packed, Tensor):
        raise ValueError(f"{caller}: packed is {packed!r}; expected a tensor")
    device, blocks = packed.device, -(-numel // blocksize)
    check_vector(caller, "packed", packed, torch.uint8, -(-numel // 2), device)
    if nested_absmax is None:
        check_vector(caller, "absmax", absmax, torch.float32, blocks, device)
        if nested_code is not None or nested_offset is not None:
            raise ValueError(f"{caller}: nested_absmax is None; expected all of nested_* or none")
        return
    check_vector(caller, "absmax", absmax, torch.uint8, blocks, device)
    check_vector(caller, "nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE), device)
    check_vector(caller, "nested_code", nested_code, torch.float32, 256, device)
    check_vector(caller, "nested_offset", nested_offset, torch.float32, 1, device)


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A 4-bit weight: plain tensors and what is needed to read them. Nothing is computed here."""

    packed: Tensor
    """uint8 [ceil(numel / 2)]."""
    absmax: Tensor
    """fp32 [blocks], or uint8 [blocks] with double quantisation; blocks = ceil(numel / blocksize)."""
    nested_absmax: Tensor | None
    """fp32 [ceil(blocks / 256)], None without double quantisation, as the two below."""
    nested_code: Tensor | None
    """fp32 [256]."""
    nested_offset: Tensor | None
    """fp32 [1]."""
    shape: tuple[int, ...]
    """Of the weight; [N, K] for a linear layer."""
    dtype: torch.dtype
    """The dtype that the weight had, in which it is dequantised unless another is asked for."""
    quant_type: str = "nf4"
    blocksize: int = 64

    def __post_init__(self) -> None:
        """Raise ValueError unless the tensors are those of a weight of this shape and blocksize."""
        check_tensors("NF4Weight", *self.tensors(), self.quant_type, self.blocksize, self.numel)

    @classmethod
    def unchecked(cls, *values) -> "NF4Weight":
        """NF4Weight(*values), for the ops alone, which ask again whether that is a weight."""
        weight = object.__new__(cls)
        weight.__dict__.update(zip(cls.__dataclass_fields__, values, strict=True))
        return weight

    def __repr__(self) -> str:
        return (
            f"NF4Weight(shape={self.shape}, dtype={self.dtype}, quant_type={self.quant_type!r}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}, device={str(self.device)!r})"
        )

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """packed, absmax, nested_absmax, nested_code, nested_offset: the order in which every op takes them."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_code, self.nested_offset

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors() if tensor is not None)

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on `device`; itself where it is there. Its dtype is that of what it is read into."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})
