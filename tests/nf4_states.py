"""4-bit weights in bitsandbytes' layout, made here by hand from the format's description and not by any package."""

import json
import struct

import torch

LEVELS = {
    "nf4": "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 "
    "0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0",
    "fp4": "0 0.005208333333333333 0.6666666666666666 1 0.3333333333333333 0.5 0.16666666666666666 0.25 "
    "0 -0.005208333333333333 -0.6666666666666666 -1 -0.3333333333333333 -0.5 -0.16666666666666666 -0.25",
}


def single(value: float) -> float:
    """Rounded to fp32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def levels(quant_type: str) -> list[float]:
    return [single(float(word)) for word in LEVELS[quant_type].split()]


def values_of(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """fp32, in the JSON text's shape: one element after another, by plain Python arithmetic."""
    key = next(key for key in state if key.startswith(f"{name}.quant_state"))
    fields = json.loads(bytes(state[key].tolist()))
    packed = state[name].flatten().view(torch.uint8).tolist()
    absmax = state[f"{name}.absmax"].tolist()
    if "nested_offset" in fields:
        code, outer = state[f"{name}.nested_quant_map"].tolist(), state[f"{name}.nested_absmax"].tolist()
        offset = single(fields["nested_offset"])
        absmax = [single(single(code[a] * outer[i // 256]) + offset) for i, a in enumerate(absmax)]
    table, found = levels(fields["quant_type"]), []
    numel = torch.Size(fields["shape"]).numel()
    for i in range(numel):
        code = packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15
        found.append(single(table[code] * absmax[i // fields["blocksize"]]))
    return torch.tensor(found).view(fields["shape"])


def make_state(
    name: str = "weight",
    shape: tuple[int, int] = (6, 40),
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    dtype: str = "bfloat16",
    storage: torch.dtype = torch.uint8,
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """Random bytes, which are as good as any others, under the names of the format."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    packed = torch.randint(256, (-(-numel // 2),), dtype=torch.uint8).view(storage)
    fields = {"quant_type": quant_type, "blocksize": blocksize, "dtype": dtype, "shape": list(shape)}
    state = {"": packed.view(1, -1) if transposed else packed.view(-1, 1), ".absmax": torch.rand(blocks) + 0.5}
    state[".quant_map"] = torch.tensor(levels(quant_type))
    if nested:
        state[".absmax"] = torch.randint(256, (blocks,), dtype=torch.uint8)
        state[".nested_absmax"] = torch.rand(-(-blocks // 256)) + 0.5
        state[".nested_quant_map"] = torch.linspace(-1, 1, 256)
        fields |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": single(1.7)}
    state[f".quant_state.bitsandbytes__{quant_type}"] = text(fields)
    return {name + key: value for key, value in state.items()}


def text(fields: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def edited(state: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    """`state` with fields of the JSON text replaced, or taken out where the new value is `...`."""
    key = next(key for key in state if ".quant_state" in key)
    fields = json.loads(bytes(state[key].tolist())) | changes
    return {**state, key: text({name: value for name, value in fields.items() if value is not ...})}


def assert_same_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        own, other = (value.contiguous().flatten().view(torch.uint8) for value in (found[key], tensor))
        assert torch.equal(own, other), key
