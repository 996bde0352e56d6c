"""The contenders of a whole training step: the frozen floor and every method, over the same base weights."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from peft_kernels.memory.predict import default_loss

from .architectures import Architecture
from .measure import Contender
from .memory_methods import OPTIMIZERS, Method, Options, Unsuited
from .models import sharing_copy

Step = Callable[[int], Tensor]
"""A measure.Step that returns its loss."""

_UNFIT = (AssertionError, AttributeError, ImportError, TypeError)
"""What a peer also raises where it does not fit the PyTorch, Triton or transformers that is here."""

FLOOR, OURS = "frozen", ("lora", "lora-bf16")


@dataclass(frozen=True)
class StepCase:
    """A training step of `layers` blocks of an architecture."""

    architecture: Architecture
    layers: int
    batch: int
    seq: int
    options: Options
    optimizer: str = "adamw-fused"

    @property
    def dtype(self) -> torch.dtype:
        return self.options.dtype

    @property
    def label(self) -> str:
        sizes = f"layers={self.layers} batch={self.batch} seq={self.seq} R={self.options.rank}"
        return f"model={self.architecture.name} {sizes}"

    def shortened(self) -> Architecture:
        """The architecture with `layers` blocks."""
        config = copy.deepcopy(self.architecture.config)
        config.num_hidden_layers = self.layers
        return replace(self.architecture, config=config)

    def tensors(self, device: str) -> dict[str, Tensor]:
        """A batch of random tokens and labels."""
        sizes = self.architecture.batch(self.batch, self.seq)
        high = {name: self.architecture.config.vocab_size for name in sizes}
        if self.architecture.classifier:
            high["labels"] = self.architecture.config.num_labels
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.randint(high[name], one.shape, generator=generator).to(device) for name, one in sizes.items()
        }


def model_flops(model: nn.Module, tokens: int, trained: bool) -> float:
    """FLOPs of a step's products with the weight matrices: forward and dX, and dW where they are trained.

    Attention's own products, adapters and recomputation are left out: every method is held against the same work.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {
        id(getattr(head, "weight", None))
    }
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in looked_up]
    return (6 if trained else 4) * tokens * sum(p.numel() for p in matrices)


def _frozen(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    model.enable_input_require_grads()
    return _training(model, batch, None)


def _training(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> Step:
    def step(i: int) -> Tensor:
        loss = default_loss(model, batch)
        loss.backward()
        loss = loss.detach()  # what the graph holds goes before the optimizer's step
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step


def _run(contender: Contender, step: Step, losses: dict[str, float]) -> None:
    def check() -> dict[str, float]:
        try:
            loss = losses[contender.name] = float(step(0))
        except _UNFIT as error:
            if contender.role != "peer":
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return {} if math.isfinite(loss) else {"loss": math.inf}

    contender.step, contender.check = step, check


def _contender(
    case: StepCase,
    base: nn.Module,
    batch: dict[str, Tensor],
    method: Method,
    compiled: bool,
    losses: dict[str, float],
) -> Contender:
    name = f"{method.name}, torch.compile" if compiled else method.name
    role, rival = ("ours", "") if method.name in OURS else ("peer", OURS[0])
    found = Contender(name, role, rival=rival, implementation=method.implementation)
    found.missing = method.missing_on(batch["input_ids"].device.type)
    if found.missing:
        return found
    try:
        model = copy.deepcopy(base) if method.name == "full" else sharing_copy(base)
        model = method.adapt(model, case.options).train()
    except Unsuited as error:
        found.missing = str(error)
        return found
    except _UNFIT as error:
        if role != "peer":
            raise
        found.missing = f"error: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return found
    optimizer = OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad])
    _run(found, _training(torch.compile(model) if compiled else model, batch, optimizer), losses)
    return found


def _compilable(method: Method) -> bool:
    """Not ours, nor Liger and Cut Cross Entropy: their users run them eager, and a patch that is in place only while
    its model runs is a change of globals to Dynamo, for which it compiles anew at every step."""
    return method.name not in OURS and not method.cuda_only


def contenders(
    case: StepCase, device: str, methods: Sequence[Method], compiled: bool
) -> tuple[list[Contender], dict[str, float]]:
    """The frozen floor, a contender for each method and, if asked for, each peer compiled.

    With them, by name, the losses of their first steps, which are there once they are checked. LoRA's B is zero then:
    all should be the floor's but for rounding.
    """
    torch.manual_seed(0)
    with torch.device(device):  # where random weights are made in no time
        base = case.shortened().build(case.dtype)
    base = base.to(device).train().requires_grad_(False)
    batch, losses = case.tensors(device), {}
    floor = Contender(FLOOR, "floor", implementation=f"torch {torch.__version__}")
    _run(floor, _frozen(sharing_copy(base), batch), losses)
    found = [_contender(case, base, batch, method, False, losses) for method in methods]
    if compiled:
        found += [_contender(case, base, batch, method, True, losses) for method in methods if _compilable(method)]
    return [floor, *found], losses
