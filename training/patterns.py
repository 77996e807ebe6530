"""Patterns of sentences: the notation of the phrase files, and its expansion.

`(a|b)` picks one, `[a]` is left out half the time, `{slot}` is filled from a list; phrases are
separated by `;`.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from transmitter.text import tokenise

_FOLDER = Path(__file__).parent


@cache
def split(text: str) -> tuple[str, ...]:
    """The phrases of a `;`-separated list."""
    return tuple(" ".join(part.split()) for part in text.split(";") if part.strip())


@cache
def phrases(name: str) -> dict[str, Any]:
    """A phrase file of this folder, read once; every string is still a `;`-separated list."""
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text("utf-8"))


_FILES = ("phrases", "grammar", "out_of_scope")
_SYNTAX = re.compile(r"\{\w+\}|#.*|[][(){}|;=\"]")


def vocabulary() -> tuple[str, ...]:
    """Every word of the phrase files, in alphabetical order."""
    text = " ".join((_FOLDER / f"{name}.toml").read_text("utf-8") for name in _FILES)
    return tuple(sorted({word for word in tokenise(_SYNTAX.sub(" ", text)) if word[0].isalpha()}))


# A parsed pattern: ("text", s), ("slot", name), ("all", nodes), ("one", nodes) or ("maybe", node).
Node = tuple[Any, ...]


@cache
def parse(pattern: str) -> Node:
    """The pattern as a tree. Raises ValueError where a bracket is not closed."""
    return _parse_choice(pattern, 0, "")[0]


def _parse_choice(text: str, at: int, closing: str) -> tuple[Node, int]:
    choices: list[Node] = []
    parts: list[Node] = []
    start = at
    while True:
        letter = text[at : at + 1]
        if letter and letter not in "([{|" + (closing or "|"):
            at += 1
            continue
        if at > start:
            parts.append(("text", text[start:at]))
        if not letter and closing:
            raise ValueError(f"{text!r} ends before its {closing!r}")
        if letter in ("", closing):
            choices.append(("all", tuple(parts)))
            node = choices[0] if len(choices) == 1 else ("one", tuple(choices))
            return node, at + len(letter)
        if letter == "|":
            choices.append(("all", tuple(parts)))
            parts = []
            at += 1
        elif letter == "{":
            end = text.index("}", at)
            parts.append(("slot", text[at + 1 : end]))
            at = end + 1
        else:
            inner, at = _parse_choice(text, at + 1, ")" if letter == "(" else "]")
            parts.append(("maybe", inner) if letter == "[" else inner)
        start = at


def expand(pattern: str, slots: Mapping[str, str], rng: Random) -> str:
    """One sentence of a pattern; a slot's value is a `;`-separated list of patterns."""
    found: list[str] = []
    _expand(parse(pattern), slots, rng, found)
    return " ".join("".join(found).split())


def _expand(node: Node, slots: Mapping[str, str], rng: Random, out: list[str]) -> None:
    kind, value = node
    if kind == "text":
        out.append(value)
    elif kind == "all":
        for part in value:
            _expand(part, slots, rng, out)
    elif kind == "one":
        _expand(rng.choice(value), slots, rng, out)
    elif kind == "maybe":
        if rng.random() < 0.5:
            _expand(value, slots, rng, out)
    else:
        _expand(parse(rng.choice(split(slots[value]) or ("",))), slots, rng, out)


_ARTICLE = re.compile(r"\b(a|the|his|her|my) (an?|the|his|her|my|its) ")
_VOWEL = re.compile(r"\ba (?=[aeiou])")


def tidy(text: str) -> str:
    """Mend the articles where patterns met: "a the", "a older"."""
    text = _ARTICLE.sub(r"\2 ", text)
    return _VOWEL.sub("an ", text)
