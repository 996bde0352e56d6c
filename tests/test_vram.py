"""benchmarks/vram.py: the lecture's rows, what is wrong with a question, the files it writes."""

import csv
import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

pytest.importorskip("transformers", reason="its models are transformers': pip install transformers")

from benchmarks import architectures, environment, memory_methods, vram, vram_report  # noqa: E402

GIB = 2**30
# minilm-l6 with a third of its layers: most tests are of tables and messages.
SHALLOW = architectures.BertConfig(hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536)
architectures._NAMED["shallow"] = lambda: SHALLOW, None, True
SMALL = ("--model", "shallow", "--batch", "2", "--seq", "16", "--dtype", "fp32")


def question(model: str, **options) -> vram.Question:
    return vram.Question(
        architectures.find(model), memory_methods.Options(**options), 1, 512, False, "adamw", 90
    )  # fmt: skip


def estimate(model: str, method: str, **options) -> memory_methods.Estimate:
    return question(model, **options).estimate(vram.methods()[method])


def gib(one: memory_methods.Estimate) -> list[float]:
    return [round(size / GIB, 2) for size in (one.weights, one.gradients, one.optimizer, one.total)]


def test_the_lecture_s_table():
    """Llama-2-7B in 16 bits: about 13 + 13 + 26 GB, and with a million trained parameters 13 GB + 2 MB + 4 MB."""
    full = estimate("llama-2-7b", "full")
    assert full.trained == 6_738_415_616
    assert gib(full) == [12.55, 12.55, 25.1, 50.21]
    million = estimate("llama-2-7b", "lora", rank=2, targets=("q_proj", "v_proj"))
    assert million.trained == 2**20
    assert (million.gradients, million.optimizer) == (2 * 2**20, 4 * 2**20)
    assert round(million.total / GIB, 2) == 12.56


def test_gpt3_with_lora():
    """The LoRA paper's second figure: a checkpoint of 350 GB becomes one of 35 MB with r = 4 on q and v. Here c_attn is
    q, k and v in one: r (K + 3 K) parameters a layer, as many as 2 r (K + K)."""
    full, lora = estimate("gpt3-175b", "full"), estimate("gpt3-175b", "lora", rank=4, targets=("c_attn",))
    assert round(full.weights / 1e9) == 349  # of 174.6e9 parameters
    assert round(2 * lora.trained / 2**20) == 36
    assert (round(full.total / 1e9), round(lora.total / 1e9)) == (1397, 349)  # the paper: 1.2 TB and 350 GB


def test_qlora_weights():
    """NF4 with double quantisation, 4.127 bits: 3.11 GiB for the linear layers, 0.49 for the rest."""
    qlora = estimate("llama-2-7b", "qlora", rank=16)
    adapters = 2 * qlora.trained
    assert qlora.trained == 39_976_960
    assert round((qlora.weights - adapters) / GIB, 2) == 3.6


def test_prints_estimate_prediction_and_what_lies_between(capsys):
    assert vram.main([*SMALL, "--method", "full", "lora", "peft-lora", "qlora", "qlora-offloaded", "peft-qlora"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"full +predicted +load .*\n +forward .*\n +backward .*\n +step ", text)
    assert re.search(r"lora: [\d.]+ by formula, [\d.]+ predicted, reached in \w+, at [\w.]+: ", text)
    assert "peft-qlora: no prediction: bitsandbytes' parameters are a kind of tensor" in text


def test_measured_on_a_cpu_is_predicted(tmp_path):
    """By the same command: every kind that has a name, and all that is allocated, but for a number that a CPU wraps."""
    path = tmp_path / "rows.csv"
    assert vram.main([*SMALL, "--method", "full", "lora", "--measure", "cpu", "--csv", str(path)]) == 0
    rows = {(row["method"], row["source"], row["phase"]): row for row in csv.DictReader(path.open())}
    for method in ("full", "lora"):
        for phase, unseen in (("load", 0), ("forward", 0), ("backward", 0), ("step", 12)):
            found, real = rows[method, "predicted", phase], rows[method, "measured", phase]
            assert int(real["allocated"]) - int(found["allocated"]) == unseen
            assert found["weights"] == real["weights"]
    devices = {source: row["device"] for (_, source, _), row in rows.items()}
    assert devices == {"estimate": "CPU", "predicted": "CPU", "measured": environment.device_name("cpu")}


def test_files(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc")
    pytest.importorskip("matplotlib", reason="one of them is a picture: pip install matplotlib")
    files = [tmp_path / "deep" / f"rows.{kind}" for kind in ("csv", "json", "png")]
    arguments = [word for path in files for word in (f"--{path.suffix[1:]}", str(path))]
    assert vram.main([*SMALL, "--method", "lora", *arguments]) == 0
    rows = list(csv.DictReader(files[0].open()))
    assert [row["phase"] for row in rows] == ["sum", "load", "forward", "backward", "step", "peak"]
    kinds = list(vram_report.COLUMNS)
    for row in rows[1:]:
        assert sum(int(row[kind]) for kind in kinds) == int(row["allocated"])
    about = {"model": "shallow", "batch": "2", "seq": "16", "dtype": "float32", "device": "compute capability 9.0"}
    about |= {"rank": "8", "targets": "all-linear", "update": "adamw", "checkpointing": "False"}
    about |= {"torch": environment.version("torch"), "commit": "abc"}
    for row in rows:
        assert {name: row[name] for name in about} == about
    stored = json.loads(files[1].read_text())
    assert stored["question"]["model"] == "shallow" and len(stored["rows"]) == len(rows)
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["rows.csv", "rows.json", "rows.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "llama-9"],
            r"model 'llama-9' is no file; expected the path of a config.json or one of llama-2-",
        ),
        (["--model", __file__], "is not a config.json that transformers knows"),
        ([*SMALL, "--rank", "385"], r"rank is 385; expected 1 to 384, the smaller side of bert\.encoder"),
        ([*SMALL, "--rank", "0"], "rank is 0; expected 1 to 384"),
        ([*SMALL, "--targets", "q_proj"], "targets q_proj: no such linear layer; there are dense, key, query, value"),
        ([*SMALL, "--seq", "513"], "seq is 513, but shallow has positions for 512 tokens at most"),
        ([*SMALL, "--batch", "0"], "batch 0 x 16: expected at least 1 x 1"),
        ([*SMALL, "--batch", str(2**50)], "overflows"),
        ([*SMALL, "--arch", "9"], "arch is 9; expected a compute capability such as 90"),
        (["--model", "llama-2-7b", "--method", "bitfit"], "this model has no parameter named bias"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(vram, "predict_memory", None)
    assert vram.main(["--method", "lora", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def without_biases(tmp_path) -> str:
    """A model of one layer in which nothing is named bias."""
    config = architectures.find("smollm2-135m").config
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny" / "config.json")


def test_a_method_that_the_model_is_not_made_for_leaves_the_others(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.csv"
    model = ("--model", without_biases(tmp_path), "--seq", "8")
    assert vram.main([*model, "--method", "bitfit", "lora", "--csv", str(path)]) == 1
    said = capsys.readouterr()
    assert "bitfit: no estimate: bitfit trains biases, and this model has no parameter named bias\n" in said.out
    assert re.search(r"lora +predicted +load ", said.out) and "vram:" not in said.err
    assert {row["method"] for row in csv.DictReader(path.open())} == {"lora"}
    monkeypatch.setattr(vram, "predict_memory", None)
    assert vram.main([*model, "--method", "bitfit", "bitfit"]) == 2  # nothing is left to show
    assert vram.main([*model, "--method", "bitfit", "lora", "--rank", "9999"]) == 2  # which no method can have
    said = capsys.readouterr()
    assert said.out == "" and "this model has no parameter named bias\nvram: rank is 9999; expected 1 to" in said.err


def test_a_config_file(tmp_path, capsys):
    assert vram.main(["--model", without_biases(tmp_path), "--method", "lora", "--seq", "8"]) == 0
    assert capsys.readouterr().out.startswith("tiny: bfloat16 base, batch 1 x 8 tokens")


@pytest.mark.parametrize("method", ["full", "lora", "peft-lora"])
@pytest.mark.parametrize("model", ["shallow", "smollm2-135m"])
def test_the_estimate_counts_what_is_trained(model, method):
    asked, way = replace(question(model), seq=8), vram.methods()[method]
    assert asked.estimate(way).trained == asked.predict(way).trainable


@pytest.mark.parametrize("arguments", [["--fits", "1GB"], ["--fits", "24GB", "--measure", "cpu"], ["--csv", "."]])
def test_options_that_do_not_go_together(arguments, capsys):
    with pytest.raises(SystemExit):
        vram.main([*SMALL, *arguments])
    assert re.search("--fits needs a card of more than 1024 MiB|is a folder", capsys.readouterr().err)


@pytest.mark.parametrize("text", ["24", "GB", "24 PB", "1,5GB"])
def test_a_size_has_a_unit(text, capsys):
    with pytest.raises(SystemExit):
        vram.main([*SMALL, "--fits", text])
    assert "expected a number and a unit, such as 24GB" in capsys.readouterr().err


def not_installed(monkeypatch, package: str) -> None:
    """As where `package` is not there: no version, and an import of it fails."""
    real = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "none" if name == package else real(name))
    for name in [name for name in sys.modules if name.partition(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("package", ["transformers", "tabulate", "tqdm"])
def test_says_what_to_install(package, capsys, monkeypatch):
    not_installed(monkeypatch, package)
    monkeypatch.setattr(sys, "argv", ["vram.py", *SMALL])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "vram.py"), run_name="__main__")
    assert ended.value.code == 2
    assert f"error: not installed: pip install {package}\n" in capsys.readouterr().err


def test_a_picture_needs_matplotlib_before_anything_runs(capsys, monkeypatch, tmp_path):
    not_installed(monkeypatch, "matplotlib")
    monkeypatch.setattr(vram, "find", None)
    with pytest.raises(SystemExit) as ended:
        vram.main([*SMALL, "--png", str(tmp_path / "rows.png")])
    assert ended.value.code == 2
    assert "error: --png needs matplotlib: pip install matplotlib\n" in capsys.readouterr().err


def test_runs_by_its_path(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "vram.py"), "--model", "minilm-l6", "--method", "lora"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "peft" not in done.stderr.lower() and "minilm-l6" in done.stdout
