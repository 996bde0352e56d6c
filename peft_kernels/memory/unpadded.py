"""Hugging Face models on fake tensors: attention without a mask, as it runs where no sequence is padded."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_NAME = "peft_kernels_sdpa_unpadded"


@contextmanager
def unpadded(model: nn.Module) -> Iterator[None]:
    """Inside, the model's scaled_dot_product_attention takes no mask.

    transformers looks at the values of a padding mask, or of position ids, and leaves the mask out where nothing is
    padded or packed. Fake tensors have no values, and it makes a mask to be safe: k and v are then repeated for every
    query head, and kept.
    """
    transformers = sys.modules.get("transformers")
    configs = {id(c): c for c in (getattr(module, "config", None) for module in model.modules())}.values()
    changed = [config for config in configs if getattr(config, "_attn_implementation", None) == "sdpa"]
    if transformers is None or not changed:
        yield
        return
    transformers.AttentionInterface.register(_NAME, transformers.AttentionInterface()["sdpa"])
    transformers.AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    for config in changed:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"
