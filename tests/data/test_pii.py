"""Personal data: what is found and what is not, datatrove's findings, and no input that runs away."""

from __future__ import annotations

import base64
import gzip
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gristmill.data.documents import read_rows, shards, write_rows
from gristmill.data.filters import FilterConfig, filter_documents
from gristmill.data.filters.pii import KINDS, Pii, PiiConfig, emails, ips, luhn
from gristmill.data.filters.profile import Profile
from gristmill.data.filters.rule import Prepared
from gristmill.data.sieve import conclude, edited, sieve_shard
from gristmill.data.stage_types import silent

HEAD = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode().rstrip("=")
JWT = f"{HEAD}.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
BODY = "MIIEowIBAAKCAQEAx7\nq8k3J+/9d0Tz==\n"
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}-----END RSA PRIVATE KEY-----"


def joined(*parts: str) -> str:
    """A token put together here, so that no scanner of repositories takes this file for a leak."""
    return "".join(parts)


FOUND = {
    "email": [
        "ada.lovelace+maths@mail.example.co.uk",
        "o'hara@example.org",
        "x@[203.0.113.9]",
    ],
    "ip": ["8.8.8.8", "2a00:1450:4001:81b::200e", "2606:4700::1111"],
    "phone": [
        "+49 30 901820",
        "+1 (415) 555-2671",
        "+447911123456",
        "(415) 555-2671",
        "415-555-2671",
        "1-800-555-2671",
        "020 7946 0958",
        "07700 900123",
        "01 42 68 53 00",
        "030/1234567",
    ],
    "card": [
        "4111 1111 1111 1111",
        "5500-0055-5555-5559",
        "378282246310005",
        "3782 822463 10005",
        "6011000990139424",
        "3530111333300000",
        "30569309025904",
    ],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO93 8601 1117 947"],
    "key": [
        joined("AK", "IAIOSFODNN7QRTUVWX"),
        joined("gh", "p_", "16C7e42F292c6912E7710c838347Ae178B4a"),
        joined("xo", "xb-", "123456789012-abcdefGHIJKL"),
        joined("AI", "za", "SyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY"),
        joined("sk_", "live_", "4eC39HqLyjWDarjtT1zdp7dc"),
        JWT,
        PEM,
    ],
}
LEFT = {
    "email": ["@decorator", "user@", "@@", "a..@b.c", "price @ 3.50", "foo@localhost", "git@", "x@-a.com"],
    "ip": ["1.2.3", "1.2.3.4.5", "256.1.1.1", "192.168.0.1", "127.0.0.1", "::1", "12:30:45", "std::abs", "01.02.03.04"],
    "phone": [
        "+1.5",
        "2000 01 01 00 00 00 1 001",
        "123-456-7890",
        "a = +4294967296",
        "+35236450.6",
        "2024-11-25 10:15",
    ],
    "card": [
        "4111 1111 1111 1112",
        "1234567890123456",
        "41111111111111111111",
        "0000000000000000",
        "4111 11 11 1111 1111",
    ],
    "iban": ["DE89 3704 0044 0532 0130 01", "XX89 3704 0044 0532 0130 00", "PEP 8 AB12"],
    "key": [
        'token = "your-api-key-1234567890"',
        'password = "correct horse battery staple"',
        "secret: some/path/to/a/file/v12.txt",
        "https://example.org/a/very/long/path/2024/11/25/index.html",
        "sha256 = 9f86d081884c7d659a2feaa0c55ad015",
    ],
}


def judged(text: str, **changes: str):
    rule = PiiConfig.model_validate(changes).rule(exact=False)
    row = {"text": text, "id": "a", "metadata": {}}
    return rule.judge(Prepared(row, text, None))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind in FOUND for value in FOUND[kind]])
def test_found_and_nothing_else(kind: str, value: str) -> None:
    for before, after in (("", ""), ("Write to ", " today."), ("(", ")"), ("äöü\n", ", 字"), ('x="', '"')):
        text = f"{before}{value}{after}"
        verdict = judged(text)
        assert edited(text, verdict.edits) == f"{before}<{kind}>{after}"
        assert all(e.reason == f"pii: {kind}" for e in verdict.edits)


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind in LEFT for value in LEFT[kind]])
def test_left_alone(kind: str, value: str) -> None:
    for text in (value, f"See {value} there.", f"字{value}\n"):
        assert [e for e in judged(text).edits if e.reason == f"pii: {kind}"] == [], text


def test_values_assigned_to_names_of_secrets() -> None:
    value = joined("wJalrXUtnFEMI", "K7MDENGbPxRfiCY3q9Zr8vT")
    for line in (
        f'aws_secret_access_key = "{value}"',
        f"API_KEY={value}",
        f"password: {value}",
        f'"auth_token": "{value}"',
    ):
        assert edited(line, judged(line).edits) == line.replace(value, "<key>")
    assert judged(f"commit {value}").edits == ()
    cut = f"-----BEGIN PRIVATE KEY-----\n{BODY}"
    assert edited(cut, judged(cut).edits) == "<key>"
    assert edited(f"{PEM} and {PEM}", judged(f"{PEM} and {PEM}").edits) == "<key> and <key>"


def test_checksum_against_a_table() -> None:
    """Luhn by its textbook form, on random numbers: each has one right last digit."""
    rng = random.Random(3)
    for _ in range(200):
        body = [rng.randrange(10) for _ in range(rng.randrange(12, 19))]
        total = sum(sum(divmod(2 * d, 10)) if i % 2 == 0 else d for i, d in enumerate(reversed(body)))
        right = (10 - total % 10) % 10
        text = "".join(map(str, body))
        assert [d for d in range(10) if luhn(f"{text}{d}")] == [right]


def test_actions() -> None:
    text = "ada@example.org called +49 30 901820 from 10.0.0.7 and 8.8.4.4"
    assert edited(text, judged(text).edits) == "<email> called <phone> from 10.0.0.7 and <ip>"
    assert edited(text, judged(text, email="leave").edits) == "ada@example.org called <phone> from 10.0.0.7 and <ip>"
    private = judged(text, email="leave", phone="leave", only_public_ips=False)  # type: ignore[arg-type]
    assert edited(text, private.edits) == "ada@example.org called +49 30 901820 from <ip> and <ip>"
    removed = judged(text, phone="remove")
    assert removed.reason == "pii: phone"
    assert removed.because == {"detail": "1 email, 1 ip, 1 phone"}
    assert judged(text, **dict.fromkeys(KINDS, "leave")).edits == ()


def test_no_sample_shows_the_secret_for_which_a_document_went(tmp_path: Path) -> None:
    """Not either where a rule before has edited the text; counts are by the removal's reason."""
    secret, address = FOUND["key"][0], "ada@example.org"
    line = f"The {{ }} of this line is {address}, and it is the one to write to about it."
    text = f"no end\nThe token is {secret} and the address {address}.\n{line}\n"
    config = {"c4": {"least_sentences": None, "no_curly_bracket": False}, "pii": {"key": "remove"}}
    judge = Profile.model_validate({"mode": "fast", **config}).judge()
    known = {"source": "s", "kind": "prose", "url": None, "date": None, "licence": None}
    write_rows(tmp_path / "in" / "0.jsonl.zst", [{"text": text, "id": "s/a", "metadata": known}])
    (tmp_path / "out").mkdir()
    sieve_shard(tmp_path / "in" / "0.jsonl.zst", tmp_path / "out", lambda row, place: judge(row))
    metrics = conclude(tmp_path / "out", [tmp_path / "in" / "0.jsonl.zst"])
    assert metrics["removed_by_reason"] == {"pii: key": 1}
    shown = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8")
    assert secret not in shown
    assert address not in shown
    assert "The token is ⟦<key>⟧ and the address ⟦<email>⟧." in shown
    [whole] = read_rows(tmp_path / "out" / "removed" / "0.jsonl.zst")
    assert whole["text"] == text


def test_samples_of_what_other_rules_removed_hide_personal_data(tmp_path: Path, laid_out: Callable[..., Path]) -> None:
    """The whole row in removed/ is as it came: a decision can be taken back."""
    text = "Write to ada@example.org about lorem ipsum, or not.\n"
    known = {"source": "s", "kind": "prose", "url": None, "date": None, "licence": None}
    documents = laid_out(tmp_path / "in", [{"text": text, "id": "s/a", "metadata": known}])
    for name, pii, shown in (("with", {}, "■" * 15), ("without", None, "ada@example.org")):
        profile = {"mode": "fast", "length": {"least_characters": 100}, "pii": pii}
        config = FilterConfig.model_validate({"profiles": {"prose": profile}})
        (tmp_path / name).mkdir()
        metrics = filter_documents(config, documents, tmp_path / name, workers=0, progress=silent)
        assert metrics["documents_out"] == 0
        samples = (tmp_path / name / "samples.jsonl").read_text(encoding="utf-8")
        assert f"Write to {shown} about" in samples
        assert ("ada@" in samples) == (pii is None)
        [whole] = read_rows(next((tmp_path / name / "removed").iterdir()))
        assert whole["text"] == text


def test_samples_of_what_another_rule_edited_hide_personal_data(tmp_path: Path, laid_out: Callable[..., Path]) -> None:
    """The line with the address goes before personal data is looked for, and the sample shows what went."""
    text = "The mill is open every day.\nada@example.org\nThe miller likes visitors.\n"
    known = {"source": "s", "kind": "prose", "url": None, "date": None, "licence": None}
    documents = laid_out(tmp_path / "in", [{"text": text, "id": "s/a", "metadata": known}])
    profile = {"mode": "fast", "c4": {"least_sentences": None}, "pii": {}}
    (tmp_path / "out").mkdir()
    config = FilterConfig.model_validate({"profiles": {"prose": profile}})
    metrics = filter_documents(config, documents, tmp_path / "out", workers=0, progress=silent)
    assert metrics["changed"] == 1
    samples = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8")
    assert "■" * 15 in samples
    assert "ada@" not in samples


def test_the_secret_is_in_no_file_of_what_was_changed(tmp_path: Path, laid_out: Callable[..., Path]) -> None:
    secrets = [value for values in FOUND.values() for value in values]
    rows = [
        {"text": f"Line before. {s} Line after.", "id": str(i), "metadata": {"source": "web", "kind": "prose"}}
        for i, s in enumerate(secrets)
    ]
    shard = shards(laid_out(tmp_path / "in", rows))[0]
    rule = Pii(PiiConfig())
    sieve_shard(shard, tmp_path, lambda row, _: rule.judge(Prepared(row, row["text"], None)))  # type: ignore[arg-type]
    changed = list(read_rows(tmp_path / "changed" / shard.name))
    kept = list(read_rows(tmp_path / "documents" / shard.name))
    conclude(tmp_path, [shard])
    samples = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert "⟦<email>⟧" in samples
    assert not any(json.dumps(secret)[1:-1] in samples for secret in secrets)
    assert len(changed) == len(kept) == len(rows)
    for secret, change, row in zip(secrets, changed, kept, strict=True):
        assert secret not in json.dumps(change)
        assert secret not in row["text"]


def is_listed(text: str, start: int, end: int) -> bool:
    """The differences from datatrove on these corpora, each by its reason.

    - Its IPv4 pattern has no edges: it takes four numbers out of an object identifier or a version of more
      (1.3.6.1.5.5.7.3.1), and 12.34.56.78 out of 12.34.56.789. We take an address that stands by itself.
    - A local part beyond RFC 5321's 64 characters: we take its last 64, since what is before is no address.
    """
    longer = text[start - 1 : start].isdigit() or text[end : end + 1].isdigit()
    dotted = (text[start - 1 : start] == "." and text[start - 2 : start - 1].isdigit()) or (
        text[end : end + 1] == "." and text[end + 1 : end + 2].isdigit()
    )
    return longer or dotted or text[start:end].find("@") > 64


def test_the_same_findings_as_datatrove(shared_data: Path) -> None:
    """Emails and IPv4 addresses of some 450 documents, span by span, and on stretches made to differ."""
    from datatrove.pipeline.formatters.pii import PIIFormatter

    theirs = PIIFormatter()
    texts = [
        json.loads(line)["text"]
        for name, every in (("peps", 2), ("wikitext2", 4), ("udhr", 8))
        for line in gzip.decompress((shared_data / "corpus" / f"{name}.jsonl.gz").read_bytes()).splitlines()[::every]
    ]
    rng = random.Random(1)
    texts += ["".join(rng.choices("a1._-@é 'c+", k=60)) for _ in range(1000)]
    texts += ["".join(rng.choices(["1", "25", "6", ".", ".", "0", " ", "a"], k=40)) for _ in range(1000)]
    same = {"email": 0, "ip": 0}
    for text in texts:
        email = {m.span() for m in theirs.emails_replacer.regex.finditer(text)}
        ip = {m.span() for m in theirs.ip_replacer.regex.finditer(text) if theirs.ip_replacer.validator(m[0])}  # type: ignore[misc]
        ours = {"email": set(emails(text)), "ip": {s for s in ips(text, True) if ":" not in text[slice(*s)]}}
        for kind, their in (("email", email), ("ip", ip)):
            same[kind] += len(ours[kind] & their)
            assert all(is_listed(text, *s) for s in their - ours[kind]), [text[slice(*s)] for s in their - ours[kind]]
            new = ours[kind] - their
            # what is new lies within, or begins within, one of theirs that is listed
            assert all(any(a <= s[0] and s[1] <= b and is_listed(text, a, b) for a, b in their) for s in new)
    print(f"equal findings: {same}")
    assert same["email"] > 800
    assert same["ip"] > 15


ADVERSARIAL = [
    "@", "a@", "a@b.", "a.", "a" * 50, ".@", "é@a.b", "1.", "1.1.1.1.", "1:", "::", "a:b:", "+", "+1", "+1 ", "1 ", "1-", "(1",
    "4111 ", "4111-1111 ", "3782 822463 ", "AA00", "AA00 ", "AK", "AKIA", joined("gh", "p_"), joined("xo", "xb-"), "eyJ", "eyJ.",
    "eyJaaaaaa.", ".eyJ" + "a" * 30, "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----a\n",
    "token=", "token=" + "a1" * 15, "='", "'" + "a1" * 12, "password: ", "-", "=", "A1", "0", "02/", "020 7946 0", "字1",
]  # fmt: skip


# Seconds on an idle core for two megabytes, where it is more than one.
COSTLY = (
    "a@",
    "a@b.",
    "4111 ",
    "020 7946 0",
    "AA00 ",
    "::",
    "1:",
    "a:b:",
    ".@",
    "3782 822463 ",
    "@",
    "token=" + "a1" * 15,
    "'" + "a1" * 12,
)


@pytest.mark.parametrize("piece", [pytest.param(p, marks=[pytest.mark.slow] * (p in COSTLY)) for p in ADVERSARIAL])
def test_no_input_runs_away(piece: str) -> None:
    """Two megabytes of what a pattern begins with, and with a break at the end: time grows with length, not with its
    square, which would be thousands of seconds."""
    rule = Pii(PiiConfig())
    took = []
    for size in (100_000, 2_000_000):
        text = (piece * (size // len(piece) + 1))[:size] + "!"
        began = time.process_time()
        rule.findings(text)
        took.append(time.process_time() - began)
    assert took[1] < 20 * (4 * took[0] + 0.02)  # 20 times the length, with room for a busy machine
    assert took[1] < 20


def test_what_is_overlapped() -> None:
    """A card number within an assignment's token, a phone number within an email: the first kind of KINDS counts."""
    text = 'api_key = "a1b2c3d4e5f6a7b8c9d0415-555-2671zz"'
    assert edited(text, judged(text).edits) == 'api_key = "<key>"'
    text = "+14155552671@example.org"
    assert edited(text, judged(text).edits) == "<email>" or edited(text, judged(text).edits) == "+<email>"
