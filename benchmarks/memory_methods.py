"""Ways to fine-tune a model, for the memory tables: what each one's parameters weigh, and how it changes the model."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from peft_kernels import offloaded_adamw

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""As the options of commands call them."""


@dataclass(frozen=True)
class Options:
    """What a method is asked for. dtype: the base model's; real adapters over a 16-bit one are fp32, as PEFT's, but for
    the methods named -bf16, whose adapters have the base model's."""

    rank: int = 8
    targets: str | tuple[str, ...] = "all-linear"
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Estimate:
    """By formula, in bytes, every value as wide as the base model's: weights, a gradient for each trained parameter,
    two Adam moments for each. No activations, no temporaries, no fp32 adapters."""

    trained: int  # parameters
    weights: float
    gradients: float
    optimizer: float

    @property
    def kinds(self) -> dict[str, float]:
        return {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


NEEDS_CUDA = "needs a CUDA device: its kernels are Triton's"


class Unsuited(ValueError):
    """A model that a method is not made for."""


@dataclass(frozen=True)
class Method:
    """`adapt` makes a base model ready to train, in place or anew. It may raise Unsuited."""

    name: str
    estimate: Callable[[nn.Module, Options], Estimate]
    adapt: Callable[[nn.Module, Options], nn.Module]
    missing: str = ""  # why it cannot run here: what to install
    unpredicted: str = ""  # why its step runs on real tensors only, and has no prediction
    cuda_only: bool = False  # its kernels run on no CPU
    implementation: str = ""  # the peer's version, where the rows have no column for it
    base: str = ""  # the type of a base whose values are not the model's: quantised ones
    optimizer: str = ""  # the one that belongs to the method, whichever is asked for; "" for that

    def stateless_with(self, optimizer: str) -> bool:
        """Whether it trains without states on a GPU where that optimizer is asked for."""
        return (self.optimizer or optimizer) in ("adamw-offloaded", "sgd")

    def update(self, optimizer: str) -> Callable[..., torch.optim.Optimizer]:
        """(trainable parameters) -> the optimizer it trains with where that one is asked for."""
        return OPTIMIZERS[self.optimizer or optimizer]

    def missing_on(self, device: str) -> str:
        """Why it cannot run on a device; "" where it can."""
        return self.missing or (NEEDS_CUDA if self.cuda_only and device != "cuda" else "")


def by_formula(trained: int, weights: float, width: int) -> Estimate:
    """`trained` parameters of `width` bytes, over `weights` bytes in all."""
    return Estimate(trained, weights, trained * width, 2 * trained * width)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def full_estimate(model: nn.Module, options: Options) -> Estimate:
    """The lecture's: size(float) for each parameter, again for its gradient, twice for Adam."""
    count, width = parameters(model), options.dtype.itemsize
    return by_formula(count, count * width, width)


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) features of every linear layer by name, transformers' Conv1D too; not the output layer's."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and not name.endswith(("classifier", "score")):
            found[name] = module.in_features, module.out_features
        elif type(module).__name__ == "Conv1D":
            found[name] = tuple(module.weight.shape)
    return found


def targeted(model: nn.Module, options: Options) -> dict[str, tuple[int, int]]:
    """The linear layers that `options.targets` names.

    Raises:
        ValueError: none is, or the rank is over a layer's size.
    """
    every = linears(model)
    found = every
    if options.targets != "all-linear":
        names = (options.targets,) if isinstance(options.targets, str) else options.targets
        found = {name: sizes for name, sizes in every.items() if name.rpartition(".")[2] in names}
        if not found:
            kinds = sorted({re.sub(r".*\.", "", name) for name in every})
            raise ValueError(f"targets {', '.join(names)}: no such linear layer; there are {', '.join(kinds)}")
    for name, sizes in found.items():
        if not 1 <= options.rank <= min(sizes):
            raise ValueError(f"rank is {options.rank}; expected 1 to {min(sizes)}, the smaller side of {name}")
    return found


def lora_estimate(model: nn.Module, options: Options) -> Estimate:
    """r (K + N) trained for each layer, over the frozen model."""
    trained, width = sum(options.rank * (k + n) for k, n in targeted(model, options).values()), options.dtype.itemsize
    return by_formula(trained, (parameters(model) + trained) * width, width)


_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # blocks of 64, their scales in 8 bits, in blocks of 256


def qlora_estimate(model: nn.Module, options: Options) -> Estimate:
    """LoRA's, with every linear layer but the output layer in NF4 with double quantisation."""
    lora = lora_estimate(model, options)
    quantised = sum(k * n for k, n in linears(model).values())
    weights = lora.weights - quantised * (options.dtype.itemsize - _NF4_BITS / 8)
    return Estimate(lora.trained, weights, lora.gradients, lora.optimizer)


def _everything(model: nn.Module, options: Options) -> nn.Module:
    return model.requires_grad_(True)


BASE_METHODS = (Method("full", full_estimate, _everything),)
"""Those that need nothing of this package. A primitive brings the others."""


def adamw(parameters, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True) if fused else torch.optim.AdamW(parameters, foreach=True)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, foreach=True)


OPTIMIZERS = {
    "adamw": adamw,
    "adamw-fused": partial(adamw, fused=True),
    "adamw-offloaded": offloaded_adamw,
    "sgd": sgd,
}
"""By what they hold: adamw is Torch's default on a GPU (foreach), adamw-offloaded has its states in host memory, and
sgd has none."""
