"""Written sentences: the corpus beside the grammar, and how its sentences are varied.

`sentences_written.tsv` has one sentence a line, `LABEL<TAB>TEXT`, each composed by an AI model (no
person wrote any, and no template made them). The labels::

    be+3  ey-1  sm=4    a change of +3, of -1; the target degree 4; of ba ey be sm ag
    out   sev           to be refused: something else, or two edits of different attributes

Every tenth sentence, by its hash, is held out of training: the recipe sets its threshold there.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from zlib import crc32

from shared.attributes import ATTRIBUTES, Attribute, Edit
from shared.errors import InvalidRequest
from training.misspelling import misspell
from training.patterns import split
from training.sentences import Sentence, labelled, punctuate, wrap
from transmitter.text import SCOPES, tokenise

WRITTEN = Path(__file__).parent / "sentences_written.tsv"
_HELD_OUT = 10  # one in so many

_LABEL = re.compile(r"(ba|ey|be|sm|ag)(?:([+-][1-5])|=([0-5]))")
_CODES: Mapping[str, Attribute] = {attribute[:2]: attribute for attribute in ATTRIBUTES}


def parse_label(label: str, text: str) -> Sentence:
    """A sentence with its label in the notation above. Raises ValueError for any other."""
    if label in ("out", "sev"):
        return labelled(text, None, several=label == "sev")
    found = _LABEL.fullmatch(label)
    if found is None:
        raise ValueError(f"label is {label!r}; expected out, sev or such as be+3, ey-1, sm=4")
    code, change, target = found.groups()
    edit = Edit(_CODES[code], int(change)) if change else Edit(_CODES[code], target=int(target))
    return labelled(text, edit)


@cache
def read_written(path: Path = WRITTEN) -> tuple[Sentence, ...]:
    """All written sentences. Raises ValueError naming the bad line."""
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            label, text = line.split("\t")
            if not tokenise(text):
                raise ValueError("expected words")
            found.append(parse_label(label, text))
        except (ValueError, InvalidRequest) as error:
            raise ValueError(f"{path}, line {number}: {error} in {line[:80]!r}") from error
    return tuple(found)


def held_out(text: str) -> bool:
    """Whether a sentence is kept from training; the same for every spelling of its case."""
    return crc32(" ".join(tokenise(text)).encode()) % _HELD_OUT == 0


@cache
def split_written(path: Path = WRITTEN) -> tuple[tuple[Sentence, ...], tuple[Sentence, ...]]:
    """The sentences to train on, and those held out."""
    sentences = read_written(path)
    kept = tuple(s for s in sentences if not held_out(s.text))
    return kept, tuple(s for s in sentences if held_out(s.text))


@cache
def written_words(path: Path = WRITTEN) -> tuple[str, ...]:
    """Words of at least two training sentences, so that few typing errors are among them."""
    counts = Counter(word for s in split_written(path)[0] for word in set(tokenise(s.text)))
    return tuple(sorted(w for w, count in counts.items() if count > 1 and w[0].isalpha()))


@cache
def _weights(path: Path) -> tuple[float, ...]:
    """How often each training sentence is drawn: rare labels more often than their share."""
    kept, _ = split_written(path)
    counts = Counter(s.labels for s in kept)
    # Each label as a whole is drawn in proportion to the root of its sentences; refusals, which
    # are of endless kinds, in proportion to their number.
    middle = sorted(counts.values())[len(counts) // 2]
    return tuple(
        1.0 if s.scope != SCOPES.index("in") else min(4.0, (middle / counts[s.labels]) ** 0.5)
        for s in kept
    )


@cache
def _summed(path: Path) -> tuple[float, ...]:
    total, sums = 0.0, []
    for weight in _weights(path):
        total += weight
        sums.append(total)
    return tuple(sums)


def draw_written(rng: Random, path: Path = WRITTEN) -> Sentence:
    """A written sentence of the training part, varied; or two of them in one, to be refused."""
    kept, _ = split_written(path)
    draw = rng.random()
    if draw < 0.02:
        joined = _joined(rng, kept)
        if joined is not None:
            return joined
    elif draw < 0.06 and (complaints := _complaints(path)):
        return vary(with_a_cure(rng.choice(complaints), rng), rng)
    sentence = rng.choices(kept, cum_weights=_summed(path))[0]
    if sentence.edit is not None:
        draw = rng.random()
        if draw < 0.15:
            sentence = of_another(sentence, rng)
        elif draw < 0.22:
            sentence = of_no_person(sentence, rng)
    return vary(sentence, rng)


def _joined(rng: Random, kept: Sequence[Sentence]) -> Sentence | None:
    one, other = rng.choices(kept, k=2)
    if one.edit is None or other.edit is None or one.attribute == other.attribute:
        return None
    join = rng.choice((". ", " and ", ", ", ". also ", " then ", ", plus ", " and also "))
    first = one.text.rstrip(" .!?")
    return labelled(misspell(f"{first}{join}{other.text}".lower(), rng), None, several=True)


# What one says after a complaint; its size is the complaint's.
_CURES: Mapping[Attribute, Mapping[str | None, str]] = {
    Attribute.BANGS: {
        "more": "bring them down;longer please;make them fuller;let it grow;lengthen it",
        "less": "shorten them;trim it;shorter please;thin them out;take it up;cut it",
    },
    Attribute.EYEGLASSES: {
        "more": "bulk them up;thicker please;make them heavier;darken them",
        "less": "slim them down;thinner please;tone them down;lighter ones",
    },
    Attribute.BEARD: {
        "more": "grow it out;longer please;thicken it;make it fuller;bulk it up",
        "less": "shorten it;trim it;thin it out;tidy it up;shave some off;cut it back",
    },
    Attribute.SMILING: {
        "more": "cheer him up;turn it up;make him smile more;brighten his face",
        "less": "tone it down;turn it down;make her smile less;more serious please",
    },
    Attribute.AGE: {
        "more": "age him up;older please;make her older;add some years;age them",
        "less": "make her younger;younger please;take some years off;de-age him",
    },
}


@cache
def _complaints(path: Path) -> tuple[Sentence, ...]:
    """Training sentences that only complain, and say how much."""
    return tuple(
        s
        for s in split_written(path)[0]
        if s.edit is not None
        and s.edit.value not in (3, None)
        and re.search(r"\btoo\b", s.text)
        and not re.search(r"[,.;:!?-] *[A-Za-z]", s.text)
    )


def with_a_cure(complaint: Sentence, rng: Random) -> Sentence:
    """ "The fringe is far too short. Bring it down": as much as the complaint alone asks for."""
    edit = complaint.edit
    assert edit is not None
    cure = rng.choice(split(_CURES[edit.attribute][edit.direction]))
    join = rng.choice((". ", ", ", "; ", " - ", ", so ", ", please ", " "))
    return labelled(f"{complaint.text.rstrip(' .!?')}{join}{cure}", edit)


# What an edit is about, and things that no edit of ours is about but that are asked for alike.
_NOUNS: Mapping[Attribute, tuple[re.Pattern[str], str]] = {
    Attribute.BANGS: (
        re.compile(r"\b(bangs|fringe)\b"),
        "hair;eyebrows;ponytail;eyelashes;skirt;curls;scarf;ears;hat;ties;braids;sleeves",
    ),
    Attribute.EYEGLASSES: (
        re.compile(
            r"\b(eyeglasses|sunglasses|glasses|specs|spectacles|frames|frame|rims|shades)\b"
        ),
        "earrings;hat;necklace;headphones;scarf;eyebrows;lips;make-up;hoodie;ears;cap;lashes",
    ),
    Attribute.BEARD: (
        re.compile(r"\b(beard|moustache|mustache|stubble|whiskers|facial hair)\b"),
        "hair;eyebrows;chin;hat;tie;nose;ponytail;jaw;lipstick;neck;lashes;tattoo;scar",
    ),
    Attribute.SMILING: (
        re.compile(r"\b(smile|grin|smiling|grinning)\b"),
        "nose;mouth;lips;tan;eyes;chin;hat;make-up;dimples;cheeks;frown lines;picture",
    ),
    Attribute.AGE: (
        re.compile(r"\b(older|younger|aged|young|old|wrinkles|youthful)\b"),
        "slimmer;taller;prettier;blonder;paler;fatter;freckles;stronger;darker;bald;blond;tall",
    ),
}
_TWINS = {Attribute.BANGS: Attribute.BEARD, Attribute.BEARD: Attribute.BANGS}
_TWIN_NOUNS = {Attribute.BANGS: "bangs;fringe", Attribute.BEARD: "beard;moustache;beard"}
_OURS = re.compile(
    r"\b(?:bang|fring|glass|spec|frame|rim|lens|shade|beard|m[uo]+sta|stubbl|whisker|shav|goatee|razor|"
    "smil|grin|laugh|happ|cheer|serious|beam|teeth|old|young|age|year|wrinkl|teen|child|kid|bab)"
)
_PLACES = re.compile("forehead|brow|hair|eyes|face|chin|lip|cheek|shave|barber")


def of_another(sentence: Sentence, rng: Random) -> Sentence:
    """The same request about another thing, to be refused: "trim his beard", "trim his tie".

    Some of those about bangs or a beard become one about the other instead. As it was, where
    more than the one noun tells what it is about.
    """
    edit = sentence.edit
    assert edit is not None
    pattern, others = _NOUNS[edit.attribute]
    text = sentence.text.lower()
    found = pattern.findall(text)
    if len(found) != 1 or _OURS.search(pattern.sub("", text)):
        return sentence
    twin = _TWINS.get(edit.attribute)
    if twin is not None and rng.random() < 0.4:
        if edit.target not in (0, None) or _PLACES.search(text):
            return sentence
        other = rng.choice(_TWIN_NOUNS[twin].split(";"))
        return labelled(pattern.sub(other, text), replace(edit, attribute=twin))
    return labelled(pattern.sub(rng.choice(others.split(";")), text), None)


# Not the person whose face is edited.
_OTHERS = split(
    "the cat;the dog;my dog;the horse;the teddy bear;the snowman;the statue;the doll;the garden;"
    "the house;the car;the tree;the sun;the moon;the robot;the monkey;the parrot;the wall;the room;"
    "the man in the background;the woman behind him;the person next to her;the other person;"
    "the baby in the pram;the guy on the left;everyone in the background;my plants;the painting"
)
_PERSON = re.compile(r"\b(he|him|his)\b(?!')")


def of_no_person(sentence: Sentence, rng: Random) -> Sentence:
    """The same request about an animal or a thing, to be refused: "give the cat a beard".

    As it was, where it names nobody by "he" or "she".
    """
    text = sentence.text.lower()
    if re.search(r"\b(she|her)\b", text):
        text = _her_to_him(text)
    found = _PERSON.findall(text)
    if len(found) != 1 or _RELATIVE.search(text):  # the person after all
        return sentence
    other = rng.choice(_OTHERS)
    own = other + ("'" if other.endswith("s") else "'s")
    return labelled(_PERSON.sub(own if found[0] == "his" else other, text), None)


def vary(sentence: Sentence, rng: Random) -> Sentence:
    """The same request in other words: people, nouns, sizes, padding, punctuation, errors."""
    text = " ".join(sentence.text.lower().replace("\u2019", "'").split())
    if rng.random() < 0.35:
        text = _swap_people(text, sentence.attribute == Attribute.AGE.index, rng)
    if rng.random() < 0.3:
        text = _swap_nouns(text, sentence, rng)
    if rng.random() < 0.4:
        sentence, text = _resize(sentence, text, rng)
    if rng.random() < 0.3:
        sentence, text = _size(sentence, text, rng)
    if rng.random() < 0.4:
        text = text.rstrip(" .!?")
        text = wrap(text, rng, 0.3)
        text = punctuate(text, rng)
    elif rng.random() < 0.4:
        text = text.rstrip(" .!?") + rng.choice(("", "", ".", "!"))
    return replace(sentence, text=misspell(text, rng, 0.3))


_GENDERS: Mapping[str, Mapping[str, str]] = {
    "he": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "she": {"she": "he", "hers": "his", "herself": "himself"},
    "they": {"he": "they", "him": "them", "his": "their", "himself": "themselves"},
}
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
# After "her", these show that it is no possessive: "make her smile", "give her a fringe".
_NOT_OWNED = frozenset(
    _WORD.findall(
        "a an the some to look with without more less older younger happy happier appear seem be "
        "have wear and but so if for at in as like on into slightly somewhat much way far "
        "extremely bit please plz pls back up down another any no not grow get laugh"
    )
)
_RELATIVES = _WORD.findall(
    "man woman guy lady dad father mum mom mother brother sister husband wife boss friend uncle "
    "aunt grandpa grandma granddad grandmother grandfather son daughter cousin colleague neighbour "
    "boyfriend girlfriend teacher nephew niece roommate flatmate client coworker"
)
_RELATIVE = re.compile(rf"\b(my|our|this|that|the) ({'|'.join(_RELATIVES)})\b")


def _swap_people(text: str, of_age: bool, rng: Random) -> str:
    words = set(_WORD.findall(text))
    if words & {"he", "him", "his", "he's", "he'd"} and not words & {"she", "her"}:
        table = dict(_GENDERS[rng.choice(("he", "he", "they"))])
        if "she" in table.values():
            table |= {"he's": "she's", "he'd": "she'd"}
        elif words & {"he", "he's", "he'd"}:  # "they looks": leave the verbs alone
            table = {}
        text = _WORD.sub(lambda found: table.get(found[0], found[0]), text)
    elif words & {"she", "her", "hers", "she's", "she'd"}:
        text = _her_to_him(text)
    # "The woman" may be the very target of an edit of age; a relative is not.
    owners = ("my", "our") if of_age else ("my", "our", "this", "that", "the")

    def other(found: re.Match[str]) -> str:
        if found[1] not in owners:
            return found[0]
        return f"{found[1]} {rng.choice(_RELATIVES)}"

    return _RELATIVE.sub(other, text)


def _her_to_him(text: str) -> str:
    table = {**_GENDERS["she"], "she's": "he's", "she'd": "he'd"}

    def other(found: re.Match[str]) -> str:
        word = found[0]
        if word != "her":
            return table.get(word, word)
        following = _WORD.match(text[found.end() :].lstrip(" "))
        owned = following is not None and text[found.end() : found.end() + 1] == " "
        return "his" if owned and following and following[0] not in _NOT_OWNED else "him"

    return _WORD.sub(other, text)


# Words that stand for each other in any request; of a change or a refusal, also the second list.
_ALIKE = tuple(
    tuple(row.split(";"))
    for row in (
        "bangs;fringe",
        "glasses;specs;spectacles;eyeglasses",
        "frames;rims",
        "moustache;mustache",
        "forehead;brow",
        "photo;picture;pic;image",
        "please;pls;plz;kindly",
        "a bit;a tad;a little;a touch;a little bit;a smidge;a smidgen",
        "extremely;incredibly;insanely",
    )
)
_ALIKE_IN_CHANGES = (*_ALIKE, ("smile", "grin"), ("beard", "facial hair"), ("older", "more aged"))


def _swap_nouns(text: str, sentence: Sentence, rng: Random) -> str:
    rows = _ALIKE_IN_CHANGES if sentence.mode == 0 else _ALIKE
    row = rng.choice([r for r in rows if any(_has(text, word) for word in r)] or [()])
    present = [word for word in row if _has(text, word)]
    if len(present) != 1:
        return text
    return re.sub(rf"\b{present[0]}\b", rng.choice(row), text)


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


_STEPS: Mapping[int, tuple[str, ...]] = {
    1: ("a bit", "a little", "slightly", "a touch", "a tad", "a little bit", "a smidge"),
    2: ("somewhat", "moderately", "noticeably"),
    4: ("much", "a lot", "way", "far", "considerably", "a great deal"),
    5: ("extremely", "insanely", "incredibly"),
}
_SIZE_OF = {phrase: size for size, phrases in _STEPS.items() for phrase in phrases}
_STEP = re.compile(
    rf"(?<!so )(?<!very )(?<!not )(?<!that )\b({'|'.join(sorted(_SIZE_OF, key=len, reverse=True))})"
    r" (?=(?:more|less|fewer|too)\b|[a-z]{3,}er\b)"
)
_ANY_SIZE = re.compile(rf"\b({'|'.join(_SIZE_OF)}|very|so|really|just|only|quite)\b")


def _resize(sentence: Sentence, text: str, rng: Random) -> tuple[Sentence, str]:
    """Ask for another size, where the sentence has one expression of size and its label agrees."""
    edit = sentence.edit
    found = _STEP.search(text)
    if edit is None or edit.change is None or found is None:
        return sentence, text
    if _SIZE_OF[found[1]] != edit.value or len(_ANY_SIZE.findall(text)) != 1:
        return sentence, text
    size = rng.choice(tuple(_STEPS))
    changed = f"{text[: found.start()]}{rng.choice(_STEPS[size])} {text[found.end() :]}"
    sign = 1 if edit.change > 0 else -1
    return labelled(sentence.text, Edit(edit.attribute, change=sign * size)), changed


# Words that tell a way by themselves, so that a size fits before them; by what they are said of.
_COMPARED: Mapping[Attribute, str] = {
    Attribute.BANGS: "longer|shorter|thicker|thinner|fuller|heavier|lighter|denser",
    Attribute.EYEGLASSES: "thicker|thinner|bolder|heavier|lighter|darker|chunkier|finer|clearer",
    Attribute.BEARD: "longer|shorter|thicker|thinner|fuller|bushier|denser|heavier|bigger|smaller",
    Attribute.SMILING: "happier|wider|bigger|broader|brighter|cheerier|smaller|sadder|merrier",
    Attribute.AGE: "older|younger",
}
# How much, after a verb.
_AFTER: Mapping[int, tuple[str, ...]] = {
    1: ("a bit", "a little", "slightly", "a touch", "a tad", "by a bit", "just a little", "a notch",
        "by a hair", "just slightly", "a tiny bit", "only a bit"),
    2: ("somewhat", "moderately", "noticeably", "by a moderate amount", "a fair bit"),
    4: ("a lot", "by a lot", "considerably", "a great deal", "quite a lot", "loads", "big time",
        "significantly", "a whole lot"),
    5: ("as much as possible", "to the max", "to the extreme", "as far as it goes", "extremely",
        "as much as you can", "to the maximum", "drastically", "massively"),
}  # fmt: skip
_VERB = re.compile(
    r"(?:please |pls |plz |(?:can|could|would|will) (?:you|u|we) |kindly |i want to |let's )?"
    "(?:trim|shorten|lengthen|thicken|thin|reduce|increase|decrease|lower|raise|boost|widen|extend|"
    "brighten|darken|lighten|age|deepen|shrink|enlarge|strengthen|amplify|soften|"
    r"(?:tone|dial|turn|bring|scale|cut|take|wind|bump)(?= .*\b(?:up|down|back|in)\b)) \w"
)
# Where any of these is said, a size is, or does not fit.
_UNSIZED = re.compile(
    r"[\d.,?!;:]|\b(?:a|an|than|half|enough|as|not|too|to|so|very|until|till|by|inch|inches|years?|"
    r"brother|sister|son|daughter|cousin|sibling|self|version|days|never|no|don't|isn't|all|most|frown|"
    r"rather|fairly|quite|really|only|just|even|but|and|way|off|some|bit|lot|more|less)\b"
)


def _size(sentence: Sentence, text: str, rng: Random) -> tuple[Sentence, str]:
    """Say how much, where a plain request of a change does not: "trim the beard a bit"."""
    edit = sentence.edit
    if edit is None or edit.change is None or edit.value != 3:
        return sentence, text
    plain = text.rstrip(" .!?")
    if _UNSIZED.search(plain) or _ANY_SIZE.search(plain):
        return sentence, text
    size = rng.choice(tuple(_STEPS))
    compared = re.findall(rf"\b(?:{_COMPARED[edit.attribute]})\b", plain)
    if len(compared) == 1:
        plain = plain.replace(compared[0], f"{rng.choice(_STEPS[size])} {compared[0]}")
    elif not compared and _VERB.match(plain) and len(plain.split()) < 9:
        plain = f"{plain} {rng.choice(_AFTER[size])}"
    else:
        return sentence, text
    sign = 1 if edit.change > 0 else -1
    return labelled(sentence.text, Edit(edit.attribute, change=sign * size)), plain
