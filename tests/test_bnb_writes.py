"""save_quantized where something goes wrong half-way, and load_quantized over what such folders and texts can hold."""

import copy
import json

import pytest
import torch
from accelerate import init_empty_weights
from bnb_models import SIZES
from nf4_states import assert_same_states
from safetensors.torch import load_file
from test_bnb_files import empty, tied
from tiny_models import llama
from torch import nn

import peft_kernels as pk
from peft_kernels.interop import tensor_files

INDEX = "model.safetensors.index.json"


def _changed(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                parameter.add_(1)
    return other


@pytest.mark.parametrize("size", [20_000, 10**9], ids=["shards", "one-file"])
@pytest.mark.parametrize("call", ["save_file", "replace"])
def test_a_failed_write_never_leaves_a_mixture(call, size, tmp_path, monkeypatch):
    """A disk that is full leaves the earlier files; a move that fails leaves what does not load, or the earlier."""
    model = pk.quantize(llama(**SIZES))
    pk.save_quantized(model, tmp_path, max_shard_size=size)
    calls = []
    owner = tensor_files if call == "save_file" else tensor_files.os
    real = getattr(owner, call)

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == (2 if size < 10**9 else 1):
            raise OSError("disk full")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, call, fails)
    with pytest.raises(OSError, match="disk full"):
        pk.save_quantized(_changed(model), tmp_path, max_shard_size=size)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))
    if call == "replace" and size < 10**9:
        with pytest.raises(FileNotFoundError):
            pk.load_quantized(empty(), tmp_path)
    else:
        assert_same_states(pk.load_quantized(empty(), tmp_path).state_dict(), model.state_dict())


class _Twice(nn.Module):
    """One layer under two names, and one that stays dense."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(128, 128, bias=False)
        self.b, self.c = self.a, nn.Linear(128, 8)


def test_a_layer_under_two_names_is_written_once_and_read_into_both(tmp_path):
    model = pk.quantize(_Twice(), double_quant=True, skip_modules=["c"])
    pk.save_quantized(model, tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any(key.startswith("a.weight") for key in keys) and not any(key.startswith("b.") for key in keys)
    with init_empty_weights():
        again = _Twice()
    pk.load_quantized(again, tmp_path)
    assert isinstance(again.a, pk.NF4Linear) and again.b is again.a
    assert_same_states(again.state_dict(), model.state_dict())


def test_tied_tensors_are_written_once(tmp_path):
    pk.save_quantized(pk.quantize(tied()), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_bare_layer_is_refused(tmp_path):
    layer = pk.FusedLoRALinear.from_linear(nn.Linear(128, 128), r=4)
    layer.quantize_base()
    with pytest.raises(ValueError, match="is itself the layer: save its state_dict"):
        pk.save_quantized(layer, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"quantization_config": "bitsandbytes"}', "quantization_config is bitsandbytes; expected"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=["a-name", "deep"],
)
def test_a_config_that_is_of_no_use_is_named(text, message, tmp_path):
    pk.save_quantized(pk.quantize(llama(**SIZES)), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        pk.load_quantized(empty(), tmp_path)


def test_an_index_names_files_of_its_folder_only(tmp_path):
    pk.save_quantized(pk.quantize(llama(**SIZES)), tmp_path / "x", max_shard_size=20_000)
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    index["weight_map"] = {key: f"../x/{file}" for key, file in index["weight_map"].items()}
    (tmp_path / "x" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is no file of this folder"):
        pk.load_quantized(empty(), tmp_path / "x")


def _text(layer: pk.NF4Linear, text: bytes, kind: str = "nf4") -> dict[str, torch.Tensor]:
    state = {key: value for key, value in layer.state_dict().items() if "quant_state" not in key}
    key = f"weight.quant_state.bitsandbytes__{kind}"
    return {**state, key: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda layer: _text(layer, b"[" * 100_000), "is not JSON"),
        (lambda layer: _text(layer, b'{"quant_type": ["nf4"], "blocksize": 64, "dtype": "float32", "shape": [64, 64]}',
                             "['nf4']"), "holds quant_type"),
        (lambda layer: {**layer.state_dict(), "weight": layer.state_dict()["weight"].bool()}, "torch.bool"),
        (lambda layer: copy.deepcopy(layer).to("meta").state_dict(), "on the meta device"),
    ],
    ids=["deep", "a-list", "bool", "meta"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_key(edit, message):
    layer = pk.NF4Linear(64, 64, bias=False)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"weight.*{message}"):
        layer.load_state_dict(edit(layer))
    assert_same_states(layer.state_dict(), before)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_stays_in_its_mode(training):
    assert pk.NF4Linear.from_linear(nn.Linear(64, 64).train(training)).training == training
