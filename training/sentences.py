"""The training grammar of the sentence reader: an endless supply of labelled sentences.

The words lie in `phrases.toml` (the five attributes), `grammar.toml` (how requests are put
together) and `out_of_scope.toml` (what is refused). Here: request -> politeness -> typing errors.
Everything is drawn from the `random.Random` it is given.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

from shared.attributes import ATTRIBUTES, MAX_DEGREE, Attribute, Edit
from shared.errors import InvalidRequest
from training.misspelling import misspell
from training.patterns import Node, expand, parse, phrases, split, tidy
from transmitter.text import DIRECTIONS, MODES, SCOPES

DEV_SET = Path(__file__).parent / "sentences_dev.jsonl"

UNSET = -1  # a label that the sentence does not have; the loss skips it


@dataclass(frozen=True)
class Sentence:
    """A sentence and its labels, each an index into the text encoder's classes or UNSET."""

    text: str
    scope: int
    attribute: int = UNSET
    mode: int = UNSET
    direction: int = UNSET
    size: int = UNSET  # size - 1
    target: int = UNSET

    @property
    def labels(self) -> tuple[int, ...]:
        """In the order of `transmitter.text.Heads`."""
        return self.scope, self.attribute, self.mode, self.direction, self.size, self.target

    @property
    def edit(self) -> Edit | None:
        """What it asks for; None where it must be refused."""
        if self.scope != SCOPES.index("in"):
            return None
        attribute = ATTRIBUTES[self.attribute]
        if MODES[self.mode] == "target":
            return Edit(attribute, target=self.target)
        sign = 1 if DIRECTIONS[self.direction] == "more" else -1
        return Edit(attribute, change=sign * (self.size + 1))


def labelled(text: str, edit: Edit | None, several: bool = False) -> Sentence:
    """A sentence whose answer is `edit`, or that must be refused where it is None."""
    if edit is None:
        return Sentence(text, SCOPES.index("several" if several else "out"))
    asked = (edit.attribute.index, MODES.index(edit.mode))
    if edit.value is None or edit.direction is None:
        assert edit.target is not None
        return Sentence(text, 0, *asked, target=edit.target)
    return Sentence(text, 0, *asked, DIRECTIONS.index(edit.direction), edit.value - 1)


def make_sentence(rng: Random) -> Sentence:
    """One labelled sentence: 71 % in scope, 25 % out of it, 4 % that ask for two edits."""
    draw = rng.random()
    if draw < 0.71:
        sentence = _in_scope(rng)
    elif draw < 0.96:
        sentence = labelled(wrap(_out_of_scope(rng), rng, 0.35), None)
    else:
        sentence = labelled(wrap(_several(rng), rng, 0.5), None, several=True)
    return replace(sentence, text=misspell(punctuate(sentence.text, rng), rng))


def _in_scope(rng: Random) -> Sentence:
    attribute = rng.choice(ATTRIBUTES)
    if rng.random() < 0.6:
        edit = _draw_change(attribute, rng)
        text = _change(edit, rng)
        if edit.value == 3 and rng.random() < 0.02:  # a plain request, softened afterwards
            edit = Edit(attribute, change=1 if edit.direction == "more" else -1)
            text += f" {rng.choice(_SOFTENED)}"
        elif rng.random() < 0.06:
            text = f"{_complaint(edit, rng)}{rng.choice(_STOPS)}{_followed_up(edit, rng)}"
        elif rng.random() < 0.08:
            text = f"{_remark(edit, rng)}{rng.choice(_STOPS)}{_followed_up(edit, rng)}"
        elif rng.random() < 0.02:
            wrong = Edit(attribute, change=-(edit.change or 1))
            text = f"{_change(wrong, rng)}, {_around('take_back', rng)} {text}"
    else:
        edit = Edit(attribute, target=rng.randint(0, MAX_DEGREE))
        text = _target(edit, rng)
        if rng.random() < 0.06 and attribute is not Attribute.AGE:
            text = f"{_remark(edit, rng)}{rng.choice(_STOPS)}{text}"
    if rng.random() < 0.06:
        others = split(phrases("grammar")["around"]["kept"])
        kept = rng.choice([word for word in others if word not in _OWN_WORDS[attribute]])
        text = expand(_around("keep", rng), {"X": text, "K": kept}, rng)
    return labelled(wrap(text, rng, 0.5), edit)


_STOPS = (". ", ". ", ", ", " ", ", so ", ". so ", ", please ")
_SOFTENED = ("but not too much", "but only a little", "but just a bit", "not by much",
             "just a little", "but only slightly", "nothing too drastic")  # fmt: skip
_OWN_WORDS: Mapping[Attribute, tuple[str, ...]] = {
    Attribute.BANGS: ("bangs", "fringe", "hair"),
    Attribute.EYEGLASSES: ("glasses", "eyes"),
    Attribute.BEARD: ("beard", "moustache"),
    Attribute.SMILING: ("smile", "lips", "expression"),
    Attribute.AGE: ("age", "face", "skin", "identity"),
}


def _around(name: str, rng: Random) -> str:
    pattern = rng.choice(split(phrases("grammar")["around"][name]))
    if name == "keep":  # its slots are filled by the caller
        return pattern
    return expand(pattern, {"w": rng.choice(_neutral()), **phrases("grammar")["people"]}, rng)


def _draw_change(attribute: Attribute, rng: Random) -> Edit:
    size = rng.choices((1, 2, 3, 4, 5), (15, 13, 42, 16, 14))[0]
    return Edit(attribute, change=size if rng.random() < 0.5 else -size)


def _slots(attribute: Attribute, rng: Random, nouns: str | None = None) -> dict[str, str]:
    """The slots that a sentence about the attribute may use, its nouns agreeing in number.

    nouns: the list of `phrases.toml` to take the noun from, where any of the attribute will not do.
    """
    words = phrases("phrases")[attribute]
    people = phrases("grammar")["people"]
    if nouns is not None and nouns in words:
        noun = rng.choice(split(words[nouns]))
        singular = not noun.endswith("s")
    else:
        singular = attribute is Attribute.AGE or rng.random() < 0.6
        noun = rng.choice(split(words["nouns" if singular else "plurals"]))
    owner = "the" if " {his}" in noun else "{his}"
    articled = f"{owner} {noun};{owner} {noun};the {noun};{noun}"
    if rng.random() < 0.08:
        articled = f"{owner} {rng.choice(split(people['rude']))} {noun}"
    return {
        **people,
        "G": people["nice"],
        "N": noun,
        "O": articled,
        "a": "a" if singular else "",
        "be": "is" if singular else "are",
        "it": "it" if singular else "them",
        "it_is": "it is" if singular else "they are",
    }


def _sized(slots: dict[str, str], edit: Edit, of_person: bool = False) -> dict[str, str]:
    """Add the slots that depend on the direction and the size."""
    words, ladder = phrases("phrases")[edit.attribute], phrases("grammar")["ladder"]
    assert edit.value is not None
    row = {name: rows[edit.value - 1] for name, rows in ladder.items()}
    way, back = (edit.direction, "less" if edit.direction == "more" else "more")
    pronoun = "it" if slots["be"] == "is" else "them"
    # "Make him happier", but "make the smile wider": some words describe the person alone.
    him = "him_" if of_person and "him_more" in words else ""
    return {
        **slots,
        **row,
        "C": words[f"{him}{way}"],
        "C2": words[f"{him}{way}"],
        "C0": words[f"{him}{back}"],
        "A": words[f"{him}is_{way}"],
        "B": words[f"{him}is_{back}"],
        "V": words[f"do_{way}"],
        "S": words["sizes"],
        "it_verb": f"make {pronoun} {{pre}} {{C}};do something about {pronoun};fix {pronoun}",
    }


@cache
def _change_patterns(
    attribute: Attribute, way: str
) -> tuple[tuple[tuple[str, ...], bool, float], ...]:
    """Families of patterns: the patterns, whether they describe the person, the weight."""
    words, steps = phrases("phrases")[attribute], phrases("grammar")["steps"]
    families = [(split(words[f"say_{way}"]), False, 0.34), (split(steps["named"]), False, 0.45)]
    families.append((split(steps[f"sizes_{way}"]), False, 0.06))
    if words["countable"]:
        families.append((split(steps[f"of_{way}"]), False, 0.12))
    if words["person"]:
        weight = 0.35 if attribute is Attribute.AGE else 0.18
        families.append((split(steps["person"]), True, weight))
    return tuple(families)


def _change(edit: Edit, rng: Random) -> str:
    """A sentence that asks for this change."""
    assert edit.value is not None
    assert edit.direction is not None
    attribute, way = edit.attribute, edit.direction
    words, grammar = phrases("phrases")[attribute], phrases("grammar")
    slots = _sized(_slots(attribute, rng), edit)
    exact = _exact(attribute).get(edit.change or 0)
    if exact and rng.random() < (0.12 if edit.value == 3 else 0.2):
        return tidy(expand(rng.choice(exact), slots, rng))
    if way == "more" and edit.value == 3 and attribute is not Attribute.AGE and rng.random() < 0.3:
        if rng.random() < 0.25:
            slots |= {"D": words["does"], "DG": words["doing"]}
            return tidy(expand(rng.choice(split(grammar["targets"]["does"])), slots, rng))
        slots |= _slots(attribute, rng, "whole")
        return tidy(expand(rng.choice(split(phrases("phrases")["any"]["add"])), slots, rng))
    plain = words.get(f"plain_{way}")
    if edit.value == 3 and plain is not None and rng.random() < 0.12:
        slots["A"] = plain
        return tidy(expand(rng.choice(split(grammar["steps"]["plain"])), slots, rng))
    if edit.value == 3 and words["person"] and rng.random() < 0.06:  # "Older."
        return rng.choice(split(words.get(f"him_{way}", words[way])))
    if edit.value == 5 and rng.random() < (0.25 if way == "more" else 0.1):
        family = "most_person" if words["person"] and rng.random() < 0.5 else "most"
        slots = _sized(slots, edit, of_person=family == "most_person")
        return tidy(expand(rng.choice(split(grammar["steps"][family])), slots, rng))
    families = _change_patterns(attribute, way)
    patterns, of_person, _ = rng.choices(families, [weight for _, _, weight in families])[0]
    if edit.value != 3:
        patterns = _with_size(patterns)
    if of_person:
        slots = _sized(slots, edit, of_person=True)
    return tidy(expand(rng.choice(patterns), slots, rng))


@cache
def _with_size(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Only the patterns that always tell a size: a slot of the ladder outside `(a|b)` and `[a]`."""
    return tuple(p for p in patterns if _always_sized(parse(p)))


def _always_sized(node: Node) -> bool:
    kind, value = node
    if kind == "slot":
        return value in phrases("grammar")["ladder"]
    if kind == "all":
        return any(_always_sized(part) for part in value)
    return kind == "one" and all(_always_sized(part) for part in value)


@cache
def _exact(attribute: Attribute) -> dict[int, tuple[str, ...]]:
    """Requests of a fixed signed size; for age, amounts of years."""
    words = phrases("phrases")[attribute]
    found = {int(size): split(text) for size, text in words.get("exact", {}).items()}
    for size, spans in words.get("spans", {}).items():
        amount = "(" + "|".join(split(spans)) + ")"
        for sign, name in ((1, "years_more"), (-1, "years_less")):
            patterns = split(words[name])
            years = tuple(p.replace("{Y}", amount) for p in patterns)
            worded = found.get(sign * int(size), ())
            # Half of the draws from either list, whatever their lengths.
            found[sign * int(size)] = years + worded * max(1, len(years) // max(1, len(worded)))
    return found


def _complaint(edit: Edit, rng: Random) -> str:
    """What is wrong now, where `edit` would mend it; of any strength."""
    strength = rng.choice((1, 3, 3, 4))
    slots = _sized(
        _slots(edit.attribute, rng),
        replace(edit, change=strength * (1 if edit.direction == "more" else -1)),
    )
    return tidy(expand("{O} {be} {too} {B}", slots, rng))


def _remark(edit: Edit, rng: Random) -> str:
    """A remark on what the request is about."""
    change = edit if edit.change is not None else _draw_change(edit.attribute, rng)
    slots = _sized(_slots(edit.attribute, rng), change)
    return tidy(expand(rng.choice(split(phrases("grammar")["remarks"]["named"])), slots, rng))


def _followed_up(edit: Edit, rng: Random) -> str:
    """The request after a complaint, which may leave the noun to it."""
    if rng.random() < 0.4:
        return _change(edit, rng)
    slots = _sized(_slots(edit.attribute, rng), edit)
    slots |= {"O": "it;them;that", "it": "it;them;that"}
    return tidy(expand(rng.choice(split(phrases("grammar")["steps"]["following"])), slots, rng))


_AGES = ((1, 12), (13, 19), (20, 39), (40, 49), (50, 69), (70, 100))  # of the degrees of age
_TEENS = split(
    "zero; one; two; three; four; five; six; seven; eight; nine; ten; eleven; twelve; thirteen;"
    "fourteen; fifteen; sixteen; seventeen; eighteen; nineteen"
)
_TENS = split("twenty; thirty; forty; fifty; sixty; seventy; eighty; ninety; a hundred")


def _years_old(degree: int, rng: Random) -> str:
    """A number of years that means this degree of age, in digits or in words."""
    low, high = _AGES[degree]
    years = rng.choice((rng.randint(low, high), 5 * rng.randint(-(-low // 5), high // 5)))
    if rng.random() < 0.5:
        return str(years)
    if years < 20:
        return _TEENS[years]
    unit = years % 10
    return _TENS[years // 10 - 2] + (f" {_TEENS[unit]}" if unit else "")


def _target(edit: Edit, rng: Random) -> str:
    """A sentence that asks for this target."""
    words, grammar = phrases("phrases")[edit.attribute], phrases("grammar")["targets"]
    degree = str(edit.target)
    slots = _slots(edit.attribute, rng)
    if edit.target == 0 and edit.attribute is not Attribute.AGE and rng.random() < 0.45:
        if rng.random() < 0.25:
            slots |= {"D": words["does"], "DG": words["doing"]}
            return tidy(expand(rng.choice(split(grammar["never"])), slots, rng))
        slots = _slots(edit.attribute, rng, "worn" if "worn" in words else "whole")
        return tidy(expand(rng.choice(split(phrases("phrases")["any"]["remove"])), slots, rng))
    if edit.attribute is Attribute.AGE and rng.random() < 0.33:
        slots["n"] = _years_old(edit.target or 0, rng)
        return tidy(expand(rng.choice(split(grammar["at_age"])), slots, rng))
    families = [("says", None, 0.3), ("things", "have", 0.5), ("is", "be", 0.45)]
    if edit.attribute is Attribute.AGE:
        families[1] = ("things", "have", 0.12)
    families = [f for f in families if words.get(f[0], {}).get(degree)]
    kind, frame, _ = rng.choices(families, [f[2] for f in families])[0]
    pattern = rng.choice(split(words[kind][degree]))
    if frame is not None:
        slots["X"] = pattern
        # What it is now, or is not to be: any other degree.
        other = rng.choice([name for name in words["things"] if name != degree])
        slots["X0"] = rng.choice(split(words[kind].get(other) or words["things"][other]))
        pattern = rng.choice(split(grammar[frame]))
        if pattern.startswith("{X}") and rng.random() < 0.5:  # "Pensioner."
            slots["X"] = re.sub(r"^an? ", "", slots["X"])
    return tidy(expand(pattern, slots, rng))


_SHARED_VERBS = split(
    "add; give {him}; remove; no; without; more; less; longer; bigger; take off; get rid of {his};"
    "{he} should have; thicker; shorter; a bit less; much more; trim {his}"
)


def _several(rng: Random) -> str:
    """Two edits of different attributes in one sentence."""
    first, second = rng.sample(ATTRIBUTES, 2)
    join = _around("join", rng)
    draw = rng.random()
    if draw < 0.25:  # two nouns under one verb
        slots = _slots(first, rng)
        other = _slots(second, rng)
        verb = rng.choice(_SHARED_VERBS)
        article = rng.choice(("", "", "a "))
        return tidy(
            expand(f"{verb} {article}{slots['N']} {join} {article}{other['N']}", slots, rng)
        )
    if draw < 0.4:  # two comparatives, or what to be, under one verb
        a = _sized(_slots(first, rng), _draw_change(first, rng), of_person=True)
        b = _sized(_slots(second, rng), _draw_change(second, rng), of_person=True)
        one, two = (
            "{pre} {C}" if phrases("phrases")[x]["person"] else "with {pre} {C} {N}"
            for x in (first, second)
        )
        start = rng.choice(("make {him} ", "{he} should be ", "", "", "I want {him} "))
        return tidy(f"{expand(start + one, a, rng)} {join} {expand(two, b, rng)}")
    requests = [
        _target(Edit(x, target=rng.randint(0, MAX_DEGREE)), rng)
        if rng.random() < 0.35
        else _change(_draw_change(x, rng), rng)
        for x in (first, second)
    ]
    return f"{requests[0]} {join} {requests[1]}"


def _out_of_scope(rng: Random) -> str:
    out = phrases("out_of_scope")
    kind = rng.choices(
        (
            "requests",
            "picture",
            "chat",
            "words_of_ours",
            "vague",
            "soup",
            "code",
            "foreign",
            "fuzz",
        ),
        (34, 11, 14, 19, 7, 7, 3, 3, 2),
    )[0]
    if kind in ("code", "foreign"):  # taken as they are: brackets mean nothing here
        return rng.choice(split(out[kind]))
    if kind == "soup":
        return " ".join(
            rng.choice(_common()) for _ in range(rng.choice((1, 1, 1, 2, 3, 4, 5, 7, 9)))
        )
    if kind == "fuzz":
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        return " ".join(
            "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))
            for _ in range(rng.randint(1, 5))
        )
    slots = dict(phrases("grammar")["people"])
    size = rng.randrange(5) if rng.random() < 0.6 else 2
    slots |= {name: rows[size] for name, rows in phrases("grammar")["ladder"].items()}
    source = rng.random()
    if source < 0.85:
        thing = rng.choice(split(out["near" if source < 0.35 else "things"]))
    else:
        thing = rng.choice(_common())
    slots |= {
        "T": thing,
        "O2": f"{{his}} {thing};the {thing};{thing}",
        "C2": out["more_less"],
        "W": out["looks"],
        "a": "a",
    }
    return tidy(expand(rng.choice(split(out[kind])), slots, rng))


@cache
def _common() -> tuple[str, ...]:
    return tuple(phrases("out_of_scope")["common"].split())


@cache
def _neutral() -> tuple[str, ...]:
    """Lists of words that change no request: a word by itself is no sign of being out of scope."""
    excepted = phrases("out_of_scope")["telling"].split()
    words = [word for word in _common() if word not in excepted]
    return tuple(";".join(words[i::16]) for i in range(16))


def wrap(text: str, rng: Random, amount: float) -> str:
    """Context and politeness around a request; `amount` is the probability of each."""
    if rng.random() < amount * 0.8:
        text = f"{_around('before', rng)} {text}"
        if rng.random() < 0.12:
            text = f"{_around('before', rng)} {text}"
    if rng.random() < amount * 0.5:
        text = f"{text}{rng.choice((' ', ' ', ', '))}{_around('after', rng)}"
    if rng.random() < amount * 0.2:
        text = f"{_around('context', rng)}{rng.choice(('. ', '. ', ', ', ' '))}{text}"
    return text


def punctuate(text: str, rng: Random) -> str:
    draw = rng.random()
    if draw < 0.35:
        return text
    return (
        text
        + rng.choices(
            (".", "!", "?", "...", "!!", "?!", " :)", " ;)"), (50, 15, 12, 5, 4, 2, 3, 1)
        )[0]
    )


def read_sentences(path: Path) -> list[Sentence]:
    """Labelled sentences from JSON lines.

    The fields: text, in_scope, attribute, mode, and direction and size or target; a line without
    an attribute is out of scope.
    A line with `"reason": "several"` asks for two edits. Raises ValueError naming the bad line.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            edit = None
            if row.get("in_scope", row.get("attribute") is not None):
                attribute = Attribute.parse(row["attribute"])
                if row["mode"] == "target":
                    edit = Edit(attribute, target=int(row["target"]))
                else:
                    sign = {"more": 1, "less": -1}[row["direction"]]
                    edit = Edit(attribute, change=sign * int(row["size"]))
            found.append(labelled(row["text"], edit, row.get("reason") == "several"))
        except (ValueError, KeyError, InvalidRequest) as error:
            raise ValueError(f"{path}, line {number}: {error!r} in {line[:80]!r}") from error
    return found
