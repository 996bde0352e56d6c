"""Layers and models in 4 bits as the installed bitsandbytes and transformers make them."""

import pytest
import torch
from tiny_models import llama, transformers
from torch import nn

bnb = pytest.importorskip("bitsandbytes")
# Rows of whole blocks: over others, 0.50.2 reads wrong scales on a CPU with AVX512.
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def linear4bit(K=128, N=64, quant_type="nf4", nested=True, storage=torch.uint8, dtype=torch.bfloat16, bias=True):
    layer = bnb.nn.Linear4bit(
        K, N, bias=bias, quant_type=quant_type, compress_statistics=nested, quant_storage=storage, compute_dtype=dtype
    )
    return layer.to(dtype).to("cpu")  # quantised by this


def saved(folder, build=llama, dtype=torch.bfloat16) -> str:
    """A dense checkpoint on disk."""
    sizes = SIZES if build is llama else {}
    build(**sizes).to(dtype).save_pretrained(folder)
    return str(folder)


def loaded(folder: str, dtype=torch.bfloat16, auto=transformers.AutoModelForCausalLM, **settings) -> nn.Module:
    """As transformers quantises it; in train mode, where bitsandbytes does not pack it anew."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings)
    return auto.from_pretrained(folder, quantization_config=config, dtype=dtype).train()
