"""A layer with adapters whose base weight can go to 4 bits and come back."""

import torch
from torch import nn

from ..kernels.nf4.autograd import nf4_dequantize
from .merging import Mergeable
from .nf4_base import NAMES
from .nf4_linear import quantised


class Quantisable(Mergeable):
    """Beside `weight`, an attribute `fan_in_fan_out`: a dense weight is [K, N]. In 4 bits it is [N, K] always."""

    def quantize_base(self, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> None:
        """Hold the base weight in 4 bits from now on, frozen; the one it was is freed where no one else holds it.

        Raises:
            ValueError: it is in 4 bits; a setting not known; a weight of fp64, or one that holds NaN or an infinity.
            RuntimeError: adapters are merged.
        """
        self._refuse_merged("quantise the base")
        if self.quantised is not None:
            raise ValueError("the base weight is in 4 bits already")
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        self.hold(quantised(weight, quant_type, blocksize, double_quant))

    def dequantize_base(self, dtype: torch.dtype | None = None) -> None:
        """Hold the base weight's values in `dtype`, by default that which it had before it was quantised.

        Raises:
            ValueError: it is not in 4 bits.
        """
        if self.quantised is None:
            raise ValueError("the base weight is not in 4 bits")
        weight = nf4_dequantize(self.nf4_weight(), dtype)
        for name in NAMES:
            delattr(self, name)
        self.quantised = None
        self.weight = nn.Parameter(weight.t().contiguous() if self.fan_in_fan_out else weight, requires_grad=False)
