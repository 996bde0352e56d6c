"""benchmarks/step.py: a whole training step of a named model, beside peers and the frozen floor."""

import csv
import math
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

from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from benchmarks import architectures, lora_memory, memory_methods, step, step_contenders, step_peers, vram  # noqa: E402

SMALL = ("--model", "smollm2-135m", "--layers", "1", "--seq", "16", "--rounds", "2", "--rank", "4", "--device", "cpu")


def case(layers: int = 1, dtype: torch.dtype = torch.float32, model: str = "smollm2-135m") -> step.StepCase:
    return step.StepCase(architectures.find(model), layers, 1, 16, memory_methods.Options(4, "all-linear", dtype))


def here(*names: str) -> list[memory_methods.Method]:
    """Methods as if what they need were installed, and ran on a CPU."""
    return [replace(vram.methods()[name], missing="", cuda_only=False) for name in names]


def test_every_method_has_a_row(tmp_path, capsys):
    path = tmp_path / "step.csv"
    assert step.main([*SMALL, "--method", "lora", "peft-lora", "full", "qlora", "--csv", str(path)]) == 0
    rows = {row["contender"]: row for row in csv.DictReader(path.open())}
    assert {name: row["role"] for name, row in rows.items()} == {
        "frozen": "floor", "lora": "ours", "peft-lora": "peer", "full": "peer", "qlora": "peer",
    }  # fmt: skip
    assert rows["qlora"]["status"] == "comes with the primitive nf4_linear" and not rows["qlora"]["ms_p50"]
    assert all(float(row["ms_p50"]) > 0 for name, row in rows.items() if name != "qlora")
    text = capsys.readouterr().out
    # tokens/s is the batch over the time, and the launches of ours are fewer than the peer's
    ms, rate = re.search(r"^ +lora +([\d.]+) +([\d,]+)", text, re.M).groups()
    assert abs(float(rate.replace(",", "")) * float(ms) / 1e3 / 16 - 1) < 0.05
    counts = {name: int(n.replace(",", "")) for name, n in re.findall(r"^ *([\w-]+) .* ([\d,]+) +[\d.]+$", text, re.M)}
    assert counts["frozen"] < counts["lora"] < counts["peft-lora"]


@pytest.mark.parametrize(("trained", "factor"), [(False, 4), (True, 6)])
def test_flops_are_those_of_the_weight_matrices(trained, factor):
    """A tied output layer multiplies, an embedding alone does not."""
    with torch.device("meta"):
        model = case(2).shortened().build(torch.float32)
    block = 576 * (576 + 2 * 192 + 576 + 3 * 1536)
    assert step.model_flops(model, 10, trained) == factor * 10 * (2 * block + 49152 * 576)


@pytest.mark.parametrize(("capacity", "layers"), [(1, 0), (499, 3), (500, 4), (3749, 29), (3750, 30), (10**9, 30)])
def test_the_most_layers_that_fit(capacity, layers, monkeypatch):
    """100 bytes a layer, four fifths of the capacity, 30 layers in all; without a prediction, as many as ours."""

    def predict(question, method):
        assert (question.arch, method.name) == (80, "lora")
        peak = SimpleNamespace(allocated=100 * question.architecture.config.num_hidden_layers)
        return SimpleNamespace(replay=SimpleNamespace(peak=peak))

    monkeypatch.setattr(vram.Question, "predict", predict)
    waiting, unpredicted = vram.methods()["qlora"], here("peft-lora-liger")
    for methods in ([*here("lora"), waiting, *unpredicted], unpredicted):
        assert step.fitting_layers(case(), methods, capacity, 80) == layers


def test_what_is_wrong_is_said(capsys):
    assert step.main(["--model", "nothing", "--device", "cpu"]) == 2
    assert "model 'nothing' is no file" in capsys.readouterr().err
    assert step.main(["--model", "minilm-l6", "--seq", "513", "--device", "cpu"]) == 2
    assert "positions for 512 tokens at most" in capsys.readouterr().err
    assert step.main([*SMALL, "--rank", "1000"]) == 2
    assert "rank is 1000; expected 1 to 576" in capsys.readouterr().err


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
    field, losses = step.contenders(case(2), "cpu", here(*names), False)
    assert [one.name for one in field] == ["frozen", *names] and not any(one.missing for one in field)
    calls = []
    for one in field:
        liger.clear()
        assert one.check() == {}
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


def test_only_plain_peers_are_compiled():
    names = ("lora", "lora-bf16", "peft-lora", "full", "peft-lora-liger", "peft-lora-cce")
    compiled = [name for name in names if step_contenders._compilable(vram.methods()[name])]
    assert compiled == ["peft-lora", "full"]
    field, _ = step.contenders(case(), "cpu", here("lora", "full"), True)
    assert [one.name for one in field] == ["frozen", "lora", "full", "full, torch.compile"]


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
    field, losses = step.contenders(asked, "cpu", here("peft-lora", "peft-lora-cce", "peft-lora-cce-bf16"), False)
    assert [one.check() for one in field] == [{}] * 4
    assert cce == [{"softcap": None, "shift": True}] * 2 and len(set(losses.values())) == 1


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ("minilm-l6", "peft-lora-liger", "liger-kernel .* does not know model type bert"),
        ("minilm-l6", "peft-lora-cce", "cut-cross-entropy .* does not know model type bert"),
        ("smollm2-135m", "peft-lora-cce", "cut-cross-entropy needs a bf16 or fp16 model"),
    ],
)
def test_a_peer_that_does_not_know_the_model(model, method, message, liger, cce):
    field, _ = step.contenders(case(model=model), "cpu", here(method), False)
    assert re.search(message, field[1].missing) and not liger and not cce


def test_a_peer_that_does_not_fit_what_is_here(cce, monkeypatch):
    def fails(*args, **options):
        raise AttributeError("there is no x")

    asked, methods = case(dtype=torch.bfloat16), here("peft-lora-cce")
    monkeypatch.setattr(sys.modules["cut_cross_entropy"], "linear_cross_entropy", fails)
    field, _ = step.contenders(asked, "cpu", methods, False)
    with pytest.raises(RuntimeError, match="AttributeError: there is no x"):
        field[1].check()
    monkeypatch.setattr(step_peers, "_causal", fails)
    field, _ = step.contenders(asked, "cpu", methods, False)
    assert field[1].missing == "error: AttributeError: there is no x"


def test_a_loss_that_is_not_finite_is_not_timed(monkeypatch, tmp_path, capsys):
    def broken(model: nn.Module, options: memory_methods.Options) -> nn.Module:
        model = vram.methods()["lora"].adapt(model, options)
        model.register_forward_hook(lambda module, args, out: out.loss * math.inf)
        return model

    known = {**vram.methods(), "broken": memory_methods.Method("broken", memory_methods.full_estimate, broken)}
    monkeypatch.setattr(vram, "methods", lambda: known)
    path = tmp_path / "step.csv"
    assert step.main([*SMALL, "--method", "broken", "peft-lora", "--csv", str(path)]) == 0
    rows = {row["contender"]: row for row in csv.DictReader(path.open())}
    assert rows["broken"]["status"].startswith("wrong values: loss") and not rows["broken"]["ms_p50"]
    assert rows["peft-lora"]["status"] == rows["frozen"]["status"] == "ok"
    shown = dict(re.findall(r"^ *([\w-]+) .* ([\w.]+)$", capsys.readouterr().out, re.M))
    assert shown["broken"] == "inf" and shown["frozen"] == shown["peft-lora"] and 9 < float(shown["frozen"]) < 13
