"""Sentence -> edit: the text encoder and the reader around it.

::

    "make hre smiel bigger" -> tokens -> word + piece embeddings -> bi-LSTM -> heads -> Edit
                                                                  scope     in | out | several
                                                                  attribute bangs .. age
                                                                  mode      change | target
                                                                  direction more | less
                                                                  size      1..5      (changes)
                                                                  target    0..5      (targets)

The paper's text encoder is an embedding of 300 and an LSTM of 2 x 1024 over words; ours is smaller,
and looks at the letters too: a word that is not in the vocabulary is embedded as the words that it
may be a misspelling of, and every word also by its groups of three letters, which are hashed.

The ladder of changes: slightly 1, somewhat 2, plain 3, much 4, extremely 5. Targets are the degrees
of `shared.attributes.DEGREE_NAMES`.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from shared.attributes import ATTRIBUTES, MAX_DEGREE, Edit
from shared.bundle import Bundle
from shared.errors import InstructionRefused, InvalidRequest

NET = "text"
MAX_CHARACTERS = 2000  # of a sentence
_REMEMBERED = 50_000  # tokens whose numbers are kept
_MAX_WORD = 32  # characters of a word that are looked at: bounds the work per word

SCOPES = ("in", "out", "several")
MODES = ("change", "target")
DIRECTIONS = ("more", "less")

CAN_BE_ASKED = (
    "Ask for one edit of bangs, eyeglasses, beard, smile or age, "
    'for example "make the beard a bit longer", "no glasses" or "make her look much younger".'
)

_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[.,?:;(){}\[\]<>=+*/#$@&|\\%]")
_REPEATED = re.compile(r"([^\W\d_])\1{2,}")
_PLAIN = str.maketrans({**dict.fromkeys("\u2019\u2018\u00b4`", "'"), "!": ".", "\u2026": "."})


def tokenise(text: str) -> list[str]:
    """Split a sentence into lower-case words, numbers and punctuation.

    Accents and case are dropped, "don't" becomes "dont", "soooo" becomes "so", hyphens and emoji
    separate words and vanish. Returns an empty list where nothing readable is left.
    """
    text = text.translate(_PLAIN).lower()
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text).lower()
        text = "".join(letter for letter in text if not unicodedata.combining(letter))
    text = _REPEATED.sub(r"\1", text)
    return [token.replace("'", "") for token in _TOKEN.findall(text)]


def pieces(word: str) -> tuple[str, ...]:
    """What is looked up of a word besides itself, so that unknown words mean something too.

    The groups of three letters, and the letters in alphabetical order but for the first (which any
    two swapped letters leave alone). Numbers give themselves, their length and their tens.
    """
    if word.isdigit():
        value = int(word[:6])
        return ("number", f"digits {len(word[:6])}", f"tens {value // 10}", f"={value}")
    if not word[0].isalpha():
        return ("symbol",)
    framed = f"<{word[:_MAX_WORD]}>"
    found = [framed[i : i + 3] for i in range(len(framed) - 2)]
    found.append(f"~{word[0]}{''.join(sorted(word[1:_MAX_WORD]))}")
    return tuple(dict.fromkeys(found))


class Vocabulary:
    """Known words, numbered from 1, and what a mistyped word may stand for."""

    def __init__(self, words: Sequence[str]) -> None:
        self._numbers = {word: number for number, word in enumerate(words, start=1)}
        self._near: dict[str, list[str]] = {}  # a word less one letter -> the words
        for word in self._numbers:
            for part in _less_one(word):
                self._near.setdefault(part, []).append(word)

    def __call__(self, word: str) -> tuple[int, ...]:
        """The word's number; of an unknown word 0 and the numbers of what it may stand for.

        Those are the words one error away (a letter dropped, added, wrong, or two swapped); for
        six letters and more, where there is none, those that share all letters but one of each.
        """
        if word in self._numbers:
            return (self._numbers[word],)
        if not word.isalpha() or len(word) < 3 or len(word) > _MAX_WORD:
            return (0,)
        found = {near for part in _less_one(word) for near in self._near.get(part, ())}
        close = {near for near in found if one_error(word, near)}
        if not close and len(word) >= 6:
            close = found
        return (0, *sorted(self._numbers[near] for near in close))


def _less_one(word: str) -> set[str]:
    return {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))} if len(word) > 2 else set()


def one_error(one: str, other: str) -> bool:
    """Whether one dropped, added or wrong letter, or two swapped neighbours, make one the other."""
    if abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    one, other = one[start:], other[start:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text encoder, its words, and the confidence below which it refuses."""

    vocabulary: tuple[str, ...] = ()
    pieces: int = 4096
    width: int = 96
    hidden: int = 160
    layers: int = 1
    dropout: float = 0.3
    members: int = 3
    threshold: float = 0.5  # set by the recipe on sentences that it does not train on

    def __post_init__(self) -> None:
        sizes = {k: getattr(self, k) for k in ("pieces", "width", "hidden", "layers", "members")}
        if min(sizes.values()) < 1:
            raise InvalidRequest(f"text encoder got {sizes}; expected sizes of at least 1")
        if not 0 <= self.threshold <= 1:
            raise InvalidRequest(f"threshold is {self.threshold}; expected 0..1")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TextConfig":
        """As the bundle keeps it."""
        return cls(**{**values, "vocabulary": tuple(values["vocabulary"])})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "vocabulary": list(self.vocabulary)}


class Sentences(NamedTuple):
    """A batch of sentences as numbers, all tokens of all sentences one after another.

    words: int64 [K] the numbers of every token's words, and word_starts: int64 [N] where each
    token's begin; pieces: int64 [M] and piece_starts: int64 [N] the same; lengths: int64 [B] tokens
    of each sentence, on the CPU.
    """

    words: Tensor
    word_starts: Tensor
    pieces: Tensor
    piece_starts: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> "Sentences":
        words, word_starts, parts, part_starts = (tensor.to(device) for tensor in self[:4])
        return Sentences(words, word_starts, parts, part_starts, self.lengths)


class Heads(NamedTuple):
    """Logits of every head, [B, classes]."""

    scope: Tensor  # [B, 3]
    attribute: Tensor  # [B, 5]
    mode: Tensor  # [B, 2]
    direction: Tensor  # [B, 2]
    size: Tensor  # [B, 5], class i is size i + 1
    target: Tensor  # [B, 6]


class BothWays(nn.Module):
    """A bi-LSTM over padded sentences, each read backwards from its own last token.

    Half as long a training step on a CPU as `nn.LSTM` over packed sequences takes, which PyTorch
    has no fast kernel for.
    """

    def __init__(self, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        widths = [width] + [2 * hidden] * (layers - 1)
        self.ahead = nn.ModuleList(nn.LSTM(w, hidden, batch_first=True) for w in widths)
        self.back = nn.ModuleList(nn.LSTM(w, hidden, batch_first=True) for w in widths)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens [B, T, width], lengths int64 [B] -> states [B, T, 2 hidden]; padding is noise."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        turned = lengths[:, None] - 1 - steps  # [B, T]
        turned = torch.where(turned >= 0, turned, steps)[..., None]

        def turn(states: Tensor) -> Tensor:
            return states.gather(1, turned.expand(-1, -1, states.shape[2]))

        states = tokens
        for layer, (ahead, back) in enumerate(zip(self.ahead, self.back, strict=True)):
            if layer:
                states = self.drop(states)
            states = torch.cat([ahead(states)[0], turn(back(turn(states))[0])], 2)
        return states


class _Member(nn.Module):
    """Bi-LSTM over hashed words and pieces, pooled by attention and maximum, with six heads."""

    def __init__(self, config: TextConfig, classes: Sequence[int]) -> None:
        super().__init__()
        self.classes = list(classes)
        self.words = nn.EmbeddingBag(len(config.vocabulary) + 1, config.width, mode="mean")
        self.pieces = nn.EmbeddingBag(config.pieces, config.width, mode="mean")
        for table in (self.words, self.pieces):
            nn.init.normal_(table.weight, std=0.5)
        self.drop = nn.Dropout(config.dropout)
        self.lstm = BothWays(config.width, config.hidden, config.layers, config.dropout)
        self.attention = nn.Linear(2 * config.hidden, 1)
        self.heads = nn.Linear(4 * config.hidden, sum(classes))

    def forward(self, batch: Sentences) -> Heads:
        words = self.words(batch.words, batch.word_starts)  # [N, width]
        flat = self.drop(words + self.pieces(batch.pieces, batch.piece_starts))
        lengths = batch.lengths.to(flat.device)
        steps = torch.arange(int(batch.lengths.max()), device=flat.device)  # [T]
        padding = steps >= lengths[:, None]  # [B, T]
        places = (lengths.cumsum(0) - lengths)[:, None] + steps  # of each token in `flat`
        places = places.masked_fill(padding, 0)
        padded = flat.index_select(0, places.flatten()).unflatten(0, places.shape)
        states = self.lstm(padded, lengths)  # [B, T, 2 hidden]
        padding = padding[..., None]
        weights = self.attention(states).masked_fill(padding, -1e4).softmax(1)  # [B, T, 1]
        strongest = states.masked_fill(padding, -1e4).amax(1)
        pooled = torch.cat([(weights * states).sum(1), strongest], 1)  # [B, 4 hidden]
        return Heads(*self.heads(self.drop(pooled)).split(self.classes, 1))


class TextEncoder(nn.Module):
    """A few LSTMs that were started differently and whose opinions are averaged.

    One alone reads what it has seen the like of; where it has not, it is sure of something anyhow.
    Several disagree there, which is what the threshold wants to know.
    """

    # Classes of every head, in the order of `Heads`.
    CLASSES = (
        len(SCOPES),
        len(ATTRIBUTES),
        len(MODES),
        len(DIRECTIONS),
        MAX_DEGREE,
        MAX_DEGREE + 1,
    )

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self._vocabulary = Vocabulary(config.vocabulary)
        self._numbered: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.members = nn.ModuleList(_Member(config, self.CLASSES) for _ in range(config.members))

    def number(
        self, sentences: Sequence[Sequence[str]], hide: Callable[[], bool] | None = None
    ) -> Sentences:
        """Number tokenised sentences, each of at least one token.

        hide: asked for every token; True makes its word unknown, so that its pieces must do.
        """
        words: list[int] = []
        word_starts: list[int] = []
        parts: list[int] = []
        part_starts: list[int] = []
        for tokens in sentences:
            if not tokens:
                raise InvalidRequest("got a sentence of 0 tokens, expected at least 1")
            for token in tokens:
                known, found = self._look_up(token)
                word_starts.append(len(words))
                part_starts.append(len(parts))
                words.extend((0,) if hide is not None and hide() else known)
                parts.extend(found)
        lengths = torch.tensor([len(tokens) for tokens in sentences])  # [B]
        return Sentences(
            torch.tensor(words),
            torch.tensor(word_starts),
            torch.tensor(parts),
            torch.tensor(part_starts),
            lengths,
        )

    def _look_up(self, token: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found = self._numbered.get(token)
        if found is None:
            # crc32 rather than hash(): the same on every machine and in every process.
            hashes = tuple(crc32(piece.encode()) % self.config.pieces for piece in pieces(token))
            found = (self._vocabulary(token), hashes)
            if len(self._numbered) < _REMEMBERED:  # users type what they like: bounded
                self._numbered[token] = found
        return found

    def each(self, batch: Sentences) -> list[Heads]:
        """Every member's logits."""
        return [member(batch) for member in self.members]

    def forward(self, batch: Sentences) -> Heads:
        """Logits of the members' mean probabilities."""
        opinions = self.each(batch)
        if len(opinions) == 1:
            return opinions[0]
        mean = [
            torch.stack([logits.float().softmax(1) for logits in head]).mean(0)
            for head in zip(*opinions, strict=True)
        ]
        return Heads(*(probability.clamp_min(1e-12).log() for probability in mean))


@dataclass(frozen=True)
class Reading:
    """The edit that a sentence asks for, and how sure the net is of it, 0..1 (but for its size)."""

    edit: Edit
    confidence: float


class TextReader:
    """Reads one sentence at a time: `reader("no beard at all").edit`."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder.eval()

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "TextReader":
        """The bundle's net `text`. Raises BundleError where it is missing or does not fit."""
        encoder = TextEncoder(TextConfig.from_json(bundle.config(NET)))
        return cls(bundle.load_into(NET, encoder))

    @torch.inference_mode()
    def __call__(self, text: str) -> Reading:
        """Read a sentence of 1..2000 characters.

        Raises InvalidRequest for an empty or a longer one, and InstructionRefused, which says what
        can be asked, for one that asks for nothing, for something else or for two things.
        """
        if not text.strip():
            raise InvalidRequest(f"the instruction is empty. {CAN_BE_ASKED}")
        if len(text) > MAX_CHARACTERS:
            raise InvalidRequest(
                f"the instruction has {len(text)} characters, expected at most {MAX_CHARACTERS}"
            )
        tokens = tokenise(text)
        if not any(token[0].isalnum() for token in tokens):
            raise InstructionRefused(f"the instruction has no words. {CAN_BE_ASKED}")
        heads = self.encoder(self.encoder.number([tokens]))
        probabilities = Heads(*(head[0].double().softmax(0) for head in heads))
        return decide(probabilities, self.encoder.config.threshold)


def certainty(heads: Heads) -> float:
    """How sure one sentence's probabilities [classes] are that it asks for one known edit.

    A sentence torn between two attributes is as unreadable as one that names none.
    """
    return float(heads.scope[SCOPES.index("in")] * heads.attribute.max())


def decide(heads: Heads, threshold: float) -> Reading:
    """An edit from one sentence's head probabilities [classes]. Raises InstructionRefused."""
    _, outside, several = heads.scope.tolist()
    attribute = int(heads.attribute.argmax())
    sure = certainty(heads)
    if sure < threshold:
        if several > outside:
            raise InstructionRefused(
                f"this asks for more than one edit; send them one at a time. {CAN_BE_ASKED}"
            )
        raise InstructionRefused(f"no edit could be read in this sentence. {CAN_BE_ASKED}")
    mode = int(heads.mode.argmax())
    confidence = sure * float(heads.mode[mode])
    if MODES[mode] == "target":
        target = int(heads.target.argmax())
        return Reading(Edit(ATTRIBUTES[attribute], target=target), confidence)
    direction = int(heads.direction.argmax())
    confidence *= float(heads.direction[direction])
    size = int(heads.size.argmax()) + 1
    sign = 1 if DIRECTIONS[direction] == "more" else -1
    return Reading(Edit(ATTRIBUTES[attribute], change=sign * size), confidence)
