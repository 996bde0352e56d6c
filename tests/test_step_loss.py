"""What benchmarks/step.py takes for wrong values: a first loss that is not the frozen model's."""

import csv
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed peft_kernels stays the one that is tested

pytest.importorskip("transformers", reason="its models are transformers': pip install transformers")

pytest.importorskip("peft", reason="the rows beside ours are HF PEFT's: pip install peft")

from step_cases import SMALL, case, here  # noqa: E402

from benchmarks import memory_methods, step, step_loss, vram  # noqa: E402


def _tail(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's t with an even number of degrees of freedom (Abramowitz and Stegun 26.7.4)."""
    angle, term, total = math.atan(t / math.sqrt(freedom)), 1.0, 1.0
    for k in range(1, freedom // 2):
        term *= math.cos(angle) ** 2 * (2 * k - 1) / (2 * k)
        total += term
    return 1 - math.sin(angle) * total


def test_one_right_loss_in_a_million_is_refused():
    assert math.isclose(_tail(step_loss.STUDENT, step_loss.DRAWS), 1e-6, rel_tol=5e-3)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 2**-19)])
def test_every_number_moves_by_a_unit_or_by_the_walk_of_its_sum(dtype, unit):
    """256 terms of fp32: sixteen units of 2^-23."""
    x, out = torch.ones(1, 256, dtype=dtype), torch.full((1, 64), 1.0, dtype=dtype)
    moved = step_loss._moved(nn.Identity(), (x,), out)
    assert set(moved.flatten().tolist()) == {1 - unit, 1 + unit} and moved.dtype == dtype
    assert set(step_loss._moved(nn.Identity(), (), out).flatten().tolist()) == {
        1 - torch.finfo(dtype).eps, 1 + torch.finfo(dtype).eps,
    }  # fmt: skip
    assert step_loss._moved(nn.Identity(), (x,), {"out": out}) == {"out": out} and set(out.flatten().tolist()) == {1.0}


def _changed(name: str, change) -> memory_methods.Method:
    """`lora` whose output `change` makes another, as a peer called `name`."""

    def adapt(model: nn.Module, options: memory_methods.Options) -> nn.Module:
        model = vram.methods()["lora"].adapt(model, options)
        model.register_forward_hook(lambda module, args, out: change(out))
        return model

    return memory_methods.Method(name, memory_methods.full_estimate, adapt)


def _scaled(factor: float):
    def change(out):
        return out.loss * factor

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_losses_are_within_the_bound_and_wrong_ones_are_not(dtype):
    """Wrong by one part in a hundred: of LoRA's first step all that a peer can get wrong is gross."""
    methods = [*here("lora", "lora-bf16", "peft-lora", "peft-lora-bf16", "full"), _changed("off", _scaled(1.01))]
    field = step.contenders(case(2, dtype), "cpu", methods, False)
    errors = {one.name: one.check() for one in field.contenders}
    assert errors.pop("frozen") == {} and errors.pop("off")["loss"] > 1
    assert len(errors) == 5 and all(error["loss"] <= 1 for error in errors.values())


def test_the_bound_is_of_the_size_of_the_dtypes_rounding():
    """Three more digits of a number are three fewer of its rounding's reach."""
    bounds = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        field = step.contenders(case(2, dtype), "cpu", [], False)
        field.contenders[0].check()
        bounds[dtype] = field.losses.bound
        assert not any(module._forward_hooks for module in field.base.modules())
    assert bounds[torch.bfloat16] > 2 * bounds[torch.float16] > 2**5 * bounds[torch.float32]


def test_a_wrong_loss_is_not_timed(monkeypatch, tmp_path, capsys):
    broken = {"triple": _changed("triple", _scaled(3.0)), "infinite": _changed("infinite", _scaled(math.inf))}
    known = vram.methods() | broken
    monkeypatch.setattr(vram, "methods", lambda: known)
    path = tmp_path / "step.csv"
    assert step.main([*SMALL, "--method", *broken, "peft-lora", "--csv", str(path)]) == 1
    rows = {row["contender"]: row for row in csv.DictReader(path.open())}
    for name in broken:
        assert re.match(r"wrong values: loss [\w.+]+x its bound", rows[name]["status"]) and not rows[name]["ms_p50"]
        assert float(rows[name]["error_over_bound"]) > 1
    assert rows["peft-lora"]["status"] == rows["frozen"]["status"] == "ok"
    assert float(rows["peft-lora"]["error_over_bound"]) <= 1
    shown = dict(re.findall(r"^ *([\w-]+) .* ([\w.]+)$", capsys.readouterr().out, re.M))
    assert shown["frozen"] == shown["peft-lora"] and 9 < float(shown["frozen"]) < 13
    assert shown["infinite"] == "inf" and 27 < float(shown["triple"]) < 39


def test_where_the_model_drops_at_random_no_loss_is_refused():
    """What is drawn in the same order is dropped alike: the same masks, here."""
    asked = case(2, model="minilm-l6")
    assert asked.drops and not case().drops
    field = step.contenders(asked, "cpu", [*here("lora", "full"), _changed("off", _scaled(3.0))], False)
    assert [one.check() for one in field.contenders] == [{}] * 4
    losses = field.losses.values
    assert math.isclose(losses["full"], losses["frozen"], rel_tol=1e-6) and losses["off"] > 2 * losses["frozen"]
    assert field.losses.bound is None
