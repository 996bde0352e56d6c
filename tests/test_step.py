"""benchmarks/step.py: a whole training step of a named model, beside peers and the frozen floor."""

import csv
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

pytest.importorskip("transformers", reason="its models are transformers': pip install transformers")

from benchmarks import architectures, memory_methods, step, vram  # noqa: E402

SMALL = ("--model", "smollm2-135m", "--layers", "1", "--seq", "16", "--rounds", "2", "--rank", "4", "--device", "cpu")


def case(layers: int = 1) -> step.StepCase:
    options = memory_methods.Options(4, "all-linear", torch.float32)
    return step.StepCase(architectures.find("smollm2-135m"), layers, 1, 16, options)


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
    counts = {name: int(n.replace(",", "")) for name, n in re.findall(r"^ *([\w-]+) .* ([\d,]+)$", text, re.M)}
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
    """A predicted step of 100 bytes a layer, and four fifths of the capacity; 30 layers are all."""

    def predict(question, method):
        peak = SimpleNamespace(allocated=100 * question.architecture.config.num_hidden_layers)
        return SimpleNamespace(replay=SimpleNamespace(peak=peak))

    monkeypatch.setattr(vram.Question, "predict", predict)
    waiting = vram.methods()["qlora"]
    assert step.fitting_layers(case(), [vram.methods()["lora"], waiting], capacity) == layers


def test_what_is_wrong_is_said(capsys):
    assert step.main(["--model", "nothing", "--device", "cpu"]) == 2
    assert "model 'nothing' is no file" in capsys.readouterr().err
    assert step.main(["--model", "minilm-l6", "--seq", "513", "--device", "cpu"]) == 2
    assert "positions for 512 tokens at most" in capsys.readouterr().err
