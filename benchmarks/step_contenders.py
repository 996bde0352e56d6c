"""The contenders of a whole training step: the frozen floor and every method, over the same base weights."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from peft_kernels.memory.predict import default_loss, optimizer_states

from .architectures import Architecture
from .failures import FAILURES, because
from .footprint import storage_bytes
from .measure import PARTS, Contender
from .memory_methods import Method, Options, Unsuited
from .models import sharing_copy
from .step_loss import FirstLosses, rounding_bound

Step = Callable[[int], Tensor]
"""A measure.Step that returns its loss."""

Progress = Callable[[str], None]
"""Told what is being done, before it is."""

FLOOR, OURS = "frozen", ("lora", "lora-bf16", "qlora", "qlora-bf16", "qlora-offloaded")
RIVALS = {"": "lora", "nf4": "qlora"}
"""Of a peer, by its base: which of ours it is set beside."""


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
        return f"model={self.architecture.name} {sizes} optimizer={self.optimizer}"

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[:1]

    @property
    def drops(self) -> bool:
        """Whether the model drops at random while it is trained, so that two of its losses need not agree."""
        values = self.architecture.config.to_dict().items()
        return any("drop" in name and isinstance(value, float) and value > 0 for name, value in values)

    @property
    def classes(self) -> int:
        """Of which the loss's labels name one each."""
        config = self.architecture.config
        return config.num_labels if self.architecture.classifier else config.vocab_size

    def shortened(self) -> Architecture:
        """The architecture with `layers` blocks."""
        config = copy.deepcopy(self.architecture.config)
        config.num_hidden_layers = self.layers
        return replace(self.architecture, config=config)

    def tensors(self, device: str) -> dict[str, Tensor]:
        """A batch of random tokens and labels."""
        sizes = self.architecture.batch(self.batch, self.seq)
        high = {name: self.architecture.config.vocab_size for name in sizes}
        high["labels"] = self.classes
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randint(high[name], t.shape, generator=generator).to(device) for name, t in sizes.items()}


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


def trains_base(method: Method) -> bool:
    """Whether it trains the base's weights: on a copy of its own, where all others share the one base."""
    return method.name == "full"


@dataclass
class Field:
    """The contenders of a case, over one `base`, and what is known of their first steps' losses."""

    case: StepCase
    base: nn.Module
    batch: dict[str, Tensor]
    progress: Progress
    losses: FirstLosses = field(default_factory=lambda: FirstLosses(FLOOR))
    contenders: list[Contender] = field(default_factory=list)
    resident: dict[str, Callable[[], int]] = field(default_factory=dict)
    """By name, the bytes that a contender holds between steps over the frozen base's weights: adapters and optimizer
    states. Of a whole model of its own, as full's, what is over one set of weights."""

    def _run(self, contender: Contender, step: Step, base: str = "") -> None:
        def check() -> dict[str, float]:
            self.progress(f"check {contender.name}")
            torch.manual_seed(0)  # what is dropped at random is the same where it is drawn in the same order
            loss = step(0)
            if contender.role == "floor" and loss.isfinite() and not self.case.drops:
                self.losses.bound = self._bound(loss)
            return self.losses.judge(contender.name, float(loss), base)

        contender.step, contender.check = step, check

    def _bound(self, first: Tensor) -> float:
        loss = lambda: default_loss(self.base, self.batch)  # noqa: E731
        return rounding_bound(loss, self.base, first, self.batch["labels"].numel(), self.case.classes)

    def add_floor(self) -> None:
        self.progress(f"build {FLOOR}")
        floor = Contender(FLOOR, "floor", implementation=f"torch {torch.__version__}")
        self._run(floor, _frozen(sharing_copy(self.base), self.batch))
        self.contenders.append(floor)

    def add(self, method: Method, compiled: bool = False) -> None:
        """A method's contender; `missing` says why it has no step, where it cannot run or fails while it is built."""
        name = f"{method.name}, torch.compile" if compiled else method.name
        role, rival = ("ours", "") if method.name in OURS else ("peer", RIVALS[method.base])
        found = Contender(name, role, rival=rival, implementation=method.implementation)
        self.contenders.append(found)
        found.missing = method.missing_on(self.batch["input_ids"].device.type)
        if found.missing:
            return
        self.progress(f"build {name}")
        try:
            model = copy.deepcopy(self.base) if trains_base(method) else sharing_copy(self.base)
            model = method.adapt(model, self.case.options).train()
            optimizer = method.update(self.case.optimizer)([p for p in model.parameters() if p.requires_grad])
        except Unsuited as error:
            found.missing = str(error)
            return
        except FAILURES as error:
            found.missing = because(error)
            return
        self._run(found, _training(torch.compile(model) if compiled else model, self.batch, optimizer), method.base)
        self.resident[name] = lambda: self._over_base(model, optimizer)

    def _over_base(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        held = [*model.parameters(), *model.buffers(), *optimizer_states(optimizer)]
        weights = (*self.base.parameters(), *self.base.buffers())
        device = self.batch["input_ids"].device.type  # not the counters on the host
        return storage_bytes(one for one in held if one.device.type == device) - storage_bytes(weights)


def compilable(method: Method) -> bool:
    """Not ours, nor Liger and Cut Cross Entropy: their users run them eager, and a patch that is in place only while
    its model runs is a change of globals to Dynamo, for which it compiles anew at every step."""
    return method.name not in OURS and not method.cuda_only


def contenders(
    case: StepCase, device: str, methods: Sequence[Method], compiled: bool, progress: Progress = lambda what: None
) -> Field:
    """The frozen floor, a contender for each method and, if asked for, each peer compiled.

    With them, once they are checked, the losses of their first steps. LoRA's B is zero then: all are the floor's, but
    for rounding, and over one 4-bit base all are each other's.
    """
    progress("build the base model")
    torch.manual_seed(0)
    with torch.device(device):  # where random weights are made in no time
        base = case.shortened().build(case.dtype)
    found = Field(case, base.to(device).train().requires_grad_(False), case.tensors(device), progress)
    found.add_floor()
    for method in methods:
        found.add(method)
    for method in methods:
        if compiled and compilable(method):
            found.add(method, compiled=True)
    return found
