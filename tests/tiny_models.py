"""Tiny transformers models from configs, no download: Llama, GPT-2 (Conv1D), BERT; and nested Sequentials."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")


def llama(**changes) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=3, **{**sizes, **changes})
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **sizes))


def nested() -> nn.Module:
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(inner, nn.Linear(6, 6)), copy.deepcopy(inner), nn.Linear(6, 2))


def ids(vocabulary: int = 40) -> torch.Tensor:
    return torch.randint(vocabulary, (2, 7))


def outputs(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model.eval()(tokens).logits.detach()


def train_a_little(model: nn.Module) -> None:
    """As training would: every parameter that trains moves by something of order 0.3."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
