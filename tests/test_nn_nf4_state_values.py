"""What the tensors of a 4-bit weight in a state_dict may hold, and what its text is like."""

from dataclasses import replace

import pytest
import torch
from nf4_states import assert_same_states, make_state, values_of
from test_nn_nf4_state import JSON, K, N, empty
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels as pk
from peft_kernels.formats.nf4_state import encode_json, from_state, to_state


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounded", [torch.float16, torch.bfloat16], ids=str)
def test_a_map_rounded_to_16_bits_means_the_exact_levels(rounded, stored, quant_type):
    state = make_state(shape=(N, K), quant_type=quant_type)
    levels = state["weight.quant_map"].to(rounded)
    cast = {**state, "weight.quant_map": levels.float() if stored == torch.float32 else levels}
    layer = empty()
    layer.load_state_dict(cast)
    assert torch.equal(layer.dequantize(torch.float32), values_of(state, "weight"))
    assert_same_states(layer.state_dict(), state)


@pytest.mark.parametrize("nested", [False, True])
def test_scales_of_any_sign_and_size_are_taken_as_they_are(nested):
    """Double quantisation itself makes negative ones; such a file decodes, in bitsandbytes too."""
    name = "weight.nested_absmax" if nested else "weight.absmax"
    state = make_state(shape=(N, K), nested=nested)
    state[name] = state[name] * torch.tensor([-1.0, 1e-38, -1e30, 0.0])[: state[name].numel()]
    layer = empty()
    layer.load_state_dict(state)
    assert torch.equal(layer.dequantize(torch.float32), values_of(state, "weight"))
    x = torch.eye(K)
    assert torch.equal(layer(x).t(), values_of(state, "weight"))


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_without_values_are_not_looked_at(nested):
    layer = pk.NF4Linear(K, N, bias=False, device="meta")
    state = make_state(shape=(N, K), nested=nested)
    meta = {key: tensor if key == JSON else tensor.to("meta") for key, tensor in state.items()}
    layer.load_state_dict(meta, assign=True)
    assert layer.absmax.is_meta and (layer.nested_absmax is not None) == nested
    with pytest.raises(RuntimeError, match="has no values"):
        layer.load_state_dict({key: tensor.to("meta") for key, tensor in state.items()}, assign=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: tensor if key == JSON else mode.from_tensor(tensor) for key, tensor in state.items()}
        other = pk.NF4Linear(K, N, bias=False)
        other.load_state_dict(fake, assign=True)
    assert (other.nested_absmax is not None) == nested


@pytest.mark.parametrize("offset", [None, 0.5, 1.1754943508222875e-38, -3.4028234663852886e38, 0.0008392334450036287])
def test_a_padded_text_is_as_long_for_every_offset_and_is_read(offset):
    stored = from_state("weight", {k.removeprefix("weight"): v for k, v in make_state(nested=True).items()})
    stored = replace(stored, offset=offset)
    plain, padded = encode_json(stored), encode_json(stored, padded=True)
    assert torch.equal(padded[: len(plain)], plain) and set(padded[len(plain) :].tolist()) <= {ord(" ")}
    assert len(padded) == len(encode_json(replace(stored, offset=1.0), padded=True))
    again = from_state("weight", {**to_state(stored), JSON.removeprefix("weight"): padded})
    assert again.offset == (offset or 0.0)
