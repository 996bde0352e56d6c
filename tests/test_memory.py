"""The memory predictor: to the byte what a CPU's allocator gives for the same step, kind by kind."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import predict_memory
from peft_kernels._core.registry import WORKSPACE, planned_arch
from peft_kernels.memory.replay import library_bytes

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

transformers = pytest.importorskip("transformers", reason="predicts transformers models: pip install transformers")
from benchmarks import architectures, vram_measure  # noqa: E402

RNG_BYTES = torch.get_rng_state().nbytes  # a checkpoint keeps the CPU's random state, which no operator makes
SCALAR_BYTES = 8 + 4  # a Python number in a product, which a CPU's kernel wraps and converts; a GPU's takes it by value


def llama(dtype: torch.dtype = torch.float32, layers: int = 4) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=8, vocab_size=1000,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def named(name: str) -> nn.Module:
    return architectures.find(name).build(torch.float32)


smollm2, minilm = functools.partial(named, "smollm2-135m"), functools.partial(named, "minilm-l6")


def lora(build, **settings) -> nn.Module:
    return pk.inject(build(), pk.LoraConfig(r=8, target_modules="all-linear", **settings))


def checkpointed(build) -> nn.Module:
    model = build()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model


def tokens(rows: int, length: int, classes: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": torch.zeros(rows, dtype=torch.long) if classes else ids}


fused = functools.partial(torch.optim.AdamW, fused=True)
foreach = functools.partial(torch.optim.AdamW, foreach=True)
# name -> (model, batch, optimizer, checkpoints)
STEPS = {
    "llama, full": (llama, tokens(2, 64), foreach, 0),
    "llama, full, bf16, fused, checkpoints": (
        lambda: checkpointed(lambda: llama(torch.bfloat16)), tokens(2, 64), fused, 4,
    ),
    "llama, lora": (lambda: lora(llama), tokens(2, 64), foreach, 0),
    "llama, lora, bf16, dropout": (
        lambda: lora(lambda: llama(torch.bfloat16), lora_dropout=0.1, bias="all"), tokens(3, 33), foreach, 0,
    ),
    "llama, lora, checkpoints": (lambda: lora(lambda: checkpointed(llama)), tokens(2, 64), fused, 4),
    "minilm, lora": (lambda: lora(minilm), tokens(4, 32, True), foreach, 0),
    "minilm, full": (minilm, tokens(4, 32, True), fused, 0),
    "smollm2, lora": (lambda: lora(smollm2), tokens(1, 48), foreach, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_is_what_the_cpu_allocates(name):
    """To the byte: by kind between the steps, and at the worst moment of every phase."""
    build, batch, optimizer, checkpoints = STEPS[name]
    torch.manual_seed(0)
    predicted = predict_memory(build, batch, optimizer=optimizer, arch=None).replay
    model = build().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    phases, saved = vram_measure.step(model, batch, optimizer(trained))
    assert predicted.saved + checkpoints * RNG_BYTES == predicted.saved_blocks + checkpoints * RNG_BYTES == saved
    for phase, measured in phases.items():
        found = predicted.phases[phase]
        for kind in ("weights", "inputs", "optimizer"):
            assert found.kinds.get(kind, 0) == measured.kinds[kind], (phase, kind)
        left = {"forward": (checkpoints,), "backward": range(checkpoints + 1)}.get(phase, (0,))  # at its worst moment
        unseen = [n * RNG_BYTES + (SCALAR_BYTES if phase == "step" else 0) for n in left]
        assert measured.allocated - found.allocated in unseen, phase
    assert predicted.phases["step"].kinds["gradients"] == phases["step"].kinds["gradients"]


class Toy(nn.Module):
    """x [M, 1024] through two square layers."""

    def __init__(self, use_checkpoint: bool = False):
        super().__init__()
        self.a, self.b = nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False)
        self.use_checkpoint = use_checkpoint

    def forward(self, x):
        inner = lambda x: self.b(self.a(x).relu())  # noqa: E731
        return (checkpoint(inner, x, use_reentrant=False) if self.use_checkpoint else inner(x)).sum()


def test_kinds_are_told_apart():
    batch = {"x": torch.zeros(256, 1024)}
    step = predict_memory(Toy, batch, arch=None).replay
    square, rows = 4 * 1024 * 1024, 4 * 256 * 1024
    assert step.phases["load"].kinds == {"weights": 2 * square, "inputs": rows}
    assert step.saved == rows + 4  # relu's output, and the loss
    assert step.phases["step"].kinds["gradients"] == 2 * square
    assert step.phases["step"].kinds["optimizer"] == 4 * square + 8
    assert predict_memory(lambda: Toy(True), batch, arch=None).replay.saved == 4  # the loss alone


def test_on_a_gpu_blocks_are_rounded_and_libraries_hold_their_own():
    batch = {"x": torch.zeros(256, 1024)}
    prediction = predict_memory(Toy, batch, arch=90)
    load = prediction.replay.phases["load"]
    assert load.allocated == sum(load.kinds.values()) == 2 * 4 * 1024 * 1024 + 4 * 256 * 1024 + library_bytes(90)
    step = prediction.replay.phases["step"]
    assert step.rounding == 0  # the optimizer's two scalars are on the host
    assert prediction.replay.reserved >= prediction.replay.peak.allocated
    assert prediction.as_run_on(80).peak.allocated < prediction.replay.peak.allocated
    assert prediction.as_run_on(None).reserved is None


def test_declared_temporaries_count_on_a_gpu_only(monkeypatch):
    build, batch = lambda: lora(lambda: llama(layers=1)), tokens(1, 16)
    without = predict_memory(build, batch, arch=None).replay
    monkeypatch.setitem(WORKSPACE, "lora_linear_bwd", lambda *args: 1 << 30)
    assert predict_memory(build, batch, arch=None).replay == without
    found = predict_memory(build, batch, arch=90).replay.peak
    assert found.kinds["temporaries"] >= 1 << 30
    assert found.during == "peft_kernels.lora_linear_bwd.default"


def test_temporaries_are_planned_for_the_gpu_asked_for(monkeypatch):
    seen = []
    monkeypatch.setitem(WORKSPACE, "lora_linear_bwd", lambda *args: seen.append(planned_arch()) or 0)
    for arch in (80, None, 120):
        predict_memory(lambda: lora(lambda: llama(layers=1)), tokens(1, 8), arch=arch)
    assert list(dict.fromkeys(seen)) == [80, 90, 120]
    assert planned_arch() == 90


def test_what_is_kept_by_mistake_shows_as_activations():
    """A leak: an output that hangs on after its step."""
    batch, kept = {"x": torch.zeros(256, 1024)}, []

    def leaky(model, batch):
        kept.append(model.a(batch["x"]).detach())
        return model(**batch)

    sound, found = (predict_memory(Toy, batch, arch=None, **more).replay for more in ({}, {"loss": leaky}))
    assert found.saved - sound.saved == 2 * 4 * 256 * 1024  # of the first step and of the second


def test_a_model_that_changes_its_dtype_while_it_is_built():
    batch = {"x": torch.zeros(8, 1024, dtype=torch.bfloat16)}
    assert predict_memory(lambda: Toy().bfloat16(), batch).replay.phases["load"].kinds["weights"] == 2 * 2 * 1024 * 1024


def test_padding_is_what_the_batch_says():
    """Without attention_mask nothing is padded: attention keeps k and v once for all heads of a group."""
    plain = tokens(2, 64)
    padded = plain | {"attention_mask": torch.ones(2, 64, dtype=torch.long)}
    config = llama().config
    first, second = (predict_memory(llama, batch, arch=None).replay.saved for batch in (plain, padded))
    assert first < second
    assert config._attn_implementation == "sdpa"


def frozen() -> nn.Module:
    return Toy().requires_grad_(False)


class Reads(Toy):
    def forward(self, x):
        return super().forward(x) * (2 if x.sum() > 0 else 1)


class Matrix(Toy):
    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (frozen, ValueError, "build: no parameter of the model requires grad"),
        (Matrix, ValueError, r"loss: .* shape \[8, 1024\], expected one"),
        (Reads, RuntimeError, "reads a value"),
    ],
)
def test_refuses_what_cannot_be_predicted(build, error, message):
    with pytest.raises(error, match=message):
        predict_memory(build, {"x": torch.zeros(8, 1024)})


def test_leaves_the_caller_as_he_was():
    real = Toy()
    batch = {"x": torch.zeros(8, 1024)}
    predict_memory(Toy, batch)
    assert type(batch["x"]) is torch.Tensor
    assert real(batch["x"]).item() == 0.0  # no mode is left on
