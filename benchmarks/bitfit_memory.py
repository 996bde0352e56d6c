"""BitFit's rows in the memory tables: with this package's layers, and with Torch's own."""

from torch import nn

import peft_kernels as pk

from .memory_methods import Estimate, Method, Options, Unsuited, by_formula, parameters


def biases(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter named bias.

    Raises:
        Unsuited: there is none.
    """
    found = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not found:
        raise Unsuited("bitfit trains biases, and this model has no parameter named bias")
    return found


def bitfit_estimate(model: nn.Module, options: Options) -> Estimate:
    """Every bias, and nothing else."""
    width = options.dtype.itemsize
    return by_formula(sum(p.numel() for p in biases(model)), parameters(model) * width, width)


def _fused(model: nn.Module, options: Options) -> nn.Module:
    return pk.inject(model, pk.BitFitConfig())


def _torch(model: nn.Module, options: Options) -> nn.Module:
    model.requires_grad_(False)
    for bias in biases(model):
        bias.requires_grad_(True)
    return model


METHODS = (Method("bitfit", bitfit_estimate, _fused), Method("torch-bitfit", bitfit_estimate, _torch))
