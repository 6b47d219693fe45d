"""Stop strings over text that comes in pieces: against a search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.model.stop_strings import Speech, Wording


@settings(deadline=None, max_examples=300)
@given(
    data=st.lists(st.sampled_from([b"a", b"b", b"ab", b"ba", "é".encode(), b"\xc3", b"\xa9", b"\xe2\x82", b"\xac"])),
    stop=st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3),
)
def test_pieces_of_bytes_against_a_search_in_the_whole(data: list[bytes], stop: list[str]) -> None:
    def text(tokens: list[int]) -> str:
        return b"".join(data[token] for token in tokens).decode(errors="replace")

    speech = Speech(Wording(text, tuple(stop)))
    shown = ""
    for token in range(len(data)):
        shown += speech.add(token)
        assert not any(s in shown for s in stop)
        if speech.stopped:
            break
    shown += speech.finish()
    assert shown == speech.said
    assert not any(s in shown for s in stop)
    whole = text(list(range(len(data))))
    if not speech.stopped:
        assert shown == whole
    else:
        assert whole.startswith(shown)
        assert any(whole[len(shown) :].startswith(s) for s in stop)


def test_what_may_become_a_stop_string_waits() -> None:
    said = ["The", " answer", " is", " 4", "\n\nQ", "x", "\n\nQ", ": next"]
    speech = Speech(Wording(lambda tokens: "".join(said[t] for t in tokens), ("\n\nQ:",)))
    assert [speech.add(t) for t in range(8)] == ["The", " answer", " is", " 4", "", "\n\nQx", "", ""]
    assert speech.stopped
    assert speech.finish() == ""
    assert speech.said == "The answer is 4\n\nQx"


def test_what_waits_comes_when_nothing_follows() -> None:
    speech = Speech(Wording(lambda tokens: "".join("ab"[t] for t in tokens), ("bb",)))
    assert [speech.add(t) for t in (0, 1)] == ["a", ""]
    assert speech.finish() == "b"
    assert speech.said == "ab"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="hold an empty one"):
        Wording(str, ("x", ""))
