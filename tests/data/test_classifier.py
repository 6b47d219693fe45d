"""The quality classifier: separates, is calibrated, is the same each time, and agrees with plain implementations."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from gristmill.data.documents import read_rows, shards
from gristmill.data.filters import FilterConfig, check_filters, filter_documents
from gristmill.data.filters import rule_files as rule_files_of_filter
from gristmill.data.filters.calibration import auc, calibration_error, deciles, platt
from gristmill.data.filters.classifier import QualityConfig, check_quality, resolve, rule_files
from gristmill.data.filters.classifier_training import train, train_classifier
from gristmill.data.filters.linear_classifier import Classifier
from gristmill.data.filters.rule import Prepared
from gristmill.data.stage_types import silent


def texts_of(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def judged(config: QualityConfig, text: str):
    row = {"text": text, "id": "a", "metadata": {}}
    return config.rule(exact=True).judge(Prepared(row, text, None))  # type: ignore[arg-type]


def shuffled(text: str, rng: random.Random) -> str:
    """The same words in no order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> dict[str, list[str]]:
    """Excerpts of WikiText and PEPs, PEPs with shuffled words, and Python sources, as a user would lay them out."""
    root, rng = tmp_path_factory.mktemp("examples"), random.Random(0)
    peps = [t[i : i + 1500] for t in texts_of(shared_data / "corpus" / "peps.jsonl.gz")[:250] for i in (2000, 6000)]
    peps = [t for t in peps if len(t) == 1500]
    wiki = [t[i : i + 1500] for t in texts_of(shared_data / "corpus" / "wikitext2.jsonl.gz") for i in (0, 3000, 6000)]
    stdlib = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:160]
    for number, text in enumerate(t for t in wiki if len(t) == 1500):
        (root / "wiki").mkdir(exist_ok=True)
        (root / "wiki" / f"{number}.txt").write_text(text)
    for name, rows in (("peps", peps), ("shuffled", [shuffled(t, rng) for t in peps])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    return {
        "wiki": [str(root / "wiki")],
        "code": [str(p) for p in stdlib],
        "peps": [str(root / "peps.jsonl")],
        "shuffled": [str(root / "shuffled.jsonl")],
    }


def test_prose_and_code(folders: dict[str, list[str]], tmp_path: Path) -> None:
    """Easy: WikiText against the standard library."""
    config = QualityConfig(positive=folders["wiki"], negative=folders["code"], least_score=0.5)
    report = train_classifier(config, tmp_path / "model")
    print(report)
    assert report["auc"] > 0.99
    assert report["calibration_error"] < 0.1
    assert len(report["deciles"]) == 10
    again = config.model_copy(update={"positive": [], "negative": [], "model": str(tmp_path / "model")})
    prose, code = (
        "The river rises in the hills north of the old town and flows east.",
        "def f(self):\n    return self.x[0]",
    )
    for own in (config, again):
        kept = judged(own, prose)
        assert not kept.reason
        assert kept.metadata["quality"] == round(kept.values["quality"], 4) > 0.5
        gone = judged(own, code)
        assert gone.reason == "quality: below threshold"
        assert gone.values["quality"] < 0.5


def test_a_model_that_is_trained_anew_is_loaded_anew(folders: dict[str, list[str]], tmp_path: Path) -> None:
    text, scores = Path(folders["code"][0]).read_text(encoding="utf-8", errors="replace"), []
    for good, bad in (("wiki", "code"), ("code", "wiki")):
        train_classifier(QualityConfig(positive=folders[good], negative=folders[bad], bits=12), tmp_path / "model")
        scores.append(judged(QualityConfig(model=str(tmp_path / "model")), text).values["quality"])
    assert scores[0] < 0.5 < scores[1]


def test_examples_without_words_and_no_examples_are_refused(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        rows = [json.dumps({"text": mark * n}) for n in range(1, 31) for mark in "-"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    config = QualityConfig(positive=[str(tmp_path / "good.jsonl")], negative=[str(tmp_path / "bad.jsonl")])
    with pytest.raises(ValueError, match="no word in any example"):
        train(config)
    with pytest.raises(ValueError, match="no good examples are named"):
        train(QualityConfig(model="x"))


def plain_features(text: str) -> Counter:
    words = text.lower().split()
    return Counter([*words, *pairwise(words)])


def reference_auc(texts: list[str], labels: np.ndarray, training: np.ndarray) -> float:
    """Logistic regression written plainly: exact n-grams of str.split, dense, whole gradients with momentum."""
    counts = [plain_features(t) for t in texts]
    common = Counter(f for c, t in zip(counts, training, strict=True) if t for f in c)
    index = {f: i for i, (f, n) in enumerate(common.most_common(8_000)) if n > 1}
    x = np.zeros((len(texts), len(index)), np.float32)
    for row, count in enumerate(counts):
        for feature, number in count.items():
            if feature in index:
                x[row, index[feature]] = np.log1p(number)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    own, target = x[training], labels[training]
    weights, speed = np.zeros(len(index), np.float32), np.zeros(len(index), np.float32)
    for _ in range(80):
        chance = 1 / (1 + np.exp(-(own @ weights)))
        speed = 0.9 * speed - 5.0 * (own.T @ (chance - target) / len(target) + 1e-5 * weights)
        weights = weights + speed
    return auc(x[~training] @ weights, labels[~training])


def test_as_good_as_a_plain_implementation(folders: dict[str, list[str]]) -> None:
    """Hard: PEPs against the same PEPs with their words shuffled, which pairs of words alone can tell."""
    config = QualityConfig(positive=folders["peps"], negative=folders["shuffled"])
    ours = train(config)
    texts = [
        json.loads(line)["text"]
        for name in ("peps", "shuffled")
        for line in Path(folders[name][0]).read_text().splitlines()
    ]
    labels = np.array([1] * (len(texts) // 2) + [0] * (len(texts) // 2))
    training = np.random.default_rng(1).random(len(texts)) < 0.7
    theirs = reference_auc(texts, labels, training)
    print(f"auc {ours.about['report']['auc']}, of a plain implementation {theirs:.4f}", ours.about["report"])
    # about 150 held-out examples: the standard error of an AUC of 0.95 is near 0.02
    assert ours.about["report"]["auc"] > max(0.85, theirs - 0.04)
    assert ours.about["report"]["calibration_error"] < 0.15


def test_training_gives_the_same_bytes(folders: dict[str, list[str]], tmp_path: Path, bytes_of: Callable) -> None:
    """In another process, with another hash seed, and with the files named in another order."""
    config = QualityConfig(positive=folders["wiki"], negative=folders["code"], bits=12)
    train_classifier(config, tmp_path / "a")
    other = config.model_copy(update={"negative": folders["code"][::-1]})
    code = (
        "import sys; from pathlib import Path; from gristmill.data import *\n"
        "train_classifier(QualityConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-P", "-c", code, other.model_dump_json(), str(tmp_path / "b")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_share_becomes_a_score(folders: dict[str, list[str]], tmp_path: Path, laid_out: Callable[..., Path]) -> None:
    texts = [json.loads(line)["text"] for line in Path(folders["peps"][0]).read_text().splitlines()]
    rows = [{"text": t, "id": str(i), "metadata": {"source": "p", "kind": "prose"}} for i, t in enumerate(texts)]
    rows += [{"text": "x = 1", "id": "c", "metadata": {"source": "p", "kind": "code"}}] * 50
    documents = shards(laid_out(tmp_path / "in", rows, 150))
    config = QualityConfig(positive=folders["wiki"], negative=folders["code"], keep_share=0.3, bits=14)
    with pytest.raises(ValueError, match="keep_share needs the documents"):
        config.rule(exact=True)
    resolved = resolve(config, documents, tmp_path / "out", "prose")
    assert resolved.keep_share is None
    assert resolved.model == str(tmp_path / "out")
    kept = [t for t in texts if not judged(resolved, t).reason]
    assert abs(len(kept) / len(texts) - 0.3) < 0.01
    assert resolve(config, documents, tmp_path / "out", "prose") == resolved


def test_measures_against_their_definitions() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.4).astype(float)
    margins = np.round(labels * 1.5 + rng.normal(size=300), 1)
    pairs = [(a > b) + 0.5 * (a == b) for a in margins[labels == 1] for b in margins[labels == 0]]
    assert auc(margins, labels) == pytest.approx(np.mean(pairs))
    slope, offset = platt(margins, labels)
    good, bad = labels.sum(), (1 - labels).sum()
    targets = np.where(labels == 1, (good + 1) / (good + 2), 1 / (bad + 2))

    def loss(a: float, b: float) -> float:
        chance = 1 / (1 + np.exp(-(a * margins + b)))
        return float(-(targets * np.log(chance) + (1 - targets) * np.log(1 - chance)).sum())

    best = loss(slope, offset)
    assert all(loss(slope + da, offset + db) >= best for da in (-0.01, 0, 0.01) for db in (-0.01, 0, 0.01))
    assert platt(np.array([-1.0] * 10 + [1.0] * 10), np.array([0.0] * 10 + [1.0] * 10))[0] < 10  # finite, though apart
    scores = 1 / (1 + np.exp(-(slope * margins + offset)))
    by_hand = sum(
        abs(scores[i].mean() - labels[i].mean()) * i.sum() / 300
        for i in ((scores >= k / 10) & (scores < (k + 1) / 10) for k in range(10))
        if i.any()
    )
    assert calibration_error(scores, labels) == pytest.approx(by_hand)
    table = deciles(scores, labels)
    assert sum(row["examples"] for row in table) == 300
    assert all(a["to"] <= b["from"] for a, b in pairwise(table))


def test_bad_examples_and_models_are_refused(folders: dict[str, list[str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give examples"):
        QualityConfig()
    with pytest.raises(ValueError, match="of one kind"):
        QualityConfig(positive=["a"])
    with pytest.raises(ValueError, match="both say what stays"):
        QualityConfig(model="m", least_score=0.5, keep_share=0.5)
    with pytest.raises(ValueError, match="names no file"):
        check_quality(QualityConfig(positive=["nowhere/*"], negative=["a"]))
    with pytest.raises(ValueError, match=r"there is no .*weights.safetensors"):
        check_quality(QualityConfig(model=str(tmp_path)))
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a"}\n' * 30)
    with pytest.raises(ValueError, match="hold 1 different texts"):
        train(QualityConfig(positive=[str(few)], negative=folders["code"]))
    few.write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match="row 1, has no text in 'text'"):
        train(QualityConfig(positive=[str(few)], negative=folders["code"]))
    config = QualityConfig(positive=folders["wiki"], negative=folders["code"], bits=8)
    assert rule_files(config)[-1] == folders["code"][-1]
    train_classifier(config, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "classifier.json").read_text())
    (tmp_path / "model" / "classifier.json").write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(ValueError, match="another format"):
        Classifier.load(tmp_path / "model")
    (tmp_path / "model" / "classifier.json").write_text(json.dumps({**about, "config": {**about["config"], "bits": 9}}))
    with pytest.raises(ValueError, match="does not fit"):
        Classifier.load(tmp_path / "model")
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="no whole classifier"):
        Classifier.load(tmp_path / "model")


def test_in_the_filter_stage(
    folders: dict[str, list[str]], tmp_path: Path, laid_out: Callable[..., Path], bytes_of: Callable
) -> None:
    """Ten lines of YAML: trained once, applied by tasks, the same bytes with 0 and 2 workers; deciles in the card."""
    recipe = f"""
profiles:
  prose:
    mode: fast
    quality:
      positive: [{folders["wiki"][0]}]
      negative: [{", ".join(folders["code"])}]
      keep_share: 0.5
      bits: 12
"""
    config = FilterConfig.model_validate(yaml.safe_load(recipe))
    check_filters(config)
    assert len(set(rule_files_of_filter(config))) == len(rule_files(config.profiles["prose"].quality))  # type: ignore[arg-type]
    texts = [json.loads(line)["text"] for line in Path(folders["peps"][0]).read_text().splitlines()]
    rows = [{"text": t, "id": str(i), "metadata": {"source": "p", "kind": "prose"}} for i, t in enumerate(texts)]
    documents = laid_out(tmp_path / "in", rows, 100)
    metrics = filter_documents(config, documents, tmp_path / "0", workers=0, progress=silent)
    assert abs(metrics["documents_out"] / len(rows) - 0.5) < 0.01
    assert metrics["removed_by_reason"] == {"quality: below threshold": len(rows) - metrics["documents_out"]}
    assert metrics["quality_auc"]["prose"] > 0.98
    table = [json.loads(line) for line in (tmp_path / "0" / "histograms.jsonl").read_text().splitlines()]
    assert sum(row["documents"] for row in table if row["name"] == "quality") == len(rows)
    kept = [row for shard in shards(tmp_path / "0") for row in read_rows(shard)]
    assert all(0 <= row["metadata"]["quality"] <= 1 for row in kept)
    filter_documents(config, documents, tmp_path / "2", workers=2, progress=silent)
    assert bytes_of(tmp_path / "2") == bytes_of(tmp_path / "0")
