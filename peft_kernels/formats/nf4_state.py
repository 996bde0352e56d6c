"""A 4-bit weight as bitsandbytes lays it out in a state_dict: names, dtypes, shapes, and a JSON text in bytes.

| name, behind that of the weight | dtype | shape |
|---|---|---|
| (none) | uint8, or another dtype that the bytes are viewed as | [ceil(numel / 2) bytes, 1] |
| .absmax | fp32; uint8 with double quantisation | [blocks] |
| .quant_map | fp32 | [16], the levels |
| .nested_absmax, .nested_quant_map | fp32, with double quantisation | [ceil(blocks / 256)], [256] |
| .quant_state.bitsandbytes__nf4 (or __fp4) | uint8 | bytes of the JSON text, UTF-8 |

The deprecated layout is that of a transposed weight: [K, N] in the JSON, the bytes in a row [1, bytes].
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .nf4 import BLOCKSIZES, LEVELS, NESTED_BLOCKSIZE, NF4Weight

STATE = ".quant_state.bitsandbytes__"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_VECTORS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_OFFSET_DIGITS = 24  # of a 64-bit number written out, at most
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")


@dataclass(frozen=True)
class Stored:
    """A weight and what else its layout says."""

    weight: NF4Weight
    """Of the shape in the JSON, [K, N] where `transposed`."""
    offset: float | None
    """nested_offset as it stands in the JSON."""
    storage: torch.dtype = torch.uint8
    """What the bytes were viewed as."""
    transposed: bool = False


def quant_map(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [16]: the levels as bitsandbytes writes them, FP4's code 8 as +0."""
    return torch.tensor(LEVELS[quant_type], dtype=torch.float32, device=device) + 0.0


def is_part(key: str) -> bool:
    """Whether a name, cut off behind the weight's, is one that this layout has."""
    return key in ("", *_VECTORS) or key.startswith(".quant_state")


def encode_json(stored: Stored, padded: bool = False) -> Tensor:
    """uint8: bitsandbytes' text, byte for byte. Without an offset (on the meta device) there is a 0 in its place.

    padded: with spaces behind it, so that its length does not depend on the offset's digits.
    """
    weight = stored.weight
    fields: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.double_quant:
        fields.update(nested_blocksize=NESTED_BLOCKSIZE, nested_dtype="float32", nested_offset=stored.offset or 0.0)
    text = json.dumps(fields)
    if padded and weight.double_quant:
        text += " " * (_OFFSET_DIGITS - len(json.dumps(fields["nested_offset"])))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unpadded(key: str, tensor: Tensor) -> Tensor:
    """A state_dict's tensor as bitsandbytes writes it: its text without the spaces that `encode_json` may add."""
    if STATE not in key:
        return tensor
    return torch.frombuffer(bytearray(bytes(tensor.tolist()).rstrip()), dtype=torch.uint8)


def to_state(stored: Stored, padded: bool = False) -> dict[str, Tensor]:
    """Name behind the weight's -> tensor, in bitsandbytes' order.

    Args:
        padded: the text is as long for every offset, as torch.distributed.checkpoint asks, which reads in place.

    Raises:
        ValueError: the bytes are no whole number of `storage`'s.
    """
    weight = stored.weight
    packed = weight.packed
    if stored.storage != torch.uint8:
        if packed.numel() % stored.storage.itemsize:
            raise ValueError(f"{packed.numel()} bytes of packed weight cannot be viewed as {stored.storage}")
        packed = packed.view(stored.storage)
    state = {"": packed.unsqueeze(0 if stored.transposed else 1), ".absmax": weight.absmax}
    state[".quant_map"] = quant_map(weight.quant_type, weight.device)
    if weight.double_quant:
        state[".nested_absmax"], state[".nested_quant_map"] = weight.nested_absmax, weight.nested_code
    return {**state, STATE + weight.quant_type: encode_json(stored, padded)}


def _require(good: bool, key: str, problem: str) -> None:
    if not good:
        raise ValueError(f"{key} {problem}")


def _decode_json(key: str, tensor: Tensor) -> dict[str, Any]:
    _require(
        tensor.dtype == torch.uint8 and tensor.dim() == 1, key, f"is {tensor.dtype} {list(tensor.shape)}, not text"
    )
    _require(_readable(tensor), key, "has no values (on the meta device, or a fake tensor), and cannot be read")
    try:
        fields = json.loads(bytes(tensor.tolist()).decode())
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8
        raise ValueError(f"{key} is not JSON in UTF-8: {error}") from error
    _require(isinstance(fields, dict), key, f"holds {type(fields).__name__}, not an object")
    return fields


def _check_fields(key: str, fields: dict[str, Any]) -> None:
    nested = any(name in fields for name in _NESTED_FIELDS)
    expected = (*_FIELDS, *(_NESTED_FIELDS if nested else ()))
    for name in expected:
        _require(name in fields, key, f"lacks {name!r}")
    unknown = sorted(set(fields) - set(expected))
    _require(not unknown, key, f"holds unknown fields {unknown}")
    quant_type, shape = fields["quant_type"], fields["shape"]
    known = isinstance(quant_type, str) and quant_type in LEVELS and key.endswith(STATE + quant_type)
    _require(known, key, f"holds quant_type {quant_type!r}")
    blocksize = fields["blocksize"]
    _require(_whole(blocksize) and blocksize in BLOCKSIZES, key, f"holds blocksize {blocksize!r}")
    _require(isinstance(fields["dtype"], str) and fields["dtype"] in DTYPES, key, f"holds dtype {fields['dtype']!r}")
    fits = isinstance(shape, list) and len(shape) > 0 and all(_whole(size) and size >= 0 for size in shape)
    _require(shape is None or fits, key, f"holds shape {shape!r}")
    if nested:
        offset = fields["nested_offset"]
        number = isinstance(offset, int | float) and not isinstance(offset, bool)
        number = number and abs(offset) <= torch.finfo(torch.float32).max
        _require(number, key, f"holds nested_offset {offset!r}")
        for name, expected in (("nested_blocksize", NESTED_BLOCKSIZE), ("nested_dtype", "float32")):
            _require(fields[name] == expected, key, f"holds {name} {fields[name]!r}; expected {expected!r}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bytes(key: str, tensor: Tensor, shape: list[int]) -> tuple[Tensor, bool]:
    """(uint8 [bytes], whether they stand in a row)."""
    row = tensor.dim() == 2 and tensor.shape[0] == 1 != tensor.shape[1]
    length = -(-math.prod(shape) // 2)
    fits = tensor.dim() == 2 and 1 in tensor.shape and tensor.numel() * tensor.dtype.itemsize == length
    fits = fits and (tensor.dtype == torch.uint8 or tensor.dtype.is_floating_point)
    if not fits:
        raise ValueError(
            f"{key} is {tensor.dtype} {list(tensor.shape)}; expected {length} bytes in one column for shape {shape}"
        )
    flat = tensor.flatten().contiguous()
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8), row


def _vector(key: str, tensor: Tensor | None, dtype: torch.dtype, length: int) -> Tensor:
    _require(tensor is not None, key, "is missing")
    fits = tensor.dtype == dtype and tensor.shape == (length,)
    _require(fits, key, f"is {tensor.dtype} {list(tensor.shape)}; expected {dtype} [{length}]")
    _check_finite(key, tensor)
    return tensor.contiguous()


def _readable(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _check_map(key: str, tensor: Tensor, quant_type: str) -> None:
    """The levels, or what 16 bits make of them, as where buffers were cast: no kernel reads them there."""
    if not _readable(tensor):
        return
    found, levels = tensor.cpu().float(), quant_map(quant_type)
    rounded = (levels.to(dtype).float() for dtype in (torch.float32, torch.bfloat16, torch.float16))
    _require(any(map(found.equal, rounded)), key, f"holds other values than {quant_type}'s levels")


def _check_finite(key: str, tensor: Tensor) -> None:
    """Where it is sharded, each process looks at the part that it has."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    # The extremes are NaN or infinite where any value is, and need no temporary of the tensor's size.
    if own.numel() and own.is_floating_point() and _readable(own):
        _require(bool(torch.stack(own.aminmax()).isfinite().all()), key, "holds NaN or an infinity, which no scale is")


def from_state(name: str, state: dict[str, Tensor], shape: tuple[int, ...] | None = None) -> Stored:
    """The weight that stands in a state_dict under `name`; its tensors are those of the dict where they can be.

    Scales may be negative, which double quantisation makes of the smallest ones, and of any size; a map may be the
    levels rounded to 16 bits, which mean the exact ones, as in bitsandbytes.

    Args:
        name: of the weight, for errors.
        state: what stands behind the name -> tensor, as `to_state` gives it.
        shape: of the weight, for a JSON text that holds none.

    Raises:
        ValueError: a key that is missing or unknown, a tensor or a field that does not fit, NaN or an infinity among
            the scales (where there are values to look at), with the key.
    """
    for key, tensor in state.items():
        _require(is_part(key), name + key, "is no part of a 4-bit weight")
        _require(isinstance(tensor, Tensor), name + key, f"is {type(tensor).__name__}, not a tensor")
    texts = [key for key in state if key.startswith(".quant_state")]
    _require(bool(texts), f"{name}{STATE}nf4 (or __fp4)", "is missing")
    _require(len(texts) == 1, name + texts[-1], f"stands beside {name}{texts[0]}; expected one of them")
    key = name + texts[0]
    fields = _decode_json(key, state[texts[0]])
    _check_fields(key, fields)
    shape = fields["shape"] or shape
    _require(shape is not None, key, "holds no shape")
    _require("" in state, name, "is missing")
    packed, row = _bytes(name, state[""], list(shape))
    quant_type, nested = fields["quant_type"], "nested_offset" in fields
    blocks = -(-math.prod(shape) // fields["blocksize"])
    vectors = [_vector(name + ".absmax", state.get(".absmax"), torch.uint8 if nested else torch.float32, blocks)]
    levels, key = state.get(".quant_map"), name + ".quant_map"
    cast = levels is not None and levels.dtype in (torch.bfloat16, torch.float16)
    _check_map(key, _vector(key, levels, levels.dtype if cast else torch.float32, 16), quant_type)
    for key, length in ((".nested_absmax", -(-blocks // NESTED_BLOCKSIZE)), (".nested_quant_map", 256)):
        if nested:
            vectors.append(_vector(name + key, state.get(key), torch.float32, length))
        else:
            _require(key not in state, name + key, "stands there without nested_offset")
    offset = float(fields["nested_offset"]) if nested else None
    vectors += [torch.tensor([offset], dtype=torch.float32, device=packed.device)] if nested else [None, None, None]
    weight = NF4Weight(packed, *vectors, tuple(shape), DTYPES[fields["dtype"]], quant_type, fields["blocksize"])
    return Stored(weight, offset, state[""].dtype, row)
