"""Hugging Face models on fake tensors: attention without a mask, as it runs where no sequence is padded."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_NAME, _CHOICE = "peft_kernels_sdpa_unpadded", "_attn_implementation_internal"


@contextmanager
def unpadded(model: nn.Module) -> Iterator[None]:
    """Inside, the model's scaled_dot_product_attention takes no mask, but for a window that the sequence exceeds.

    transformers looks at the values of a padding mask, or of position ids, and leaves the mask out where nothing is
    padded or packed. Fake tensors have no values, and it makes a mask to be safe: k and v are then repeated for every
    query head, and kept.
    """
    transformers = sys.modules.get("transformers")
    configs = {id(c): c for c in (getattr(module, "config", None) for module in model.modules())}.values()
    changed = [config for config in configs if getattr(config, _CHOICE, None) == "sdpa"]
    if transformers is None or not changed:
        yield
        return
    with_mask = transformers.AttentionMaskInterface()["sdpa"]

    def mask(*args, local_size: int | None = None, **kwargs):
        windowed = local_size is not None and kwargs["kv_length"] >= local_size
        return with_mask(*args, local_size=local_size, **kwargs) if windowed else None

    transformers.AttentionInterface.register(_NAME, transformers.AttentionInterface()["sdpa"])
    transformers.AttentionMaskInterface.register(_NAME, mask)
    for config in changed:  # past the setter, which would change the configurations inside it too
        setattr(config, _CHOICE, _NAME)
    try:
        yield
    finally:
        for config in changed:
            setattr(config, _CHOICE, "sdpa")
