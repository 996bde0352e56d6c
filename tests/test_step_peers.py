"""Peers of benchmarks/step.py: Liger's patches and Cut Cross Entropy, as stand-ins where they are not installed."""

import csv
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

pytest.importorskip("transformers", reason="its models are transformers': pip install transformers")

pytest.importorskip("peft", reason="the rows beside ours are HF PEFT's: pip install peft")

from step_cases import SMALL, case, here  # noqa: E402
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from benchmarks import cases, lora_memory, memory_methods, step, step_peers, vram  # noqa: E402


@pytest.mark.parametrize(("package", "method"), [("liger-kernel", "liger"), ("cut-cross-entropy", "cce")])
def test_a_peer_that_cannot_run_says_why(package, method, monkeypatch):
    installed = {"peft": "1"}
    monkeypatch.setattr(lora_memory, "version", lambda name: installed.get(name, "none"))
    assert lora_memory._missing(package) == f"not installed: pip install {package}"
    installed[package] = "1"
    for cuda, why in ((False, memory_methods.NEEDS_CUDA), (True, "")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert lora_memory._missing(package) == why
    one = replace(vram.methods()[f"peft-lora-{method}"], missing="")
    assert one.missing_on("cpu") == memory_methods.NEEDS_CUDA and one.missing_on("cuda") == ""
    assert one.unpredicted


def test_rows_of_peers_that_cannot_run(tmp_path):
    path, names = tmp_path / "step.csv", ("peft-lora-liger", "peft-lora-cce")
    assert step.main([*SMALL, "--method", *names, "--csv", str(path)]) == 0
    rows = {row["contender"]: row for row in csv.DictReader(path.open())}
    for name, package in zip(names, ("liger-kernel", "cut-cross-entropy"), strict=True):
        assert not rows[name]["ms_p50"]
        assert rows[name]["status"] in (f"not installed: pip install {package}", memory_methods.NEEDS_CUDA)


@pytest.fixture
def liger(monkeypatch) -> Counter:
    """A stand-in which patches as Liger does: the model's class stays, a function of its module is another for all."""
    calls, plain = Counter(), modeling_llama.apply_rotary_pos_emb

    def rope(*args, **options):
        calls["rope"] += 1
        return plain(*args, **options)

    def apply(model: nn.Module) -> None:
        calls["applied"] += 1
        modeling_llama.apply_rotary_pos_emb = rope
        modeling_llama.LlamaMLP = nn.Identity
        modeling_llama.LlamaMLP_of_liger = nn.Identity
        modeling_llama.LlamaAttention.of_liger = True

    known = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": apply})
    package = SimpleNamespace(_apply_liger_kernel_to_instance=apply, monkey_patch=known)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    return calls


def test_a_patch_stays_with_its_model(liger):
    before = dict(vars(modeling_llama)), dict(vars(modeling_llama.LlamaAttention))
    names = ("peft-lora-liger", "lora", "peft-lora", "peft-lora-liger-bf16")
    field = step.contenders(case(2), "cpu", here(*names), False)
    contenders, losses = field.contenders, field.losses.values
    assert [one.name for one in contenders] == ["frozen", *names] and not any(one.missing for one in contenders)
    calls = []
    for one in contenders:
        liger.clear()
        assert one.check().get("loss", 0.0) <= 1
        calls.append(liger["rope"])
        assert (dict(vars(modeling_llama)), dict(vars(modeling_llama.LlamaAttention))) == before
    assert calls == [0, 2, 0, 0, 2]
    assert losses["frozen"] == losses["peft-lora"] == losses["peft-lora-liger"] and set(losses) == {"frozen", *names}


def test_a_patch_holds_where_activations_are_computed_again(liger):
    (method,) = here("peft-lora-liger")
    base = case(2).shortened().build(torch.float32).requires_grad_(False)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = method.adapt(base, case().options).train()
    base.enable_input_require_grads()
    model(**case(2).tensors("cpu")).loss.backward()
    assert liger["rope"] == 4


def test_a_patch_is_undone_when_its_model_fails(liger):
    (method,) = here("peft-lora-liger")
    plain = modeling_llama.apply_rotary_pos_emb
    model = method.adapt(case().shortened().build(torch.float32), case().options)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert modeling_llama.apply_rotary_pos_emb is plain

    def fails() -> None:
        modeling_llama.apply_rotary_pos_emb = None
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        step_peers.patch_alone(model, fails)
    assert modeling_llama.apply_rotary_pos_emb is plain


@pytest.fixture
def cce(monkeypatch) -> list[dict]:
    """A stand-in for Cut Cross Entropy which computes the logits."""
    calls = []

    def linear_cross_entropy(e, c, targets, **options):
        calls.append(options)
        return ForCausalLMLoss(e @ c.T, targets, c.shape[0])

    package = SimpleNamespace(linear_cross_entropy=linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", package)
    return calls


def test_cut_cross_entropy_is_the_models_loss(cce):
    asked = case(dtype=torch.bfloat16)
    field = step.contenders(asked, "cpu", here("peft-lora", "peft-lora-cce", "peft-lora-cce-bf16"), False)
    assert [one.check() for one in field.contenders] == [{}] + [{"loss": 0.0}] * 3
    assert cce == [{"softcap": None, "shift": True}] * 2 and len(set(field.losses.values.values())) == 1


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ("minilm-l6", "peft-lora-liger", "liger-kernel .* does not know model type bert"),
        ("minilm-l6", "peft-lora-cce", "cut-cross-entropy .* does not know model type bert"),
        ("smollm2-135m", "peft-lora-cce", "cut-cross-entropy needs a bf16 or fp16 model"),
    ],
)
def test_a_peer_that_does_not_know_the_model(model, method, message, liger, cce):
    field = step.contenders(case(model=model), "cpu", here(method), False).contenders
    assert re.search(message, field[1].missing) and not liger and not cce


def test_a_peer_that_does_not_fit_what_is_here(cce, monkeypatch):
    def fails(*args, **options):
        raise AttributeError("there is no x")

    asked, methods = case(dtype=torch.bfloat16), here("peft-lora-cce")
    monkeypatch.setattr(sys.modules["cut_cross_entropy"], "linear_cross_entropy", fails)
    field = step.contenders(asked, "cpu", methods, False).contenders
    (row,) = cases.run_case("step", asked, "cpu", {}, contenders=field[1:])
    assert row["status"] == "error: AttributeError: there is no x"
    monkeypatch.setattr(step_peers, "_causal", fails)
    field = step.contenders(asked, "cpu", methods, False).contenders
    assert field[1].missing == "error: AttributeError: there is no x"
