"""The demo's parts: a clean split, loss on answers only, exact bytes, and fused equal to PEFT in training."""

import io
import tarfile

import pytest
import torch
from torch import nn

from benchmarks import finetune, footprint, sentiment

transformers = pytest.importorskip("transformers", reason="the demo fine-tunes a transformers model")


class CharTokenizer:
    """One token per character, with the chat template's shape: enough to see which positions are trained on."""

    eos_token_id = pad_token_id = 2

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"<{messages[0]['content']}>"

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [3 + ord(c) % 61 for c in text]}


def encoded(*pairs: tuple[str, str]) -> list[finetune.Example]:
    return [finetune.encode(CharTokenizer(), text, label) for text, label in pairs]


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def package_of(lines: list[str], path) -> None:
    """A source package with the layout of the real one and these lines as its table."""

    def tar_of(name: str, data: bytes) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        return file.getvalue()

    path.write_bytes(tar_of(sentiment.INNER, tar_of(sentiment.TABLE, "\r\n".join(lines).encode())))


def test_split_holds_out_by_id_and_drops_repeats_and_the_undecided(tmp_path):
    rows = [
        "1\t2.0\tGood",
        "2\t-1.5\tBad,\u2028bad",
        "5\t0.51\tFine",
        "10\t-0.5\tSo so",
        "15\t3.0\tGOOD !",
        "16\t1.0\tFine.",
    ]
    package_of(rows, tmp_path / "package.tar.gz")
    snippets = sentiment.read_table(tmp_path / "package.tar.gz")
    assert [s.id for s in snippets] == [1, 2, 5, 10, 15, 16]
    train, held_out = sentiment.split(snippets)
    assert [(s.id, s.label) for s in train] == [(1, "positive"), (2, "negative")]
    assert [(s.id, s.label) for s in held_out] == [(5, "positive")]
    assert sentiment.split(snippets[::-1]) == (train, held_out)


def test_a_wrong_package_is_refused(tmp_path):
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="sha256"):
        sentiment.fetch(tmp_path)


def test_real_split():
    if not (sentiment.CACHE / "vaderSentiment-3.3.2.tar.gz").exists():
        pytest.skip("the snippets are not in .cache: `make test` fetches them, `make gpu` has no network")
    train, held_out = sentiment.load_split()
    words = [{" ".join(s.text.lower().split()) for s in part} for part in (train, held_out)]
    assert not words[0] & words[1]
    assert not {s.id for s in train} & {s.id for s in held_out}
    assert len(train) > 4 * 1900 and len(held_out) >= 400
    for part in (train, held_out):
        positive = sum(s.label == "positive" for s in part) / len(part)
        assert 0.45 < positive < 0.55, "about half of each side must be positive, or accuracy says little"


def test_only_answers_carry_labels():
    batch = finetune.collate(encoded(("ok", "positive"), ("rather too long", "negative")), pad_id=2)
    for row, label in enumerate(("positive", "negative")):
        answer = finetune.encode(CharTokenizer(), "", label).answer
        assert answer[-1] == CharTokenizer.eos_token_id
        assert batch.labels[row].tolist() == [finetune.IGNORED] * (batch.labels.shape[1] - len(answer)) + answer
        assert batch.input_ids[row, -len(answer) :].tolist() == answer
    pad = int((batch.attention_mask[0] == 0).sum())
    assert pad == len("rather too long") - len("ok")
    assert batch.position_ids[0, pad:].tolist() == list(range(batch.labels.shape[1] - pad))


def test_loss_is_the_mean_over_answer_tokens_whatever_the_padding():
    model = tiny_llama(torch.float64).eval()
    examples = encoded(("ok", "positive"), ("rather too long", "negative"))
    examples[0] = examples[0]._replace(answer=examples[0].answer[:3])  # answers of different lengths
    terms = []
    for e in examples:
        ids = torch.tensor([e.prompt + e.answer])
        logp = model(ids).logits[0].float().log_softmax(-1)
        terms += [-logp[len(e.prompt) + i - 1, token] for i, token in enumerate(e.answer)]
    loss = finetune.answer_loss(model, finetune.collate(examples, pad_id=2))
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_predictions_keep_the_order_of_the_examples():
    model = tiny_llama().eval()
    texts = ["x" * n for n in (9, 1, 30, 4, 17)]
    examples = encoded(*((t, finetune.LABELS[i % 2]) for i, t in enumerate(texts)))
    one_by_one = [finetune.predict(model, [e, *encoded(("", "positive"), ("", "negative"))], 2, 1)[0] for e in examples]
    seen = []
    assert finetune.predict(model, examples, 2, 2, on_batch=seen.append) == one_by_one
    assert seen == [2, 2, 1]
    assert finetune.accuracy(one_by_one, examples) == sum(
        p == e.label for p, e in zip(one_by_one, examples, strict=True)
    ) / len(examples)


def test_schedule_uses_everything_before_it_repeats():
    examples = encoded(*((str(i), "positive") for i in range(10)))
    batches = finetune.schedule(examples, steps=5, batch=4, seed=1)
    flat = [e for b in batches for e in b]
    assert [len(b) for b in batches] == [4] * 5
    assert sorted(flat[:10]) == sorted(flat[10:]) == sorted(examples)
    assert flat == [e for b in finetune.schedule(examples, 5, 4, seed=1) for e in b]
    assert flat != [e for b in finetune.schedule(examples, 5, 4, seed=2) for e in b]


def test_footprint_counts_every_kind_exactly():
    M, K, H = 5, 8, 12
    model = nn.Sequential(nn.Linear(K, H, bias=False), nn.ReLU(), nn.Linear(H, K, bias=False))
    model[2].requires_grad_(False)
    x = torch.randn(M, K)
    before = [p.clone() for p in model.parameters()]
    found = footprint.measure(model, lambda: model(x).sum())
    trained = 4 * K * H
    assert found.weights == 2 * trained
    assert found.gradients == trained
    assert found.optimizer == 2 * trained + 4  # two moments and the step count
    assert found.saved == 4 * (
        M * K + M * H
    )  # x for the first weight's gradient, the ReLU's output; the sum needs none
    assert found.total == sum(found)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_footprint_counts_a_shared_storage_once():
    x = torch.randn(6, 4, requires_grad=True)
    with footprint.SavedForBackward([]) as saved:
        y = x.exp()
        (y.t() * y.t()).sum()
    assert saved.bytes == 6 * 4 * 4
    assert footprint.storage_bytes([x, x.t(), x[1:]]) == 6 * 4 * 4


def test_fused_and_peft_training_give_the_same_losses():
    pytest.importorskip("peft", reason="the demo trains PEFT's layers beside ours")
    from benchmarks import models

    base = tiny_llama(torch.float64)
    reference = models.with_peft(base, rank=3, seed=0)
    adapted = {"peft": reference, "fused": models.with_fused(base, 3, reference)}
    assert any(p.requires_grad for p in adapted["fused"].parameters())
    runs = {name: finetune.start_run(model, lr=1e-2) for name, model in adapted.items()}
    examples = encoded(*((f"snippet {i}", finetune.LABELS[i % 2]) for i in range(8)))
    batches = [finetune.collate(b, pad_id=2) for b in finetune.schedule(examples, steps=3, batch=4, seed=0)]
    seen = []
    finetune.train(runs, batches, seen.append)
    assert len(seen) == 3 and seen[2]["peft"] < seen[0]["peft"]
    peft_losses, fused_losses = (torch.tensor(runs[name].losses) for name in ("peft", "fused"))
    torch.testing.assert_close(fused_losses, peft_losses)
