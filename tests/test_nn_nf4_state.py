"""NF4Linear's state_dict: bitsandbytes' names and bytes, read and written; what does not fit is refused whole."""

import copy
import re

import pytest
import torch
from nf4_states import assert_same_states, edited, make_state, text, values_of
from torch import nn

import peft_kernels as pk

N, K = 6, 40
JSON = "weight.quant_state.bitsandbytes__nf4"


def empty(bias: bool = False, **settings) -> pk.NF4Linear:
    return pk.NF4Linear(K, N, bias=bias, dtype=torch.bfloat16, **settings)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_loads_and_writes_the_same_bytes(nested, quant_type, storage):
    state = make_state(shape=(N, K), nested=nested, quant_type=quant_type, storage=storage, blocksize=32)
    state["bias"] = torch.randn(N)
    layer = empty(bias=True)
    assert not any(layer.load_state_dict(state))
    assert torch.equal(layer.dequantize(torch.float32), values_of(state, "weight"))
    assert_same_states(layer.state_dict(), {**state, "bias": state["bias"].bfloat16()})
    assert layer.weight.dtype == torch.uint8 and layer.weight.dim() == 1


def test_names_are_in_bitsandbytes_order_behind_weight_and_bias():
    assert sorted(empty(bias=True, double_quant=True).state_dict()) == sorted(
        ["weight", "bias", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", JSON]
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (N, K), (5, 129)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_round_trip_is_strict_and_exact(shape, double_quant):
    source = pk.NF4Linear(shape[1], shape[0], dtype=torch.float16, double_quant=double_quant)
    target = pk.NF4Linear(shape[1], shape[0], dtype=torch.float32, blocksize=128)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dequantize(), source.dequantize()) and target.dequantize().dtype == torch.float16
    assert repr(target) == repr(source)
    assert target.weight.data_ptr() != source.weight.data_ptr()
    again = pk.NF4Linear(shape[1], shape[0], double_quant=double_quant)
    weight = again.weight
    again.load_state_dict(source.state_dict())
    assert again.weight is weight, "where everything fits, the Parameters stay and are written to"
    assert torch.equal(weight, source.weight) and torch.equal(
        again.dequantize(torch.float32), source.dequantize(torch.float32)
    )


def test_assign_takes_the_tensors_of_the_dict():
    state = empty(double_quant=True).state_dict()
    layer = pk.NF4Linear(K, N, bias=False, device="meta")
    with pytest.raises(RuntimeError, match="weight of the layer is on the meta device"):
        layer.load_state_dict(state)
    layer.load_state_dict(state, assign=True)
    assert layer.weight.data_ptr() == state["weight"].data_ptr()
    assert layer.absmax.data_ptr() == state["weight.absmax"].data_ptr()
    assert not layer.absmax.requires_grad


def test_stands_inside_a_model():
    model = nn.ModuleDict({"up": empty(bias=True), "norm": nn.LayerNorm(3), "down": empty(double_quant=True)})
    twin = nn.ModuleDict({"up": empty(bias=True), "norm": nn.LayerNorm(3), "down": empty()})
    assert not any(twin.load_state_dict(model.state_dict()))
    assert_same_states(twin.state_dict(), model.state_dict())
    without = {key: value for key, value in model.state_dict().items() if not key.startswith("down")}
    before = copy.deepcopy(twin.state_dict())
    assert twin.load_state_dict(without, strict=False).missing_keys == ["down.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"down.weight\""):
        twin.load_state_dict(without)
    assert_same_states(twin.state_dict(), before)


def test_hooks_that_rename_keys_run_before_and_once():
    layer, calls = empty(), []

    def rename(module, state_dict, prefix, *args):
        calls.append(prefix)
        for key in [key for key in state_dict if key.startswith("old")]:
            state_dict[key.replace("old", "weight")] = state_dict.pop(key)

    layer.register_load_state_dict_pre_hook(rename)
    state = make_state("old", shape=(N, K))
    layer.load_state_dict(dict(state))
    assert calls == [""] and torch.equal(layer.dequantize(torch.float32), values_of(state, "old"))


NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def spoilt(state, key, value):
    """The last element of one tensor replaced."""
    tensor = state[key].clone()
    tensor[-1] = value
    return {**state, key: tensor}


PLAIN_FAULTS = {
    "no text": (lambda s: without(s, JSON), "weight.quant_state.bitsandbytes__nf4 (or __fp4) is missing"),
    "two texts": (lambda s: {**s, JSON[:-3] + "fp4": s[JSON]}, "weight.quant_state.bitsandbytes__fp4 stands beside"),
    "not json": (lambda s: {**s, JSON: s[JSON][:-1]}, f"{JSON} is not JSON in UTF-8"),
    "not utf-8": (lambda s: {**s, JSON: torch.full((4,), 255, dtype=torch.uint8)}, f"{JSON} is not JSON in UTF-8"),
    "a list": (lambda s: {**s, JSON: text([1])}, f"{JSON} holds list, not an object"),
    "text in floats": (lambda s: {**s, JSON: s[JSON].float()}, f"{JSON} is torch.float32"),
    "another type": (lambda s: edited(s, quant_type="fp4"), f"{JSON} holds quant_type 'fp4'"),
    "unknown type": (lambda s: edited(s, quant_type=["nf4"]), f"{JSON} holds quant_type ['nf4']"),
    "blocksize": (lambda s: edited(s, blocksize=48), f"{JSON} holds blocksize 48"),
    "blocksize true": (lambda s: edited(s, blocksize=True), f"{JSON} holds blocksize True"),
    "blocksize that does not fit": (lambda s: edited(s, blocksize=32), "weight.absmax is torch.float32 [4]; expected"),
    "dtype": (lambda s: edited(s, dtype="int8"), f"{JSON} holds dtype 'int8'"),
    "shape": (lambda s: edited(s, shape=[N, -K]), f"{JSON} holds shape"),
    "other shape": (lambda s: edited(s, shape=[K, N]), "weight is of shape [40, 6]; expected [6, 40]"),
    "field gone": (lambda s: edited(s, dtype=...), f"{JSON} lacks 'dtype'"),
    "field too many": (lambda s: edited(s, zero_point=0), f"{JSON} holds unknown fields ['zero_point']"),
    "nested by text only": (lambda s: edited(s, **NESTED), "weight.absmax is torch.float32 [4]; expected torch.uint8"),
    "half nested": (lambda s: edited(s, nested_offset=0.5), f"{JSON} lacks 'nested_blocksize'"),
    "no weight": (lambda s: without(s, "weight"), "weight is missing"),
    "short weight": (lambda s: {**s, "weight": s["weight"][:-1]}, "weight is torch.uint8 [119, 1]; expected 120 bytes"),
    "flat weight": (lambda s: {**s, "weight": s["weight"].flatten()}, "weight is torch.uint8 [120]; expected 120"),
    "in a row": (lambda s: {**s, "weight": s["weight"].t()}, "weight is stored transposed, in a row [1, 120]"),
    "no absmax": (lambda s: without(s, "weight.absmax"), "weight.absmax is missing"),
    "absmax in bf16": (lambda s: {**s, "weight.absmax": s["weight.absmax"].bfloat16()}, "weight.absmax is torch.bfl"),
    "absmax in fp16": (lambda s: {**s, "weight.absmax": s["weight.absmax"].half()}, "weight.absmax is torch.float16"),
    "absmax nan": (lambda s: spoilt(s, "weight.absmax", torch.nan), "weight.absmax holds NaN or an infinity"),
    "absmax inf": (lambda s: spoilt(s, "weight.absmax", -torch.inf), "weight.absmax holds NaN or an infinity"),
    "map nan": (lambda s: spoilt(s, "weight.quant_map", torch.nan), "weight.quant_map holds NaN or an infinity"),
    "map in fp64": (lambda s: {**s, "weight.quant_map": s["weight.quant_map"].double()}, "quant_map is torch.float64"),
    "no map": (lambda s: without(s, "weight.quant_map"), "weight.quant_map is missing"),
    "other map": (lambda s: {**s, "weight.quant_map": s["weight.quant_map"].flip(0)}, "weight.quant_map holds other"),
    "outer absmax": (
        lambda s: {**s, "weight.nested_absmax": torch.ones(1)},
        "weight.nested_absmax stands there without",
    ),
    "unknown tensor": (lambda s: {**s, "weight.zeros": torch.ones(1)}, "weight.zeros is no part of a 4-bit weight"),
    "dense": (
        lambda s: {"weight": torch.randn(N, K), "bias": s["bias"]},
        "weight is a torch.float32 weight that is not",
    ),
    "bias": (lambda s: {**s, "bias": torch.ones(3)}, "size mismatch for bias"),
}
NESTED_FAULTS = {
    "no outer absmax": (lambda s: without(s, "weight.nested_absmax"), "weight.nested_absmax is missing"),
    "outer absmax": (
        lambda s: {**s, "weight.nested_absmax": torch.ones(2)},
        "weight.nested_absmax is torch.float32 [2]",
    ),
    "outer absmax nan": (lambda s: spoilt(s, "weight.nested_absmax", torch.nan), "weight.nested_absmax holds NaN"),
    "outer absmax inf": (lambda s: spoilt(s, "weight.nested_absmax", torch.inf), "weight.nested_absmax holds NaN"),
    "outer map nan": (lambda s: spoilt(s, "weight.nested_quant_map", torch.nan), "weight.nested_quant_map holds NaN"),
    "outer map inf": (lambda s: spoilt(s, "weight.nested_quant_map", torch.inf), "weight.nested_quant_map holds NaN"),
    "no outer map": (lambda s: without(s, "weight.nested_quant_map"), "weight.nested_quant_map is missing"),
    "outer map": (
        lambda s: {**s, "weight.nested_quant_map": torch.ones(16)},
        "weight.nested_quant_map is torch.float32",
    ),
    "offset nan": (lambda s: edited(s, nested_offset=float("nan")), f"{JSON} holds nested_offset nan"),
    "offset inf": (lambda s: edited(s, nested_offset=float("inf")), f"{JSON} holds nested_offset inf"),
    "offset large": (lambda s: edited(s, nested_offset=1e300), f"{JSON} holds nested_offset 1e+300"),
    "offset text": (lambda s: edited(s, nested_offset="1"), f"{JSON} holds nested_offset '1'"),
    "outer blocksize": (lambda s: edited(s, nested_blocksize=128), f"{JSON} holds nested_blocksize 128; expected 256"),
    "outer dtype": (lambda s: edited(s, nested_dtype="float16"), f"{JSON} holds nested_dtype 'float16'"),
    "text not nested": (
        lambda s: edited(s, **dict.fromkeys(NESTED, ...)),
        "weight.absmax is torch.uint8 [4]; expected torch.float32 [4]",
    ),
}
CASES = [(False, name) for name in PLAIN_FAULTS] + [(True, name) for name in NESTED_FAULTS]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("nested", "fault"), CASES, ids=lambda part: str(part))
def test_what_does_not_fit_is_refused_whole_with_its_key(nested, fault, strict):
    change, message = (NESTED_FAULTS if nested else PLAIN_FAULTS)[fault]
    layer = empty(bias=True, double_quant=nested)
    before = copy.deepcopy(layer.state_dict())
    good = {**make_state(shape=(N, K), nested=nested), "bias": torch.randn(N)}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        layer.load_state_dict(change(good), strict=strict)
    assert_same_states(layer.state_dict(), before)
    layer.load_state_dict(good)


def test_a_text_without_a_shape_takes_the_layers():
    state = edited(make_state(shape=(N, K)), shape=None)
    layer = empty()
    layer.load_state_dict(state)
    assert torch.equal(layer.dequantize(torch.float32), values_of(edited(state, shape=[N, K]), "weight"))
