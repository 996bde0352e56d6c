"""NF4Linear: a linear layer over a frozen 4-bit weight."""

from typing import Any

import torch
from torch import Tensor, nn

from .._core.checks import has_values
from ..formats.nf4 import NF4Weight
from ..formats.nf4_state import Stored
from ..kernels.nf4.autograd import nf4_dequantize, nf4_quantize
from ..kernels.nf4_linear.autograd import nf4_linear
from .base_linear import conv1d_class, refusal
from .dispatch import give_dispatch, take_dispatch
from .hooks import move_hooks
from .nf4_base import NF4Base


def quantised(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> Stored:
    """`weight` [N, K] in 4 bits, and its nested offset read from the device (on meta there is none)."""
    small = nf4_quantize(weight, quant_type, blocksize, double_quant)
    known = double_quant and has_values(small.packed)
    return Stored(small, small.nested_offset.item() if known else None)


class NF4Linear(NF4Base):
    """y = x W^T + bias over a 4-bit weight (NF4 or FP4, bitsandbytes' format), computed in x's dtype.

    The weight is held as frozen Parameters: `weight` (uint8 [ceil(N K / 2)], packed), `absmax` and, with double
    quantisation, `nested_absmax`, `nested_code` and `nested_offset`. Casts such as `half()` leave them as they are; the
    bias is cast. In a state_dict they have bitsandbytes' names and shapes (see README), and its files load.

    Args:
        bias: whether there is one, trainable as nn.Linear's.
        dtype: of the weight before it is quantised, and of the bias; float16, bfloat16 or float32.
        quant_type: "nf4" or "fp4".
        blocksize: neighbouring elements that share a scale: 32 to 4096, a power of two.
        double_quant: hold the scales in 8 bits.

    Raises:
        ValueError: a setting that is not one of these.
    """

    conv1d: type[nn.Module] | None = None
    """transformers' Conv1D, where the layer stands for one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
    ):
        super().__init__()
        fresh = nn.Linear(in_features, out_features, bias, device, dtype)
        self._fill(quantised(fresh.weight, quant_type, blocksize, double_quant), fresh.bias)

    def _fill(self, stored: Stored, bias: nn.Parameter | None) -> None:
        self.hold(stored)
        self.register_parameter("bias", bias)

    @property
    def in_features(self) -> int:
        return self.quantised.shape[1]

    @property
    def out_features(self) -> int:
        return self.quantised.shape[0]

    @classmethod
    def _of(cls, stored: Stored, bias: Tensor | None) -> "NF4Linear":
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        layer._fill(stored, bias)
        return layer

    @classmethod
    def from_weight(cls, weight: NF4Weight, bias: Tensor | None = None) -> "NF4Linear":
        """A layer on the tensors of `weight`, of shape [N, K], and on `bias` [N]; nothing is copied.

        Raises:
            ValueError: not an NF4Weight of two dimensions, or a bias that does not fit.
        """
        if not isinstance(weight, NF4Weight) or len(weight.shape) != 2:
            got = f"of shape {list(weight.shape)}" if isinstance(weight, NF4Weight) else type(weight).__name__
            raise ValueError(f"NF4Linear.from_weight: weight is {got}; expected an NF4Weight of shape [N, K]")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
            raise ValueError(
                f"NF4Linear.from_weight: bias is {list(bias.shape)} on {bias.device}; expected [{weight.shape[0]}] on "
                f"{weight.device}"
            )
        known = weight.double_quant and has_values(weight.packed)
        return cls._of(Stored(weight, weight.nested_offset.item() if known else None), bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
    ) -> "NF4Linear":
        """Quantise an nn.Linear or transformers' Conv1D, which keeps its weight; the bias is shared.

        Its hooks move to the new layer, with their handles, and get that layer as their `module`; HF accelerate's for a
        device_map too.

        Raises:
            ValueError: a layer that cannot be replaced, with the reason; a setting not known; a weight that holds NaN
                or an infinity.
        """
        reason = refusal(linear)
        if reason is not None:
            raise ValueError(f"NF4Linear cannot replace this layer: {reason}")
        weight = linear.weight if conv1d_class(linear) is None else linear.weight.t()
        layer = cls._of(quantised(weight, quant_type, blocksize, double_quant), linear.bias)
        layer.conv1d = conv1d_class(linear)
        hook = take_dispatch(linear)
        move_hooks(linear, layer)
        give_dispatch(layer, hook)
        return layer.train(linear.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight's values [N, K] in `dtype`, by default that which it had."""
        return nf4_dequantize(self.nf4_weight(), dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An nn.Linear (Conv1D, where it stood for one) with the dequantised weight, frozen, and the very same bias.

        Hooks stay here.
        """
        weight = self.dequantize(dtype)
        if self.conv1d is None:
            layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        else:
            layer, weight = self.conv1d(0, 0), weight.t().contiguous()
            layer.nx, layer.nf = weight.shape
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K], any floating dtype -> [..., N] in that (under autocast, in the autocast dtype)."""
        return nf4_linear(input, self.nf4_weight(NF4Weight.unchecked), self.bias)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.nf4_repr()}"
