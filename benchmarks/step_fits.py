"""How many layers of a model fit a device while all contenders of a training step are on it, by prediction."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from . import vram
from .memory_methods import Method
from .step_contenders import OURS, StepCase, compilable, trains_base
from .vram_fits import largest

_SHARE = 0.8  # of a device's memory that may be predicted to be needed: some peers have no prediction


def needed(case: StepCase, methods: Sequence[Method], compiled: bool, arch: int | str | None) -> int:
    """The bytes predicted at the worst moment of any step, when the base and what all methods keep are there too."""
    asked = vram.Question(case.shortened(), case.options, case.batch, case.seq, False, case.optimizer, arch)
    with torch.device("meta"):
        base = sum(p.nbytes for p in case.shortened().build(case.dtype).parameters())
    resident = working = 0
    for method in methods:
        peak = asked.predict(method).replay.peak
        kept = peak.kinds["weights"] + peak.kinds.get("optimizer", 0)
        times = 2 if compiled and compilable(method) else 1
        # In 4 bits a base is another one; what is not, the embeddings, counts twice: a little too much.
        resident += times * (kept if trains_base(method) or method.base else kept - base)
        working = max(working, peak.allocated - kept)
    return base + resident + working


def fitting_layers(
    case: StepCase, methods: Sequence[Method], compiled: bool, capacity: int, arch: int | str | None
) -> int:
    """The most blocks with which what is needed stays within its share of `capacity` bytes.

    Of a method without a prediction nothing is known; where no other is asked for, ours stands in for it.
    """
    known = [method for method in methods if not method.missing and not method.unpredicted]
    known = known or [vram.methods()[OURS[0]]]

    def works(layers: int) -> bool:
        return needed(replace(case, layers=layers), known, compiled, arch) <= _SHARE * capacity

    whole = case.architecture.config.num_hidden_layers
    return whole if works(whole) else largest(works, whole - 1)
