"""Checkpoints that do not fit the model, or hold what no scale is: refused whole, with the key."""

import pytest
import torch
from accelerate import init_empty_weights
from nf4_states import assert_same_states, edited, make_state
from safetensors.torch import save_file
from torch import nn

import peft_kernels as pk

WEIGHTS = "model.safetensors"


def one_layer() -> nn.Module:
    with init_empty_weights():
        return nn.ModuleDict({"a": nn.Linear(40, 6), "b": nn.LayerNorm(6)})


def good() -> dict[str, torch.Tensor]:
    return {
        **make_state("a.weight", nested=True),
        "a.bias": torch.ones(6),
        "b.weight": torch.ones(6),
        "b.bias": torch.ones(6),
    }


JSON = "a.weight.quant_state.bitsandbytes__nf4"
FAULTS = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "b.bias"}, "missing key b.bias"),
    "unexpected": (lambda s: {**s, "c.weight": torch.ones(1)}, "unexpected key c.weight"),
    "shape": (lambda s: {**s, "b.weight": torch.ones(7)}, r"b.weight has shape \[7\], expected \[6\]"),
    "kind": (lambda s: {**s, "b.weight": torch.ones(6, dtype=torch.int32)}, "b.weight is torch.int32, expected"),
    "short": (
        lambda s: {**s, "a.weight": s["a.weight"][1:].clone()},
        r"a.weight is torch.uint8 \[119, 1\]; expected 120",
    ),
    "map": (lambda s: {**s, "a.weight.quant_map": torch.zeros(16)}, "a.weight.quant_map holds other values"),
    "text": (lambda s: {**s, JSON: s[JSON][:-2].clone()}, f"{JSON} is not JSON"),
    "blocksize": (
        lambda s: edited(s, blocksize=128),
        r"a.weight.absmax is torch.uint8 \[4\]; expected torch.uint8 \[2\]",
    ),
    "type": (lambda s: edited(s, quant_type="int4"), f"{JSON} holds quant_type 'int4'"),
    "absmax": (lambda s: {k: v for k, v in s.items() if k != "a.weight.absmax"}, "a.weight.absmax is missing"),
    "outer absmax nan": (
        lambda s: {**s, "a.weight.nested_absmax": torch.tensor([torch.nan])},
        "a.weight.nested_absmax h",
    ),
    "outer map inf": (
        lambda s: {**s, "a.weight.nested_quant_map": torch.full((256,), torch.inf)},
        "a.weight.nested_quant_map holds NaN or an infinity",
    ),
    "offset nan": (lambda s: edited(s, nested_offset=float("nan")), f"{JSON} holds nested_offset nan"),
    "plain absmax inf": (
        lambda s: {
            **{key: tensor for key, tensor in s.items() if not key.startswith("a.weight")},
            **make_state("a.weight"),
            "a.weight.absmax": torch.tensor([1, 1, -torch.inf, 1]),
        },
        "a.weight.absmax holds NaN or an infinity",
    ),
    "extra": (lambda s: {**s, "a.weight.zeros": torch.ones(1)}, "a.weight.zeros is no part"),
    "turned": (lambda s: edited(s, shape=[40, 6]), r"a.weight is of shape \[40, 6\]; expected \[6, 40\]"),
    "a norm": (lambda s: {**s, **make_state("b.weight", (1, 6))}, "has b.weight in 4 bits, b is LayerNorm; expected"),
    "no module": (lambda s: {**s, **make_state("z.weight")}, "has z.weight in 4 bits, z is no such module"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_refused_whole_with_their_key(fault, tmp_path):
    change, message = FAULTS[fault]
    state = good()
    save_file(change(state), tmp_path / WEIGHTS)
    model = one_layer()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        pk.load_quantized(model, tmp_path)
    assert all(p is before[name] for name, p in model.named_parameters()) and type(model["a"]) is nn.Linear
    save_file(state, tmp_path / WEIGHTS)
    assert_same_states(pk.load_quantized(model, tmp_path).state_dict(), state)
