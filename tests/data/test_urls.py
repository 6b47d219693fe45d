"""One spelling of URLs, rule by rule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.urls import normalised_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("  HTTP://Example.COM/Path\n", "https://example.com/Path"),
        ("https://www.example.com/", "https://example.com"),
        ("https://www.com/a", "https://www.com/a"),
        ("https://example.com./a/", "https://example.com/a"),
        ("http://example.com:80/a", "https://example.com/a"),
        ("https://example.com:443/a", "https://example.com/a"),
        ("https://example.com:8443/a", "https://example.com:8443/a"),
        ("https://me:secret@example.com/a", "https://example.com/a"),
        ("https://example.com/%7euser/%e4%b8%ad%2f", "https://example.com/~user/%E4%B8%AD%2F"),
        ("https://example.com/中 文", "https://example.com/%E4%B8%AD%20%E6%96%87"),
        ("https://example.com/100%", "https://example.com/100%25"),
        ("https://bücher.example/", "https://xn--bcher-kva.example"),
        ("https://example.com/a/./b/../c//d/", "https://example.com/a/c/d"),
        ("https://example.com/../../a", "https://example.com/a"),
        ("https://example.com/a/index.html", "https://example.com/a"),
        ("https://example.com/a#part", "https://example.com/a"),
        ("https://example.com/#!/a/b", "https://example.com#!/a/b"),
        ("https://example.com/a?utm_source=x&b=2&a=1&fbclid=y", "https://example.com/a?a=1&b=2"),
        ("https://example.com/a?b=2&a=2&a=1&", "https://example.com/a?a=2&a=1&b=2"),
        ("https://example.com/a;jsessionid=12AB?x=1", "https://example.com/a?x=1"),
        ("https://[2001:DB8::1]:443/a", "https://[2001:db8::1]/a"),
        ("mailto:a@b.example", "mailto:a@b.example"),
        ("no url at all ", "no url at all"),
        ("https://example.com:port/a", "https://example.com:port/a"),
        ("", ""),
    ],
)
def test_rules(url: str, expected: str) -> None:
    assert normalised_url(url) == expected


PIECES = ["http://", "https://", "www.", "a.example", "Ü.example", ":80", ":443", "/", "//", "..", ".", "%41", "%", "%zz",
          "index.html", "?", "&", "=", "utm_x", "sid", ";sid=1", "#", "!", " ", "中", "[", "]", "@", "\t", "b"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_a_spelling_is_its_own(url: str) -> None:
    once = normalised_url(url)
    assert normalised_url(once) == once
