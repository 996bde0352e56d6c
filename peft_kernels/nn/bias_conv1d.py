"""BiasConv1D: BiasLinear over transformers' Conv1D (GPT-2). Imported only where there is a Conv1D."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..kernels.bias_grad.autograd import bias_linear


class BiasConv1D(Conv1D):
    """y = activation(x W + bias), weight [K, N] read in place; a Conv1D becomes one by a change of class."""

    activation: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return bias_linear(x, self.weight.t(), self.bias, activation=self.activation)

    def __repr__(self) -> str:
        return f"BiasConv1D(nf={self.nf}, nx={self.nx}, activation={self.activation!r})"
