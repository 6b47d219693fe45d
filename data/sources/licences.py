"""Which licence a source tree or file is under: SPDX's own line in a file, or the words of a licence's text.

A text is known by phrases that stand in that licence and, of those tried before it, in no other; nothing is guessed:
a text that holds none of them has no licence here.
"""

from __future__ import annotations

import re

NAMES = re.compile(r"^(un)?licen[cs]e([-_.].*)?$|^copying([-_.].*)?$|^copyright$", re.IGNORECASE)
NOT_NAMES = (".py", ".js", ".ts", ".go", ".java", ".rs", ".c", ".h", ".cpp", ".json", ".xml", ".html", ".rb", ".php")
HEAD = 16_384  # characters of a source file in which its licence line is looked for
WHOLE = 400_000  # characters of a licence's text
SPDX = re.compile(r"SPDX-License-Identifier:[ \t]{0,8}([A-Za-z0-9.()+ \t-]{1,200})")
NOT_WORDS = re.compile(r"[^a-z0-9.+]+")

# (identifier, phrases that must all stand there), in the order in which they are tried
TEXTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("AGPL-3.0-only", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0-only", ("gnu lesser general public license", "version 3")),
    ("LGPL-2.1-only", ("gnu lesser general public license", "version 2.1")),
    ("LGPL-2.0-only", ("gnu library general public license", "version 2")),
    ("GPL-3.0-only", ("gnu general public license", "version 3")),
    ("GPL-2.0-only", ("gnu general public license", "version 2")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("EPL-2.0", ("eclipse public license", "2.0")),
    ("EPL-1.0", ("eclipse public license", "1.0")),
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("CC0-1.0", ("cc0 1.0",)),
    ("CC-BY-SA-4.0", ("attribution sharealike 4.0",)),
    ("CC-BY-4.0", ("attribution 4.0 international",)),
    ("PSF-2.0", ("python software foundation license version 2",)),
    ("BSL-1.0", ("boost software license version 1.0",)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("WTFPL", ("do what the fuck you want to public license",)),
    ("Zlib", ("altered source versions must be plainly marked as such", "misrepresented")),
    ("MIT", ("permission is hereby granted free of charge", "the software is provided as is without warranty")),
    ("ISC", ("permission to use copy modify and", "distribute this software for any purpose with or without fee")),
    ("BSD-4-Clause", ("redistribution and use in source and binary forms", "all advertising materials mentioning")),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "endorse or promote products")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
)


def is_licence_name(name: str) -> bool:
    """Whether a file of this name holds a licence's text, such as LICENSE, LICENCE.md or COPYING."""
    return NAMES.match(name) is not None and not name.lower().endswith(NOT_NAMES)


def stated_licence(text: str) -> str | None:
    """The identifier or expression on a file's own SPDX line."""
    found = SPDX.search(text[:HEAD])
    return " ".join(found[1].split()) or None if found else None


def licence_of_text(text: str) -> str | None:
    """The identifier of a licence by its text; none if it is not known here.

    The GNU licences' texts do not say whether later versions may be chosen: that stands in the files' heads, so it is
    `-only` here.
    """
    stated = stated_licence(text)
    if stated is not None:
        return stated
    words = NOT_WORDS.sub(" ", text[:WHOLE].lower())
    title = words[:600]  # the GNU licences name each other further below
    for identifier, phrases in TEXTS:
        place = title if "gnu" in phrases[0] else words
        if all(phrase in place for phrase in phrases):
            return identifier
    return None
