"""The lines of a STAR file: which part of it each one is, and the values in it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cryoai.errors import InputError
from cryoai.formats.files import shown

__all__ = ["Line", "star_lines", "tokens", "unquoted"]

_QUOTED = re.compile(r"""'.*?'(?=\s|$)|".*?"(?=\s|$)|\S+""")
_FEW_QUOTES = 16
_WORD = re.compile(r"\S+")
_CLOSING = {quote: re.compile(rf"{quote}(?=\s|$)") for quote in "'\""}


class Line(NamedTuple):
    """A line of a STAR file: which part of it, of which table, and its text."""

    kind: str  # "block", "loop", "column", "item", "row" or "other"
    block: str
    text: str


def star_lines(path: Path) -> Iterator[Line]:
    """All lines of a file, one at a time.

    Raises
    ------
    InputError
        If a line belongs to no table.
    """
    block, in_header, in_loop = "", False, False
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            kind = "row"
            if not text or text.startswith("#"):
                kind = "other"
            elif text.startswith("data_") and not (in_loop and _has_more_words(text)):
                kind, block, in_header, in_loop = "block", text.split()[0][len("data_") :], False, False
            elif text.startswith("loop_"):
                kind, in_header, in_loop = "loop", True, True
            elif text.startswith("_") and (in_header or not in_loop):
                kind = "column" if in_header else "item"
            elif in_loop:
                in_header = False
            else:
                raise InputError(
                    f"{path}: line {number} belongs to no table ('{shown(text, 40)}'); write the file again"
                )
            yield Line(kind, block, text)


def _has_more_words(text: str) -> bool:
    """Whether a line is a row whose first value looks like the name of a table, such as a path."""
    words = text.split(maxsplit=2)
    return len(words) > 1 and not words[1].startswith("#")


def tokens(text: str) -> list[str]:
    """The values of a row as they stand, quotes included."""
    words = text.split() if "'" not in text and '"' not in text else _quoted_words(text)
    if "#" in text:
        comment = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
        return words[:comment]
    return words


def _quoted_words(text: str) -> list[str]:
    """Words, of which those that a quote begins go on to the next such quote before white space, if there is one."""
    if text.count("'") + text.count('"') <= _FEW_QUOTES:
        return _QUOTED.findall(text)
    # The expression searches to the end for each quote that is never closed; so many are looked up all at once.
    closing: dict[str, list[int]] = {}
    words, end = [], 0
    while found := _WORD.search(text, end):
        start, end = found.span()
        quote = text[start]
        if quote in _CLOSING:
            if quote not in closing:
                closing[quote] = [match.start() for match in _CLOSING[quote].finditer(text)]
            following = bisect_right(closing[quote], start)
            if following < len(closing[quote]):
                end = closing[quote][following] + 1
        words.append(text[start:end])
    return words


def unquoted(word: str) -> str:
    """A value without the quotes around it."""
    return word[1:-1] if len(word) > 1 and word[0] in "'\"" and word[-1] == word[0] else word
