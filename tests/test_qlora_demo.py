"""The QLoRA demo's parts on a tiny Llama: the peer on the same bytes has the same losses; bytes are counted once."""

import pytest
import torch
from test_demo import encoded, transformers

from benchmarks import finetune, footprint

pytest.importorskip("peft", reason="the demo's adapters begin as HF PEFT's: pip install peft")
pytest.importorskip("bitsandbytes", reason="the peer is PEFT over bitsandbytes: pip install bitsandbytes")

from benchmarks import qlora_demo  # noqa: E402


def _adapted() -> dict[str, torch.nn.Module]:
    """Widths of whole blocks: bitsandbytes 0.50.2 dequantises other rows wrongly on a CPU with AVX-512."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    return qlora_demo.adapt(base, rank=4, seed=0, dtype=torch.float32, with_peer=True)


def test_the_peer_on_the_same_bytes_has_the_same_losses():
    """In fp32 two right implementations stay within rounding of each other; the 16-bit base is another function."""
    examples = encoded(*((f"film {i}", ("positive", "negative")[i % 2]) for i in range(16)))
    batches = [finetune.collate(batch, 2) for batch in finetune.schedule(examples, 6, 4, seed=0)]
    runs = {name: finetune.start_run(model, 1e-2) for name, model in _adapted().items()}
    finetune.train(runs, batches, lambda losses: None)
    ours, peer, dense = (runs[name].losses for name in (qlora_demo.QLORA, qlora_demo.PEFT, qlora_demo.LORA))
    # Adam divides by the square root of a gradient's square: relative errors stay, and six steps hardly add to them.
    close = torch.finfo(torch.float32).eps ** 0.5
    assert all(abs(a - b) <= close * b for a, b in zip(ours, peer, strict=True)), (ours, peer)
    assert max(abs(a - b) for a, b in zip(ours, dense, strict=True)) > 2 * close * max(ours)
    assert ours[-1] < ours[0]


def test_frozen_bytes_are_those_of_the_format():
    """4 bits an element, a byte for 64, four for 16,384, and the nested code and offset of each layer."""
    adapted = _adapted()
    config = adapted[qlora_demo.LORA].config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    sizes = [hidden * hidden] * 2 + [hidden * kv] * 2 + [hidden * inner] * 3
    dense = qlora_demo.base_bytes(adapted[qlora_demo.LORA])
    assert dense["linear layers"] == layers * 4 * sum(sizes)
    small = qlora_demo.base_bytes(adapted[qlora_demo.QLORA])
    blocks = [-(-n // 64) for n in sizes]
    each = [n // 2 + b + 4 * -(-b // 256) + 4 * 256 + 4 for n, b in zip(sizes, blocks, strict=True)]
    assert small["linear layers"] == layers * sum(each)
    peer = qlora_demo.base_bytes(adapted[qlora_demo.PEFT])
    assert peer["linear layers"] - small["linear layers"] <= 7 * layers * 4 * 16, "bitsandbytes keeps the 16 levels too"
    assert dense["rest"] == small["rest"] == peer["rest"]
    batch = finetune.collate(encoded(("film", "positive")), 2)
    mine, theirs = (
        footprint.measure(adapted[name], lambda model=adapted[name]: finetune.answer_loss(model, batch)).weights
        for name in (qlora_demo.QLORA, qlora_demo.PEFT)
    )
    assert theirs - mine == peer["linear layers"] - small["linear layers"], "both with their scales"
