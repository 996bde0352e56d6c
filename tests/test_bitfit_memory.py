"""BitFit's memory: what a step keeps for backward beside Torch's own layers, exact, and its peak beside LoRA's."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

pytest.importorskip("transformers", reason="its models are transformers': pip install transformers")

from transformers import BertConfig, GPT2Config  # noqa: E402

from benchmarks import vram, vram_measure  # noqa: E402
from benchmarks.architectures import Architecture  # noqa: E402
from benchmarks.memory_methods import OPTIMIZERS, Options  # noqa: E402

B, T, HIDDEN, INNER, LAYERS = 4, 32, 64, 256, 2
M = B * T
LAYER_NORM_INPUT = M * HIDDEN * 4 + 2 * M * 4  # in fp32, with mean and rstd
ACTIVATION_INPUTS = LAYERS * M * INNER * 4
MASKS = LAYERS * M * INNER // 8


def bert(activation: str = "gelu") -> Architecture:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": INNER}
    return Architecture("bert", BertConfig(vocab_size=100, hidden_act=activation, **sizes), None, True)


def gpt2(activation: str) -> Architecture:
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_inner": INNER}
    return Architecture("gpt2", GPT2Config(vocab_size=100, activation_function=activation, use_cache=False, **sizes))


def question(architecture: Architecture, arch: int | None = None) -> vram.Question:
    return vram.Question(architecture, Options(dtype=torch.float32), B, T, False, "adamw", arch)


def saved(architecture: Architecture, name: str) -> int:
    """Bytes kept for backward by a real step, which are those predicted."""
    asked, method = question(architecture), vram.methods()[name]
    torch.manual_seed(0)
    model = asked.model(method).train()
    optimizer = OPTIMIZERS["adamw"](p for p in model.parameters() if p.requires_grad)
    _, kept = vram_measure.step(model, architecture.batch(B, T), optimizer)
    assert kept == asked.predict(method).replay.saved
    return kept


@pytest.mark.parametrize(
    ("architecture", "less"),
    [
        # The first LayerNorm's input needs no gradient: its bias' gradient is of dy alone.
        pytest.param(bert("gelu"), LAYER_NORM_INPUT, id="bert-gelu"),
        pytest.param(bert("relu"), LAYER_NORM_INPUT + ACTIVATION_INPUTS - MASKS, id="bert-relu"),
    ],
)
def test_a_step_keeps_less_than_torch_s_own_layers(architecture, less):
    """The same parameters train. Exact."""
    ours, theirs = (saved(architecture, name) for name in ("bitfit", "torch-bitfit"))
    print(f"saved for backward, {M} tokens, {architecture.config.hidden_act}: {ours:,} bytes, Torch {theirs:,}")
    assert theirs - ours == less


@pytest.mark.parametrize("arch", [None, 90], ids=["cpu", "gpu"])
@pytest.mark.parametrize("architecture", [bert(), gpt2("gelu_new")], ids=["bert", "gpt2"])
def test_its_peak_is_below_lora_s(architecture, arch):
    """Rank 8 on all linear layers; and no higher than with Torch's own layers."""
    asked = question(architecture, arch)
    names = ("bitfit", "torch-bitfit", "lora", "full")
    found = {name: asked.predict(vram.methods()[name]).replay for name in names}
    peaks = {name: replay.peak.allocated for name, replay in found.items()}
    print(peaks)
    assert peaks["bitfit"] <= peaks["torch-bitfit"] and peaks["bitfit"] < peaks["lora"] < peaks["full"]
    assert found["bitfit"].saved < found["lora"].saved


@pytest.mark.parametrize("method", ["bitfit", "torch-bitfit"])
@pytest.mark.parametrize("architecture", [bert(), gpt2("gelu_new")], ids=["bert", "gpt2"])
def test_the_estimate_counts_what_is_trained(architecture, method):
    asked, way = question(architecture), vram.methods()[method]
    named = (p.numel() for name, p in architecture.build(torch.float32).named_parameters() if name.endswith("bias"))
    assert asked.estimate(way).trained == asked.predict(way).trainable == sum(named)
