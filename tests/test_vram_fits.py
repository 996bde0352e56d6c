"""benchmarks/vram.py --fits: the largest batch that a card holds, how few sizes are tried, what else would fit."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_vram import GIB, SMALL, question, vram

from benchmarks import vram_fits
from peft_kernels.memory import replay
from peft_kernels.memory.allocator import OutOfMemory


def fits(asked, method, batch: int, seq: int, capacity: int) -> bool:
    return vram_fits.fits(asked, method, batch, seq, capacity, vram_fits.Tries())


@pytest.mark.parametrize("guess", [1, 2, 8, 40, 63, 64, 999])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 63, 64, 100])
def test_the_largest_that_works(size, guess):
    asked = []
    assert vram_fits.largest(lambda n: asked.append(n) or n <= size, 64, guess) == min(size, 64)
    assert len(asked) == len(set(asked)) <= 13 and max(asked) <= 64
    if 1 <= size < 64:
        assert {size, size + 1} <= set(asked)
        assert len(asked) == 2 or guess != size


def test_what_fits_is_the_last_that_does():
    one, method = question("shallow", dtype=torch.float32), vram.methods()["lora"]
    small = replace(one, batch=2, seq=64)
    need = small.predict(method).replay.reserved
    assert fits(small, method, 2, 64, need)
    assert not fits(small, method, 8, 64, need)


class Linear:
    """A step whose weights take 10 GiB, its first phase 12, and each sequence 1.7 of another; blocks cost 2 % more."""

    def __init__(self):
        self.asked = []

    def predict(self, n: int):
        self.asked.append(n)
        sizes = {"backward": int((10 + 1.7 * n) * GIB), "step": 12 * GIB}
        one = replay.Replay({name: replay.Moment(size, {}, "") for name, size in sizes.items()}, 0, 0, 0)
        return SimpleNamespace(
            replay=replace(one, reserved=int(1.02 * one.peak.allocated)), arch=90, as_run_on=self.full
        )

    def full(self, arch: int, capacity: int):
        raise OutOfMemory


@pytest.mark.parametrize(("card", "expected"), [(9, 0), (12.24, 1), (13.7, 2), (79, 39), (400, 224)])
def test_few_sizes_are_tried(card, expected):
    """Memory grows linearly: two sizes tell where to look."""
    model = Linear()
    assert vram_fits._largest(model.predict, int(card * GIB), 1 << 16) == expected
    assert len(model.asked) == len(set(model.asked)) <= (5 if expected < 100 else 8)
    assert expected + 1 in model.asked


def test_a_batch_that_fits_is_a_row():
    model, method = Linear(), SimpleNamespace(name="lora")
    asked = SimpleNamespace(batch=2, seq=100, predict=lambda method, batch, seq: model.predict(batch))
    found = SimpleNamespace(method=method, prediction=model.predict(2))
    assert vram_fits._row(asked, found, 79 * GIB, vram_fits.Tries()) == ("lora", "39 x 100", "3,900 tokens")
    assert model.asked.count(2) == 1  # what is predicted already is not predicted again


def test_a_sequence_that_is_too_long_alone(monkeypatch):
    """The longest multiple of 64 that fits is given, and what would make room."""
    monkeypatch.setattr(vram_fits, "_advice", lambda question, method, capacity, tries: f"advice for {capacity}")
    asked, method = replace(question("minilm-l6", dtype=torch.float32), batch=1, seq=512), vram.methods()["lora"]
    too_little = asked.predict(method, 1, 256).replay.peak.allocated - 1
    assert [fits(asked, method, 1, seq, too_little) for seq in (128, 192)] == [True, False]
    found = vram_fits.text(asked, [vram.Result(method, None, asked.predict(method))], vram_fits.CONTEXT + too_little)
    assert re.search(rf"lora +1 x 128 +not 512: advice for {too_little}$", found)


def test_what_does_not_fit_says_what_to_change(capsys):
    assert vram.main([*SMALL, "--method", "full", "--fits", "1100MB"]) == 0
    said = capsys.readouterr()
    assert re.search(r"full +nothing +not 16: the weights alone are 0\.12 GiB: a smaller", said.out)
    # while it looks: one sequence of 16 tokens, one of 64, what the weights take
    tried = re.findall(r"predictions=(\d+), size=(\d+ x \d+)", said.err)
    assert list(dict.fromkeys(tried)) == [("1", "1 x 16"), ("2", "1 x 64"), ("3", "1 x 1")]


def test_predictions_are_counted_over_all_methods():
    told, asked = [], SimpleNamespace(predict=lambda method, batch, seq: (method, batch, seq))
    tries = vram_fits.Tries(lambda **words: told.append(words))
    assert [tries(asked, name, 2, 64) for name in ("full", "lora")] == [("full", 2, 64), ("lora", 2, 64)]
    assert told == [{"size": "2 x 64", "predictions": n} for n in (1, 2)]


def test_advice_is_what_was_predicted_to_fit():
    asked, method = replace(question("shallow", dtype=torch.float32), seq=16), vram.methods()["full"]
    need = {name: replace(asked, optimizer=name).predict(method).replay.reserved for name in ("adamw", "adamw-fused")}
    assert need["adamw-fused"] < need["adamw"]
    said = vram_fits._advice(asked, method, need["adamw-fused"], vram_fits.Tries())
    assert said == "fits with --optimizer adamw-fused or both"
