"""Sentence -> edit: the text encoder and the reader around it.

::

    "make hre smiel bigger" -> tokens -> word + piece embeddings -> 2-layer bi-LSTM -> heads -> Edit
                                                                  scope     in | out | several
                                                                  attribute bangs .. age
                                                                  mode      change | target
                                                                  direction more | less
                                                                  size      1..5      (changes)
                                                                  target    0..5      (targets)

The paper's text encoder is an embedding of 300 and an LSTM of 2 x 1024 over words; ours is smaller
and also embeds *pieces* of each word, so that a misspelt word stays near the intended one. Words
and pieces are hashed into fixed tables: there is no vocabulary to ship, and no word is unknown.

The ladder of changes: slightly 1, somewhat 2, plain 3, much 4, extremely 5. Targets are the degrees
of `shared.attributes.DEGREE_NAMES`.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from shared.attributes import ATTRIBUTES, MAX_DEGREE, Edit
from shared.bundle import Bundle
from shared.errors import InstructionRefused, InvalidRequest

NET = "text"
MAX_CHARACTERS = 2000  # of a sentence
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
    text = unicodedata.normalize("NFKD", text.translate(_PLAIN)).lower()
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    text = _REPEATED.sub(r"\1", text)
    return [token.replace("'", "") for token in _TOKEN.findall(text)]


@lru_cache(maxsize=65536)
def pieces(word: str) -> tuple[str, ...]:
    """What of a word survives a typing error, as strings to be hashed.

    3- and 4-grams of the letters; the word less any one letter (a dropped, added, wrong or swapped
    letter leaves one of these in common with the intended word); the inner letters in
    alphabetical order (any swap). Numbers give their length and their tens.
    """
    if word.isdigit():
        tens = str(int(word[:6]) // 10) if len(word) <= 3 else "many"
        return ("number", f"digits {len(word)}", f"tens {tens}")
    if not word[0].isalpha():
        return ("symbol",)
    word = word[:_MAX_WORD]
    framed = f"<{word}>"
    found = [framed[i : i + n] for n in (3, 4) for i in range(len(framed) - n + 1)]
    if len(word) >= 4:
        found += [f"-{word}"]
        found += [f"-{word[:i]}{word[i + 1 :]}" for i in range(len(word))]
        found += [f"~{word[0]}{''.join(sorted(word[1:]))}"]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text encoder, and the confidence below which a sentence is refused."""

    words: int = 4096
    pieces: int = 8192
    width: int = 96
    hidden: int = 128
    layers: int = 2
    dropout: float = 0.2
    threshold: float = 0.5  # set on the hand-written development sentences

    def __post_init__(self) -> None:
        if min(self.words, self.pieces, self.width, self.hidden, self.layers) < 1:
            raise InvalidRequest(f"text encoder got {self}; expected sizes of at least 1")
        if not 0 <= self.threshold <= 1:
            raise InvalidRequest(f"threshold is {self.threshold}; expected 0..1")


class Sentences(NamedTuple):
    """A batch of sentences as numbers.

    words: int64 [N] all tokens of all sentences, one after another; piece_ids: int64 [M] all their
    pieces; piece_starts: int64 [N] where each token's pieces begin; lengths: int64 [B] on the CPU.
    """

    words: Tensor
    piece_ids: Tensor
    piece_starts: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> "Sentences":
        words, ids, starts = (t.to(device) for t in self[:3])
        return Sentences(words, ids, starts, self.lengths)


class Heads(NamedTuple):
    """Logits of every head, [B, classes]."""

    scope: Tensor  # [B, 3]
    attribute: Tensor  # [B, 5]
    mode: Tensor  # [B, 2]
    direction: Tensor  # [B, 2]
    size: Tensor  # [B, 5], class i is size i + 1
    target: Tensor  # [B, 6]


class TextEncoder(nn.Module):
    """Bi-LSTM over hashed words and pieces, pooled by attention and maximum, with six heads."""

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
        self.words = nn.Embedding(config.words, config.width)
        self.pieces = nn.EmbeddingBag(config.pieces, config.width, mode="mean")
        for table in (self.words, self.pieces):
            nn.init.normal_(table.weight, std=0.3)
        self.drop = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(
            config.width,
            config.hidden,
            config.layers,
            batch_first=True,
            bidirectional=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.attention = nn.Linear(2 * config.hidden, 1)
        self.heads = nn.Linear(4 * config.hidden, sum(self.CLASSES))

    def number(self, sentences: Sequence[Sequence[str]]) -> Sentences:
        """Hash tokenised sentences, each of at least one token, into a batch."""
        words: list[int] = []
        ids: list[int] = []
        starts: list[int] = []
        for tokens in sentences:
            if not tokens:
                raise InvalidRequest("got a sentence of 0 tokens, expected at least 1")
            for token in tokens:
                word, parts = _hashed(token, self.config.words, self.config.pieces)
                words.append(word)
                starts.append(len(ids))
                ids.extend(parts)
        lengths = torch.tensor([len(tokens) for tokens in sentences])  # [B]
        return Sentences(torch.tensor(words), torch.tensor(ids), torch.tensor(starts), lengths)

    def forward(self, batch: Sentences, keep: Tensor | None = None) -> Heads:
        """keep: [N] in {0, 1}; 0 hides a token's word embedding, so that its pieces must do."""
        known = self.words(batch.words)  # [N, width]
        if keep is not None:
            known = known * keep[:, None]
        flat = self.drop(known + self.pieces(batch.piece_ids, batch.piece_starts))
        lengths = batch.lengths.tolist()
        padded = nn.utils.rnn.pad_sequence(flat.split(lengths), batch_first=True)  # [B, T, width]
        packed = pack_padded_sequence(padded, batch.lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)  # [B, T, 2 hidden]
        steps = torch.arange(states.shape[1], device=states.device)
        padding = (steps[None, :] >= batch.lengths.to(states.device)[:, None])[..., None]
        weights = self.attention(states).masked_fill(padding, -1e4).softmax(1)  # [B, T, 1]
        strongest = states.masked_fill(padding, -1e4).amax(1)
        pooled = torch.cat([(weights * states).sum(1), strongest], 1)  # [B, 4 hidden]
        return Heads(*self.heads(self.drop(pooled)).split(list(self.CLASSES), 1))


@lru_cache(maxsize=65536)
def _hashed(token: str, words: int, buckets: int) -> tuple[int, tuple[int, ...]]:
    # crc32 rather than hash(): the same on every machine and in every process.
    word = crc32(token[:_MAX_WORD].encode()) % words
    return word, tuple(crc32(piece.encode()) % buckets for piece in pieces(token))


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
        encoder = TextEncoder(TextConfig(**bundle.config(NET)))
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


def decide(heads: Heads, threshold: float) -> Reading:
    """An edit from one sentence's head probabilities [classes]. Raises InstructionRefused."""
    inside, outside, several = heads.scope.tolist()
    attribute = int(heads.attribute.argmax())
    # A sentence torn between two attributes is as unreadable as one that names none.
    certainty = inside * float(heads.attribute[attribute])
    if certainty < threshold:
        if several > outside:
            raise InstructionRefused(
                f"this asks for more than one edit; send them one at a time. {CAN_BE_ASKED}"
            )
        raise InstructionRefused(f"no edit could be read in this sentence. {CAN_BE_ASKED}")
    mode = int(heads.mode.argmax())
    confidence = certainty * float(heads.mode[mode])
    if MODES[mode] == "target":
        target = int(heads.target.argmax())
        return Reading(Edit(ATTRIBUTES[attribute], target=target), confidence)
    direction = int(heads.direction.argmax())
    confidence *= float(heads.direction[direction])
    size = int(heads.size.argmax()) + 1
    sign = 1 if DIRECTIONS[direction] == "more" else -1
    return Reading(Edit(ATTRIBUTES[attribute], change=sign * size), confidence)


def config_to_json(config: TextConfig) -> dict[str, Any]:
    """The configuration as the bundle keeps it."""
    return asdict(config)
