"""Named models as architectures: their configuration and nothing of their weights, for a look at any size."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import BertConfig, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config


@dataclass(frozen=True)
class Architecture:
    """A model's code and sizes. `nominal`: the parameters in its name, where people reckon with that number."""

    name: str
    config: PretrainedConfig
    nominal: float | None = None
    classifier: bool = False  # labels are one per sequence, not one per token

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The model with random weights (where tensors are fake: with none)."""
        kind = transformers.AutoModelForSequenceClassification if self.classifier else transformers.AutoModelForCausalLM
        return kind.from_config(self.config, dtype=dtype)

    def batch(self, size: int, length: int) -> dict[str, Tensor]:
        """Token ids and labels, without padding.

        Raises:
            ValueError: sizes that the model or a tensor cannot have.
        """
        if size < 1 or length < 1:
            raise ValueError(f"batch {size} x {length}: expected at least 1 x 1")
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest and length > longest:
            raise ValueError(f"seq is {length}, but {self.name} has positions for {longest} tokens at most")
        values = size * length * max(self.config.vocab_size, self.config.hidden_size)
        if values * 4 >= 2**63:
            raise ValueError(f"batch {size} x {length} overflows: its logits would have {values:.1e} values")
        ids = torch.zeros(size, length, dtype=torch.long)
        return {"input_ids": ids, "labels": torch.zeros(size, dtype=torch.long) if self.classifier else ids}


def _llama(*, hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        **{"max_position_embeddings": 8192, "tie_word_embeddings": False, "use_cache": False, **more},
    )


def _llama2_7b() -> LlamaConfig:
    sizes = {"hidden": 4096, "inner": 11008, "layers": 32, "heads": 32, "groups": 32, "vocabulary": 32000}
    return _llama(**sizes, max_position_embeddings=4096)


def _llama3_8b() -> LlamaConfig:
    return _llama(hidden=4096, inner=14336, layers=32, heads=32, groups=8, vocabulary=128256)


def _llama3_70b() -> LlamaConfig:
    return _llama(hidden=8192, inner=28672, layers=80, heads=64, groups=8, vocabulary=128256)


def _smollm2() -> LlamaConfig:
    sizes = {"hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "groups": 3, "vocabulary": 49152}
    return _llama(**sizes, tie_word_embeddings=True)


def _mistral_7b() -> MistralConfig:
    return MistralConfig(vocab_size=32768, sliding_window=None, max_position_embeddings=32768, use_cache=False)


def _qwen_7b() -> Qwen2Config:
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    return Qwen2Config(
        **sizes, num_key_value_heads=4, vocab_size=152064, max_position_embeddings=131072, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip


def _gemma_9b() -> Gemma2Config:
    sizes = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
    return Gemma2Config(**sizes, num_key_value_heads=8, head_dim=256, vocab_size=256000, use_cache=False)


def _gpt3() -> GPT2Config:
    return GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048, use_cache=False)


def _minilm() -> BertConfig:
    return BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def _bert_large() -> BertConfig:
    return BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def _gpt2() -> GPT2Config:
    return GPT2Config(use_cache=False)


# name -> (configuration, nominal parameters, classifier)
_NAMED: dict[str, tuple[Callable[[], PretrainedConfig], float | None, bool]] = {
    "llama-2-7b": (_llama2_7b, 7e9, False),
    "llama-3-8b": (_llama3_8b, 8e9, False),
    "llama-3-70b": (_llama3_70b, 70e9, False),
    "mistral-7b": (_mistral_7b, 7e9, False),
    "qwen2.5-7b": (_qwen_7b, 7e9, False),
    "gemma-2-9b": (_gemma_9b, 9e9, False),
    "gpt3-175b": (_gpt3, 175e9, False),
    "smollm2-135m": (_smollm2, None, False),
    "minilm-l6": (_minilm, None, True),
    "bert-base": (BertConfig, None, True),
    "bert-large": (_bert_large, None, True),
    "gpt2": (_gpt2, None, False),
}

NAMES = tuple(_NAMED)


def one_line(error: BaseException) -> str:
    """What an error says, or its type where it says nothing, in one line of a table."""
    words = " ".join(str(error).split())
    return (words[:200] + "..." if len(words) > 200 else words) or type(error).__name__


def find(name: str) -> Architecture:
    """A model by name, or by the path of a Hugging Face config.json.

    Raises:
        ValueError: neither a known name nor such a file, or a model that does not read and predict text.
    """
    if name in _NAMED:
        config, nominal, classifier = _NAMED[name]
        return Architecture(name, config(), nominal, classifier)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"model {name!r} is no file; expected the path of a config.json or one of {', '.join(NAMES)}")
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"model {name!r} is not a config.json that transformers knows: {one_line(error)}") from error
    config.use_cache = False
    classifier = "ForSequenceClassification" in str(config.architectures)
    purpose = "SEQUENCE_CLASSIFICATION" if classifier else "CAUSAL_LM"
    known = getattr(transformers, f"MODEL_FOR_{purpose}_MAPPING")
    sized = all(isinstance(getattr(config, size, None), int) for size in ("vocab_size", "hidden_size"))
    if type(config) not in known or config.is_encoder_decoder or not sized:
        raise ValueError(
            f"model {name!r} is a {config.model_type}; expected a decoder of text (a causal language model) or "
            "an encoder that classifies sequences"
        )
    return Architecture(path.parent.name or name, config, None, classifier)
