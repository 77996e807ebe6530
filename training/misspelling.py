"""Typing errors: what haste makes of a sentence, so that the reader learns to see through it."""

from collections.abc import Mapping
from random import Random

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEIGHBOURS: Mapping[str, str] = {
    letter: "".join(
        row[column]
        for row in _KEYS[max(0, r - 1) : r + 2]
        for column in range(max(0, c - 1), min(len(row), c + 2))
        if row[column] != letter
    )
    for r, keys in enumerate(_KEYS)
    for c, letter in enumerate(keys)
}


def misspell(text: str, rng: Random, often: float = 0.35) -> str:
    """Type a sentence in haste: with probability `often`, one to three errors in its words."""
    if rng.random() >= often:
        return text
    if rng.random() < 0.25:
        text = _run_together(text, rng)
    words = text.split(" ")
    for _ in range(rng.choices((1, 2, 3, 4), (55, 28, 12, 5))[0]):
        # Longer words are mistyped more often, and the shortest hold the sense ("no", "off").
        at = rng.choices(range(len(words)), [max(0.05, len(w) - 2.5) for w in words])[0]
        words[at] = _mistype(words[at], rng)
    text = " ".join(words)
    if rng.random() < 0.08:  # a forgotten blank
        blanks = [i for i, letter in enumerate(text) if letter == " "]
        if blanks:
            blank = rng.choice(blanks)
            text = text[:blank] + text[blank + 1 :]
    return text


_CONFUSED: Mapping[str, str] = {
    "off": "of", "too": "to", "than": "then", "then": "than", "your": "youre", "their": "there",
    "of": "off", "to": "too", "her": "he", "the": "teh", "his": "is", "its": "it",
    "you": "u", "please": "plese", "are": "r", "could": "cud", "with": "wit", "and": "an",
    "slightly": "slighty", "somewhat": "sumwhat", "moderately": "moderatly", "little": "litle",
    "extremely": "extremly", "noticeably": "noticably", "considerably": "considerbly",
    "way": "wayy", "much": "mutch",
}  # fmt: skip
# Said often and written carelessly: how much.
_CARELESS: Mapping[str, tuple[str, ...]] = {
    "a bit": ("abit", "a bti", "a bitt", "bit"), "a lot": ("alot", "a lto", "allot", "lot"),
    "a little": ("alittle", "a lil", "a littel", "little"), "a tad": ("atad", "tad"),
    "way too": ("way to", "wayto"), "far too": ("far to", "farr too"), "too": ("to", "tooo"),
    "as much as": ("as much", "asmuch as"), "a touch": ("a tuch", "touch"),
}  # fmt: skip


def _run_together(text: str, rng: Random) -> str:
    """Write one expression of size carelessly, where the text has one: "alot", "way to long"."""
    found = [said for said in _CARELESS if f" {said} " in f" {text} "]
    if not found:
        return text
    said = rng.choice(found)
    return f" {text} ".replace(f" {said} ", f" {rng.choice(_CARELESS[said])} ", 1)[1:-1]


def _mistype(word: str, rng: Random) -> str:
    if len(word) < 2:
        return word
    if word in _CONFUSED and rng.random() < 0.4:
        return _CONFUSED[word]
    at = rng.randrange(len(word) - 1)
    kind = rng.choice(
        ("drop", "drop", "swap", "swap", "double", "neighbour", "neighbour", "extra", "vowel")
    )
    if kind == "drop":
        at = rng.randrange(len(word))
        return word[:at] + word[at + 1 :]
    if kind == "swap":
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == "double":
        return word[: at + 1] + word[at:]
    near = rng.choice(_NEIGHBOURS.get(word[at].lower(), word[at]))
    if kind == "extra":
        return word[: at + 1] + near + word[at + 1 :]
    if kind == "vowel":
        vowels = [i for i, letter in enumerate(word) if letter in "aeiou"]
        if vowels:
            at = rng.choice(vowels)
            near = rng.choice("aeiou")
    return word[:at] + near + word[at + 1 :]
