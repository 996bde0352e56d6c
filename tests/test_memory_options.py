"""benchmarks/vram.py: what is wrong with its options, or with a configuration, is one line; what an option does."""

import json
from pathlib import Path

import pytest
from test_vram import SMALL, architectures, memory_methods, vram, vram_report

MEASURE = (*SMALL, "--measure", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SMALL, "--snapshot", "x.pickle"], "--snapshot needs --measure cuda"),
        ([*MEASURE, "--snapshot", "x.pickle"], "--snapshot needs --measure cuda"),
        ([*SMALL, "--within", "5"], "--within needs --measure, and a number of percent from 0 on"),
        ([*MEASURE, "--within", "nan"], "--within needs --measure"),
        ([*MEASURE, "--within", "-1"], "--within needs --measure"),
        ([*SMALL, "--csv", f"{__file__}/rows.csv"], "rows.csv cannot be written: "),
        ([*SMALL, "--png", str(Path(__file__).parent)], "cannot be written: it is a folder; expected a file"),
    ],
)
def test_options_are_checked_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(vram, "find", None)
    with pytest.raises(SystemExit) as ended:
        vram.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, "is a vit; expected a decoder of text (a causal language model) or an encoder that"),
        ({"model_type": "clip"}, "is a clip; expected"),
        ({"model_type": "t5"}, "is a t5; expected"),
        ({"model_type": "bart"}, "is a bart; expected"),
        ({"model_type": "llama", "hidden_size": "wide"}, "is not a config.json that transformers knows: Validation"),
        ({"model_type": "llama", "hidden_act": "nosuch"}, "odd: transformers cannot build it: KeyError: 'nosuch'"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}, "is not a config.json that transformers knows"),
    ],
)
def test_a_configuration_that_is_of_no_use_is_one_line(config, message, capsys, tmp_path):
    path = tmp_path / "odd" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    assert vram.main(["--model", str(path), "--method", "lora", "--seq", "8"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vram: model ") and message in said and said.count("\n") == 1


def test_sgd_has_no_states(capsys):
    assert vram.main([*SMALL, "--method", "full", "--optimizer", "sgd"]) == 0
    out = capsys.readouterr().out
    assert "Estimated: 4 bytes per parameter and per gradient; all the rest is alpha" in out
    assert "Adam" not in out.replace("adamw", "")
    model = architectures.find("llama-2-7b")
    asked = vram.Question(model, memory_methods.Options(), 1, 8, False, "sgd", 90)
    one = vram.Result(vram.methods()["full"], asked.estimate(vram.methods()["full"]))
    assert one.estimate.optimizer == 0 and one.estimate.total == 2 * one.estimate.weights
    assert "full, were it 7e+09  7,000,000,000" in (table := vram_report.text(asked, [one]))
    assert table.splitlines()[-1].split()[-4:] == ["13.04", "13.04", "-", "26.08"]
