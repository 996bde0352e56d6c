"""benchmarks/step.py: a whole training step of a named model, beside peers and the frozen floor."""

import csv
import re
import subprocess
import sys
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

from benchmarks import architectures, cases, memory_methods, step, step_contenders, step_fits, vram  # noqa: E402


def test_every_method_has_a_row(tmp_path, capsys):
    path = tmp_path / "step.csv"
    assert step.main([*SMALL, "--method", "lora", "peft-lora", "full", "qlora", "peft-qlora", "--csv", str(path)]) == 0
    rows = {row["contender"]: row for row in csv.DictReader(path.open())}
    assert {name: row["role"] for name, row in rows.items()} == {
        "frozen": "floor", "lora": "ours", "peft-lora": "peer", "full": "peer", "qlora": "ours",
        "peft-qlora": "peer",
    }  # fmt: skip
    assert all(float(row["ms_p50"]) > 0 for row in rows.values()), {n: row["status"] for n, row in rows.items()}
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

    def needed(asked, methods, compiled, arch):
        assert ([method.name for method in methods], compiled, arch) == (["lora"], True, 80)
        return 100 * asked.layers

    monkeypatch.setattr(step_fits, "needed", needed)
    unpredicted = [*here("peft-lora-liger"), vram.methods()["peft-qlora"]]
    for methods in ([*here("lora"), *unpredicted], unpredicted):
        assert step.fitting_layers(case(), methods, True, capacity, 80) == layers


@pytest.mark.parametrize(
    ("names", "compiled", "bases", "rest"),
    [
        (("lora",), True, 1, 30 + 100),
        (("full",), False, 1 + 3, 500),
        (("lora", "full"), False, 1 + 3, 30 + 500),
        (("full", "lora", "peft-lora"), True, 1 + 2 * 3, 30 + 2 * 30 + 500),
    ],
)
def test_what_all_methods_keep_is_there_at_once(names, compiled, bases, rest, monkeypatch):
    """`full` keeps weights of its own beside the shared ones, and again when it is compiled too."""
    with torch.device("meta"):
        base = sum(p.nbytes for p in case().shortened().build(torch.float32).parameters())

    def predict(question, method):
        full = method.name == "full"
        kinds = {"weights": base, "optimizer": 2 * base} if full else {"weights": base + 10, "optimizer": 20}
        peak = SimpleNamespace(kinds=kinds, allocated=sum(kinds.values()) + (500 if full else 100))
        return SimpleNamespace(replay=SimpleNamespace(peak=peak))

    monkeypatch.setattr(vram.Question, "predict", predict)
    assert step_fits.needed(case(), here(*names), compiled, 80) == bases * base + rest


def test_what_is_wrong_is_said(capsys):
    assert step.main(["--model", "nothing", "--device", "cpu"]) == 2
    assert "model 'nothing' is no file" in capsys.readouterr().err
    assert step.main(["--model", "minilm-l6", "--seq", "513", "--device", "cpu"]) == 2
    assert "positions for 512 tokens at most" in capsys.readouterr().err
    assert step.main([*SMALL, "--rank", "1000"]) == 2
    assert "rank is 1000; expected 1 to 576" in capsys.readouterr().err
    for layers in ("0", "-1", "31"):
        assert step.main([*SMALL, "--layers", layers]) == 2
        assert f"--layers is {layers}; expected 1 to 30, which smollm2-135m has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "0"), "--rounds is 0; expected at least 1"),
        (("--csv", "{}/folder.csv"), "folder.csv cannot be written: it is a folder"),
        (("--csv", "/proc/x.csv"), "--csv /proc/x.csv cannot be written"),
        (("--csv", "{}/file/x.csv"), "file/x.csv cannot be written"),
        (("--csv", "{}/other.csv"), r"other.csv is not a file of rows: .*has columns \['a', 'b'\]"),
        (("--csv", "{}/bytes.csv"), "bytes.csv is not a file of rows"),
    ],
)
def test_options_that_make_no_sense_end_it_before_anything_is_measured(options, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setattr(step, "run", None)
    with pytest.raises(SystemExit) as ended:
        step.main([*SMALL, *(option.format(tmp_path) for option in options)])
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("package", ["transformers", "tabulate", "psutil", "tqdm"])
def test_a_package_that_is_not_there_is_named(package):
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path('benchmarks/step.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"step: needs {package}: pip install {package}\n")


def test_only_plain_peers_are_compiled():
    names = ("lora", "lora-bf16", "peft-lora", "full", "peft-lora-liger", "peft-lora-cce")
    compiled = [name for name in names if step_contenders.compilable(vram.methods()[name])]
    assert compiled == ["peft-lora", "full"]
    field = step.contenders(case(), "cpu", here("lora", "full"), True)
    assert [one.name for one in field.contenders] == ["frozen", "lora", "full", "full, torch.compile"]


def _event(name: str, on_gpu: bool = True, named: bool = False) -> SimpleNamespace:
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return SimpleNamespace(name=name, device_type=kind, is_user_annotation=named)


def test_copies_and_fills_are_no_kernels():
    copies = ("Memcpy DtoD (Device -> Device)", "Memcpy HtoD (Pageable -> Device)", "Memset (Device)")
    assert not any(step._is_kernel(_event(name)) for name in copies)
    assert not step._is_kernel(_event("Optimizer.step#AdamW.step", named=True))
    assert not step._is_kernel(_event("cudaLaunchKernel", on_gpu=False))
    assert step._is_kernel(_event("void at::native::vectorized_elementwise_kernel<4>")) and step._is_kernel(_event("x"))


def test_memory_is_over_the_bases_weights_by_optimizer(tmp_path):
    """Adam's two moments of full fine-tuning are two more sets of weights; rows of both optimizers are kept."""
    path = tmp_path / "step.csv"
    for optimizer in ("sgd", "adamw-fused"):
        assert step.main([*SMALL, "--method", "full", "lora", "--optimizer", optimizer, "--csv", str(path)]) == 0
    peaks = {}
    for row in csv.DictReader(path.open()):
        peaks[row["contender"], row["case"].rpartition("=")[2]] = int(row["peak_bytes"])
    assert len(peaks) == 6
    with torch.device("meta"):
        weights = sum(p.nbytes for p in case(dtype=torch.bfloat16).shortened().build(torch.bfloat16).parameters())
    assert peaks["full", "sgd"] > weights  # its gradients
    assert abs(peaks["full", "adamw-fused"] - peaks["full", "sgd"] - 2 * weights) < 0.01 * weights
    adapters = 4 * 4 * (4 * 576 + 2 * 192 + 2 * 576 + 3 * (576 + 1536))  # fp32 of rank 4: q and o, k and v, the MLP's
    assert abs(peaks["lora", "adamw-fused"] - peaks["lora", "sgd"] - 2 * adapters) < 0.1 * adapters
    assert weights > peaks["lora", "sgd"] - peaks["frozen", "sgd"] > adapters


def test_full_fine_tuning_leaves_the_shared_base_alone():
    field = step.contenders(case(), "cpu", here("lora", "full"), False)
    steps = {one.name: one.step for one in field.contenders}
    before = float(steps["frozen"](0)), float(steps["full"](0))
    assert float(steps["full"](0)) < before[1] and float(steps["frozen"](0)) == before[0] == before[1]
    assert not any(p.requires_grad for p in field.base.parameters())


def test_gradients_do_not_add_up_from_step_to_step():
    weight = nn.Parameter(torch.tensor([3.0]))
    model = nn.Module()
    model.weight, model.forward = weight, lambda factor: weight.sum() * factor
    steps = step_contenders._training(model, {"factor": torch.tensor(2.0)}, torch.optim.SGD([weight], lr=0.5))
    assert [float(steps(i)) for i in range(3)] == [6.0, 4.0, 2.0]
    assert weight.grad is None


def _failing(name: str, error: Exception) -> memory_methods.Method:
    def fails(model: nn.Module, options: memory_methods.Options) -> nn.Module:
        raise error

    return replace(vram.methods()[name], adapt=fails)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no such layer"), "error: RuntimeError: no such layer"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
@pytest.mark.parametrize(("name", "code"), [("peft-lora", 0), ("lora", 1)])
def test_a_contender_that_fails_while_it_is_built_is_a_row(error, status, name, code):
    asked = case()
    field = step.contenders(asked, "cpu", [_failing(name, error)], False)
    (row,) = cases.run_case("step", asked, "cpu", {}, contenders=field.contenders[1:])
    assert row["status"] == status and row["role"] == ("peer" if name == "peft-lora" else "ours")
    assert step.summary.is_fault(row) == code


@pytest.mark.parametrize(
    ("role", "status", "bad"),
    [
        ("peer", "ok", False), ("peer", "not installed: pip install x", False), ("peer", "error: TypeError: x", False),
        ("peer", "wrong values: loss 3x its bound", True), ("peer", "leaks 8 bytes a step", True),
        ("ours", "ok", False), ("ours", "out of memory", True), ("floor", "out of memory", True),
    ],
)  # fmt: skip
def test_what_makes_the_command_fail(role, status, bad):
    assert step.summary.is_fault({"role": role, "status": status}) == bad


def test_a_failure_of_ours_is_the_exit_status(monkeypatch, capsys):
    known = vram.methods() | {"lora": _failing("lora", RuntimeError("no such layer"))}
    monkeypatch.setattr(vram, "methods", lambda: known)
    assert step.main([*SMALL, "--method", "lora"]) == 1
    shown = capsys.readouterr()
    assert "error: RuntimeError: no such layer" in shown.out and "check frozen" in shown.err


def test_a_base_that_does_not_fit_is_said(monkeypatch, capsys):
    def fails(self, dtype):
        if torch.empty(0).device.type != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(self, dtype)

    build = architectures.Architecture.build
    monkeypatch.setattr(architectures.Architecture, "build", fails)
    assert step.main(SMALL) == 1
    assert capsys.readouterr().err.endswith("step: out of memory\n")
