"""offloaded_adamw: AdamW whose moments are in host memory, for what a GPU then need not hold."""

import importlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_LEAST = 4096  # elements: torchao keeps smaller parameters' moments on the device, to spare transfers


class _OnHost(torch.optim.AdamW):
    """Of parameters on a CPU: the moments are where they should be. In a prediction for a GPU they are not counted."""

    def host_states(self) -> list[Tensor]:
        """The states that would be in host memory beside a GPU."""
        large = (state for parameter, state in self.state.items() if parameter.numel() >= _LEAST)
        return [value for state in large for value in state.values() if isinstance(value, Tensor)]


def offloaded_adamw(
    parameters: Iterable[nn.Parameter],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.Optimizer:
    """AdamW that keeps both moments, and the update, off the GPU: QLoRA's third part, beside 4 bits and adapters.

    On a GPU this is torchao's CPUOffloadOptimizer over torch.optim.AdamW: gradients go to the host while the backward
    runs, the update is made there, new values come back. (bitsandbytes' paged optimizers page tensors of 100,000
    elements and more only, which adapters seldom are.) Parameters on a CPU get torch.optim.AdamW itself. Parameters
    that do not require grad are left out.

    Args:
        parameters: of one device.
        lr, betas, eps, weight_decay: torch.optim.AdamW's.

    Raises:
        ValueError: no parameter requires grad.
        ImportError: a GPU's parameters, and torchao is not installed.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("offloaded_adamw: none of the parameters requires grad")
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
    if trained[0].device.type == "cpu":
        return _OnHost(trained, **settings)
    try:
        torchao = importlib.import_module("torchao.optim")
    except ModuleNotFoundError as error:
        raise ImportError("peft_kernels.offloaded_adamw needs torchao on a GPU: pip install torchao") from error
    return torchao.CPUOffloadOptimizer(trained, torch.optim.AdamW, minimal_size=_LEAST, **settings)
