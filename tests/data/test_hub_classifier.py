"""The hook for Hugging Face's classifiers, against calls of transformers, on a small model made here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gristmill.data.filters.hub_classifier import HubClassifierConfig, check_hub_classifier, rule_files
from gristmill.data.filters.rule import Prepared

LONG = "a cat sat on the mat and saw a dog run far away from the house " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 20 thousand random weights with three labels, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(LONG.split())]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    raw.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("model")
    marks = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **marks).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        id2label={0: "bad", 1: "plain", 2: "good"},
        label2id={"bad": 0, "plain": 1, "good": 2},
    )
    net = BertForSequenceClassification(config)
    with torch.no_grad():
        net.classifier.weight.mul_(40)  # scores apart from each other
    net.save_pretrained(folder)
    return folder


def direct(folder: Path, text: str):
    """Logits of a text that fits one window, straight from transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return net(**tokenizer(text, return_tensors="pt")).logits[0].double(), len(tokenizer(text)["input_ids"])


def judged(text: str, folder: Path, **fields):
    config = HubClassifierConfig.model_validate({"model": str(folder), **fields})
    row = {"text": text, "id": "a", "metadata": {}}
    return config.rule(exact=True).judge(Prepared(row, text, None))  # type: ignore[arg-type]


def test_scores_are_those_of_transformers(model: Path) -> None:
    for text in ("a cat sat on the mat", "the dog saw a house", "far away"):
        logits, _ = direct(model, text)
        assert judged(text, model).values["hub_classifier"] == pytest.approx(float(logits.softmax(0)[2]), abs=1e-6)
        named = judged(text, model, label="bad", name="toxic")
        assert named.values["toxic"] == pytest.approx(float(logits.softmax(0)[0]), abs=1e-6)
        assert named.metadata == {"toxic": round(named.values["toxic"], 4)}
        sigmoid = judged(text, model, label=1, score="sigmoid")
        assert sigmoid.values["hub_classifier"] == pytest.approx(float(logits[1].sigmoid()), abs=1e-6)
        value = judged(text, model, label=1, score="value", scale=5)
        assert value.values["hub_classifier"] == pytest.approx(float(logits[1]) / 5, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_long_texts_are_read_in_windows(model: Path, batch: int) -> None:
    """Windows of 30 words between the two marks, and no more of them than asked for; padding changes no score."""
    words = LONG.split()
    parts = [direct(model, " ".join(words[i : i + 30])) for i in range(0, 180, 30)]
    for most in (1, 3, 6):
        own = parts[:most]
        expected = sum(float(x.softmax(0)[2]) * n for x, n in own) / sum(n for _, n in own)
        got = judged(LONG, model, window=32, most_windows=most, batch=batch).values["hub_classifier"]
        assert got == pytest.approx(expected, abs=1e-5)


def test_bounds(model: Path) -> None:
    score = judged("a cat", model).values["hub_classifier"]
    assert judged("a cat", model, least_score=score - 0.01, most_score=score + 0.01).reason == ""
    assert judged("a cat", model, least_score=score + 0.01).reason == "hub_classifier: too low"
    assert judged("a cat", model, most_score=score - 0.01, name="toxic").reason == "toxic: too high"


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    check_hub_classifier(HubClassifierConfig(model=str(model)))
    check_hub_classifier(HubClassifierConfig(model="owner/name", revision="a" * 40))
    assert {Path(f).name for f in rule_files(HubClassifierConfig(model=str(model)))} >= {
        "config.json",
        "model.safetensors",
    }
    for fields, said in (
        ({"model": "owner/name"}, "name a commit"),
        ({"model": "owner/name", "revision": "main"}, "name a commit"),
        ({"model": "./nowhere"}, "is no folder and no hub name"),
        ({"model": str(tmp_path)}, "holds no model"),
    ):
        with pytest.raises(ValueError, match=said):
            check_hub_classifier(HubClassifierConfig.model_validate(fields))
    with pytest.raises(ValueError, match="has no label 'fine', but bad, plain, good"):
        judged("a", model, label="fine")
    with pytest.raises(ValueError, match="nothing would stay"):
        HubClassifierConfig(model="m", least_score=0.6, most_score=0.5)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be loaded"):
        judged("a", tmp_path)


def test_torch_is_not_imported_with_the_module() -> None:
    import subprocess

    code = "import sys, gristmill.data.filters.hub_classifier; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
