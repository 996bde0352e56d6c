"""Whether the first steps' losses are the frozen floor's: within what roundings of the same function can make of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

DRAWS = 8
STUDENT = 13.26
"""What Student's t with DRAWS degrees of freedom exceeds, to either side, once in a million: how many of the standard
deviations that the draws estimate a right loss may be off. One right contender in a million is refused."""


def _moved(module: nn.Module, inputs: tuple, out: object) -> object:
    """A module's output with every number one unit in the last place up or down, at random; where a sum of K terms in
    fp32 may be further off than that, by sqrt(K) units of fp32, the random walk of its roundings."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return out
    summed = inputs[0].shape[-1] if inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point() else 1
    unit = max(torch.finfo(out.dtype).eps, math.sqrt(summed) * torch.finfo(torch.float32).eps)
    return out * torch.empty_like(out).bernoulli_().mul_(2 * unit).add_(1 - unit)


@torch.no_grad()
def rounding_bound(loss: Callable[[], Tensor], model: nn.Module, first: Tensor, terms: int, classes: int) -> float:
    """How far from `first`, the loss of `model`, the loss of the same function may be when computed in another order.

    Such an order rounds each number that the model computes otherwise, on its way through `model`: the loss with the
    outputs of all modules moved, drawn DRAWS times, says how much of that arrives. Two roundings of one number differ
    by sqrt(1/6) units in the last place (root mean square; each is off by up to half a unit), so that a move by a whole
    one stands for six of them: the output's own and those inside the module, which have no name (rotary embedding,
    softmax, the gate's product, the residual's sum). On the way from logits to loss numbers are fp32: an exponential's
    sum over `classes` and the mean of `terms` walk at random, and the result is rounded to its own dtype.
    """
    handles = [module.register_forward_hook(_moved) for module in model.modules()]
    try:
        draws = []
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            draws.append(float(loss()) - float(first))
    finally:
        for handle in handles:
            handle.remove()
    size, fp32 = abs(float(first)), torch.finfo(torch.float32).eps
    of_loss = fp32 * (math.sqrt(classes) + math.sqrt(terms) * size) + torch.finfo(first.dtype).eps * size
    return STUDENT * math.sqrt(sum(draw * draw for draw in draws) / DRAWS) + of_loss


@dataclass
class FirstLosses:
    """By contender, its first step's loss: adapters add nothing yet, and full fine-tuning has changed nothing yet.

    `bound`: how far from the floor's they may be; None until that is known, and where the model drops at random. Over a
    base of other values, one in 4 bits, they are held to the first contender's that has it.
    """

    floor: str
    values: dict[str, float] = field(default_factory=dict)
    bound: float | None = None
    others: dict[str, float] = field(default_factory=dict)  # by base

    def judge(self, name: str, loss: float, base: str = "") -> dict[str, float]:
        """Remember a first loss; its distance over the bound, from the floor's or that of another `base`."""
        self.values[name] = loss
        if not math.isfinite(loss):
            return {"loss": math.inf}
        if name == self.floor or self.bound is None:
            return {}
        expected = self.others.setdefault(base, loss) if base else self.values[self.floor]
        return {"loss": abs(loss - expected) / self.bound}
