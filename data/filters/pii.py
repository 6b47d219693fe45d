"""Personal data and secrets in a text: found by patterns of bounded length with checks behind them, then redacted.

| kind | what is found | check |
| --- | --- | --- |
| email | addr-spec of RFC 5322 without quotes or comments, local part up to 64 characters (as datatrove's pattern) | |
| ip | IPv4 dotted quads and IPv6, no part of a longer number | a valid address, by option a public one |
| phone | +country code and 8 to 15 digits (E.164); North American, British, French and German national forms | code |
| card | 13 to 19 digits as cards print them | issuer's prefix and length, Luhn (ISO/IEC 7812) |
| iban | ISO 13616, with or without blanks | country's length, remainder mod 97 |
| key | tokens with known prefixes, JSON web tokens, private key blocks, random values assigned to such names | |

No pattern can run away: each is unambiguous and of bounded length, tried only where what it needs stands. A document
costs time in proportion to its length, whatever it says.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field

from gristmill.data.filters.pii_places import accounts, numbers, values
from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.sieve import KEEP, Edit, Verdict

Span = tuple[int, int]
Action = Literal["leave", "redact", "remove"]
KINDS = ("key", "card", "iban", "email", "ip", "phone")  # of findings that overlap, the first of these counts


class PiiConfig(RuleConfig):
    """What is done about each kind of personal data: leave it, redact it to a placeholder, or remove the document."""

    email: Action = Field(default="redact", title="Email addresses", description="Become <email>.")
    ip: Action = Field(default="redact", title="IP addresses", description="Become <ip>.")
    only_public_ips: bool = Field(
        default=True, title="Only public addresses", description="Leave private and reserved IP addresses alone."
    )
    phone: Action = Field(default="redact", title="Phone numbers", description="Become <phone>.")
    card: Action = Field(default="redact", title="Card numbers", description="With a right checksum; become <card>.")
    iban: Action = Field(default="redact", title="Bank accounts", description="IBANs; become <iban>.")
    key: Action = Field(default="redact", title="Keys and tokens", description="Become <key>.")

    def rule(self, exact: bool) -> Rule:
        """The rule; there is one way of it."""
        return Pii(self)


class Pii:
    """Redacts personal data, or removes documents with it; edits hold placeholders, never what was there.

    A removal has the edits too: what is shown of the document in samples is shown with them.
    """

    name = "pii"

    def __init__(self, config: PiiConfig) -> None:
        self._actions: dict[str, Action] = {kind: getattr(config, kind) for kind in KINDS}
        self._only_public_ips = config.only_public_ips

    def judge(self, document: Prepared) -> Verdict:
        """Remove for a kind that asks for it, else redact."""
        found = self.findings(document.text)
        if not found:
            return KEEP
        counts = Counter(kind for kind, _, _ in found)
        edits = [Edit(start, end, f"pii: {kind}", f"<{kind}>") for kind, start, end in found]
        gone = next((kind for kind in KINDS if counts[kind] and self._actions[kind] == "remove"), None)
        if gone is not None:
            detail = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
            return Verdict(f"pii: {gone}", {"detail": detail}, edits)
        return Verdict(edits=edits)

    def findings(self, text: str) -> list[tuple[str, int, int]]:
        """(kind, start, end) of all that is not left alone, in order and apart from each other."""
        finders: dict[str, Callable[[str], Iterator[Span]]] = {
            "key": keys,
            "card": cards,
            "iban": ibans,
            "email": emails,
            "ip": lambda own: ips(own, self._only_public_ips),
            "phone": phones,
        }
        found: list[tuple[int, int, int]] = []
        for rank, kind in enumerate(KINDS):
            if self._actions[kind] != "leave":
                found += [(start, rank, end) for start, end in finders[kind](text)]
        return _apart(found)


def _apart(found: list[tuple[int, int, int]]) -> list[tuple[str, int, int]]:
    """Findings (start, rank, end) without those that overlap one of a better rank, in order."""
    kept: list[tuple[int, int, int]] = []
    for start, rank, end in sorted(found):
        while kept and start < kept[-1][2] and rank < kept[-1][1]:
            kept.pop()
        if not kept or start >= kept[-1][2]:
            kept.append((start, rank, end))
    return [(KINDS[rank], start, end) for start, rank, end in kept]


# Emails

LOCAL = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+/=?^_`{|}~.-")
LOCAL_MOST, DOMAIN_MOST = 64, 255  # RFC 5321, 4.5.3.1
DOMAIN = re.compile(rf"[A-Za-z0-9.-]{{1,{DOMAIN_MOST}}}+")
LITERAL = re.compile(r"\[[0-9.]{7,15}+\]")


def emails(text: str) -> Iterator[Span]:
    """Email addresses: from each @ to the left and to the right."""
    done = 0
    at = text.find("@")
    while at >= 0:
        start = _local_start(text, at, done) if text[at - 1 : at] in LOCAL else None
        end = _domain_end(text, at + 1) if start is not None else None
        if start is not None and end is not None:
            yield start, end
            done = end
        at = text.find("@", max(at + 1, done))


def _local_start(text: str, at: int, least: int) -> int | None:
    """Where the local part before the @ begins: at the edge of a word, as far left as its characters reach."""
    start, least = at, max(least, at - LOCAL_MOST)
    while start > least and text[start - 1] in LOCAL:
        start -= 1
    own = text[start:at]
    if own.endswith("."):
        return None
    start += own.rfind("..") + 2 if ".." in own else 0
    for place in range(start, at):
        before = place > 0 and (text[place - 1].isalnum() or text[place - 1] == "_")
        if text[place] != "." and before != (text[place].isalnum() or text[place] == "_"):
            return place
    return None


def _domain_end(text: str, start: int) -> int | None:
    """Where the domain ends: labels that begin and end with a letter or digit, two at least; or an address in []."""
    if text[start : start + 1] == "[":
        literal = LITERAL.match(text, start)
        return literal.end() if literal and _address(literal[0][1:-1]) is not None else None
    run = DOMAIN.match(text, start)
    end, labels, at = start, 0, start
    for label in run[0].split(".") if run else ():
        bare = label.rstrip("-")
        if not bare or not bare[0].isalnum():
            break
        end, labels = at + len(bare), labels + 1
        if bare != label:
            break
        at += len(label) + 1
    return end if labels >= 2 else None


# IP addresses

QUAD = re.compile(r"(?<![0-9])(?<![0-9]\.)[0-9]{1,3}+(?:\.[0-9]{1,3}+){3}(?![0-9])(?!\.[0-9])")
COLONS = re.compile(r":[0-9A-Fa-f]{0,4}+:")
HEXADECIMAL = frozenset("0123456789abcdefABCDEF:")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that IANA has given out of IPv6
LONGEST_V6 = 39


def ips(text: str, only_public: bool) -> Iterator[Span]:
    """IPv4 and IPv6 addresses."""
    for place in numbers(text, 4, 3):
        for found in QUAD.finditer(text, *place):
            address = _address(found[0])
            if address is not None and (address.is_global or not only_public):
                yield found.span()
    if ":" in text:
        for start, end in _colon_runs(text):
            address = _address(text[start:end])
            if address is not None and ((address in GLOBAL_UNICAST and address.is_global) or not only_public):
                yield start, end


def _colon_runs(text: str) -> Iterator[Span]:
    """Runs of hexadecimal digits and colons, two colons near each other among them, that no letter continues."""
    done = 0
    for found in COLONS.finditer(text):
        if found.start() < done:
            continue
        start, end = found.span()
        while start > max(done, found.start() - LONGEST_V6) and text[start - 1] in HEXADECIMAL:
            start -= 1
        while end < min(len(text), start + LONGEST_V6 + 1) and text[end] in HEXADECIMAL:
            end += 1
        done = end
        if text[end - 1] == ":" and text[end - 2 : end] != "::":
            end -= 1  # a colon of the sentence
        joined = text[start - 1 : start], text[end : end + 1]
        if text[start:end] != "::" and not any(c.isalnum() or c == "_" for c in joined):
            yield start, end


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


# Phone numbers

INTERNATIONAL = re.compile(r"(?<![\w+])\+[1-9](?:[ .()/-]{0,2}+[0-9]){7,14}+(?!\w)")
DECIMAL = re.compile(r"\+[0-9]+\.[0-9]+")
NATIONAL = re.compile(
    r"(?<![\w.+/-])(?<![0-9] )(?:"
    r"(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.-])[2-9][0-9]{2}[.-][0-9]{4}"  # North America
    r"|(?:020|\(020\)) [0-9]{4} [0-9]{4}|(?:01[0-9]{3}|\(01[0-9]{3}\)) [0-9]{6}"  # Britain
    r"|07[0-9]{3} ?[0-9]{6}|07[0-9]{3} [0-9]{3} [0-9]{3}"
    r"|0[1-9](?:(?: [0-9]{2}){4}|(?:\.[0-9]{2}){4})"  # France
    r"|0[1-9][0-9]{1,4}/[0-9]{5,8}"  # Germany
    r")(?![\w/-])(?![. ][0-9])"
)
# ITU E.164 country codes that one or two digits tell; the others have three.
SHORT = "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 81 82"
SHORT_CODES = frozenset([*SHORT.split(), "84", "86", "90", "91", "92", "93", "94", "95", "98"])
LONG_CODES = (
    "21",
    "22",
    "23",
    "24",
    "25",
    "26",
    "29",
    "35",
    "37",
    "38",
    "42",
    "50",
    "59",
    "67",
    "68",
    "69",
    "85",
    "96",
)
LONG_CODES += ("88", "97", "99")
LEAST_UNGROUPED = 11  # digits of a number written without a break: fewer may be any number with a sign


LEAST_PHONE = 8  # digits of the shortest form above


def phones(text: str) -> Iterator[Span]:
    """Phone numbers: any country's in international form, a few countries' national forms."""
    for place in numbers(text, LEAST_PHONE):
        yield from (f.span() for f in INTERNATIONAL.finditer(text, *place) if _is_international(f[0]))
        yield from (f.span() for f in NATIONAL.finditer(text, *place))


def _is_international(number: str) -> bool:
    digits = "".join(filter(str.isdigit, number))
    known = digits[0] in SHORT_CODES or digits[:2] in SHORT_CODES or digits[:2] in LONG_CODES
    grouped = len(number) > len(digits) + 1
    return (
        known and len(set(digits)) > 2 and (grouped or len(digits) >= LEAST_UNGROUPED) and not DECIMAL.fullmatch(number)
    )


# Card numbers

CARD = re.compile(
    r"(?<![\w.,+/-])(?=("
    r"[0-9]{13,19}+|[0-9]{4}(?P<a>[ -])[0-9]{4}(?P=a)[0-9]{4}(?P=a)[0-9]{4}(?:(?P=a)[0-9]{3})?"
    r"|3[47][0-9]{2}(?P<b>[ -])[0-9]{6}(?P=b)[0-9]{5}|3[0-9]{3}(?P<c>[ -])[0-9]{6}(?P=c)[0-9]{4}"
    r")(?![\w/-])(?![.,][0-9]))"
)
# (first and last prefix, lengths) of ISO/IEC 7812 issuer ranges: Visa, Mastercard (two), American Express (two),
# Diners Club (two), Discover (three), JCB, UnionPay
ISSUERS = (
    ("4", "4", (13, 16, 19)),
    ("51", "55", (16,)),
    ("2221", "2720", (16,)),
    ("34", "34", (15,)),
    ("37", "37", (15,)),
    ("300", "305", (14, 16, 19)),
    ("36", "39", (14, 16, 19)),
    ("6011", "6011", (16, 19)),
    ("644", "649", (16, 19)),
    ("65", "65", (16, 19)),
    ("3528", "3589", (16, 19)),
    ("62", "62", (16, 17, 18, 19)),
)


DOUBLED = str.maketrans("0123456789", "0246813579")  # twice a digit, 9 taken off what is above 9
LEAST_CARD = 13  # digits


def cards(text: str) -> Iterator[Span]:
    """Card numbers."""
    for place in numbers(text, LEAST_CARD):
        for found in CARD.finditer(text, *place):
            digits = re.sub("[ -]", "", found[1])
            if luhn(digits) and _issued(digits) and len(set(digits)) > 1:
                yield found.span(1)


def _issued(digits: str) -> bool:
    return any(a <= digits[: len(a)] <= b and len(digits) in lengths for a, b, lengths in ISSUERS)


def luhn(digits: str) -> bool:
    """Whether the last digit is the checksum of the others (ISO/IEC 7812-1, annex B)."""
    return sum(map(int, digits[-1::-2] + digits[-2::-2].translate(DOUBLED))) % 10 == 0


# Bank accounts

IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}+")
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ TL", 24: "AD CZ ES MD PK SA SE SK TN VG", 25: "LY PT ST",
        26: "IS TR", 27: "FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB PL SV", 29: "BR EG PS QA UA",
        30: "JO KW MU", 31: "MT SC", 32: "LC",
    }.items()
    for country in countries.split()
}  # fmt: skip


def ibans(text: str) -> Iterator[Span]:
    """International bank account numbers."""
    for place in accounts(text):
        found = IBAN.match(text, place)
        if found is None:
            continue
        size = IBAN_LENGTHS.get(found[0][:2], 0)
        places = [i for i, char in enumerate(found[0]) if char != " "]
        if size and len(places) >= size:
            end = found.start() + places[size - 1] + 1
            own = text[found.start() : end].replace(" ", "")
            number = int("".join(str(int(char, 36)) for char in own[4:] + own[:4]))
            if number % 97 == 1 and not text[end : end + 1].isalnum():
                yield found.start(), end


# Keys and tokens

# (words of which one must stand in the text, pattern): formats that their issuers document
TOKENS = tuple(
    (words.split(), re.compile(rf"(?<![A-Za-z0-9_-])(?:{pattern})(?![A-Za-z0-9_-])"))
    for words, pattern in (
        ("AKIA ASIA", r"(?:AKIA|ASIA)[A-Z2-7]{16}"),  # Amazon Web Services
        ("ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{36,251}+"),  # GitHub
        ("github_pat_", r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
        ("glpat-", r"glpat-[A-Za-z0-9_-]{20,64}+"),  # GitLab
        ("xox", r"xox[abeoprs]-[A-Za-z0-9-]{10,250}+"),  # Slack
        ("hooks.slack.com", r"hooks\.slack\.com/services/T[A-Z0-9]{6,14}/B[A-Z0-9]{6,14}/[A-Za-z0-9]{20,30}+"),
        ("AIza", r"AIza[0-9A-Za-z_-]{35}"),  # Google
        ("_live_", r"[sr]k_live_[0-9A-Za-z]{16,250}+"),  # Stripe
        ("sk-", r"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{40,250}+"),  # OpenAI, Anthropic
        ("hf_", r"hf_[A-Za-z0-9]{30,40}+"),  # Hugging Face
        ("npm_", r"npm_[A-Za-z0-9]{36}"),  # npm
        ("pypi-AgEIcHlwaS5vcmc", r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{40,250}+"),  # the Python Package Index
        ("SG.", r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),  # SendGrid
    )
)
JWT = re.compile(
    r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{5,2000}+\.eyJ[A-Za-z0-9_-]{5,8000}+\.[A-Za-z0-9_-]{10,2000}+(?![A-Za-z0-9_-])"
)
KEY_BEGINS = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
MOST_BODY = 16_000  # characters between its first and its last line
KEY_BODY = re.compile(r"[A-Za-z0-9+/=:,.()\\\s\"'-]*+")
KEY_ENDS = re.compile(r"-----END [A-Z0-9 ]{0,48}+-----")
NAMED = re.compile(
    r"(?:secret|token|passwd|password|passphrase|api[_-]?key|access[_-]?key|auth[_-]?key|private[_-]?key|credential)"
    r"[a-z0-9_]{0,16}[\"']?\s{0,3}(?:=>|:=|[:=])\s{0,3}[\"']?\Z",
    re.IGNORECASE,
)
ASSIGNS = ("'", '"', "=", ":", " ")  # right before a value
MOST_VALUE = 4000  # characters of a value that are looked at
NAME_MOST = 56  # characters before a value in which its name stands
NO_SECRET = re.compile(r"example|your|xxxx|dummy|sample|changeme|placeholder|redacted|test", re.IGNORECASE)
LEAST_ENTROPY = 3.5  # bits a character; random base64 of 20 characters has about 4, words about 3
LEAST_DIGITS = 2
PARTS = re.compile(r"[/._~-]")
LEAST_PART = 12  # characters of the longest part: a path or a dotted name has shorter ones


def keys(text: str) -> Iterator[Span]:
    """Keys and tokens, in order and apart within each of their kinds."""
    for words, pattern in TOKENS:
        if any(word in text for word in words):
            yield from (found.span() for found in pattern.finditer(text))
    if ".eyJ" in text:
        yield from (found.span() for found in JWT.finditer(text) if _is_jose(found[0]))
    yield from _private_keys(text)
    for start, end in values(text):
        named = text[start - 1 : start] in ASSIGNS and NAMED.search(text[max(0, start - NAME_MOST) : start])
        if named and _is_random(text[start : min(end, start + MOST_VALUE)]):
            yield start, end


def _is_jose(token: str) -> bool:
    """Whether the first part is a header of RFC 7515."""
    head = token.split(".", 1)[0]
    try:
        return "alg" in json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (binascii.Error, ValueError, TypeError):
        return False


def _private_keys(text: str) -> Iterator[Span]:
    """PEM blocks; one whose end is missing reaches as far as its body's characters."""
    at = text.find("-----BEGIN ")
    while at >= 0:
        begins = KEY_BEGINS.match(text, at)
        if begins is None:
            at = text.find("-----BEGIN ", at + 1)
            continue
        dashes = text.find("-----", begins.end(), begins.end() + MOST_BODY)
        body = KEY_BODY.match(text, begins.end(), dashes if dashes >= 0 else begins.end() + MOST_BODY)
        end = body.end() if body else begins.end()
        ends = KEY_ENDS.match(text, dashes) if dashes == end else None
        end = ends.end() if ends else end
        yield at, end
        at = text.find("-----BEGIN ", end)


def _is_random(value: str) -> bool:
    if max(map(len, PARTS.split(value))) < LEAST_PART:
        return False
    if sum(map(str.isdigit, value)) < LEAST_DIGITS or not any(map(str.isalpha, value)) or NO_SECRET.search(value):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= LEAST_ENTROPY
