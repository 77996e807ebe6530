"""One face, one sentence, every scheme, channel and SNR: the rows of the paper suite.

::

    face, sentence --transmit, once a scheme (and SNR)--> symbols --channel, seed--> receive, row
                            |                                  |
                    editing is remembered         the same for all schemes: the seed depends on
                    across schemes                face, channel and SNR alone

A row is a flat JSON object. `key` names the cell, so a sweep knows what it has.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, get_args

import torch
from torch import Tensor

from baselines.coherent import equalise
from baselines.editor import Editor, Watch
from baselines.schemes import BaseScheme, LatentScheme, Sent
from channel_sim.channel import Channel, ChannelConfig
from channel_sim.fading import Kind
from evaluation.candidates import OURS, Candidates, follows_snr
from evaluation.official import Official
from evaluation.panel import LESS, MORE, Panel, Reference, Wish, pack
from shared.adapters import PAPER_SNRS_DB
from shared.attributes import ATTRIBUTES, Attribute
from shared.bundle import Bundle
from shared.compute import precision_of
from shared.errors import InstructionRefused, InvalidRequest, RateUnreachable
from shared.settings import Settings
from shared.symbols import Reception, average_power, noise_variance_to_snr_db
from transmitter.editing import Quality
from transmitter.pipeline import NO_EDIT
from transmitter.text import TextReader

Row = dict[str, Any]
ORIGINAL: Final = "original"
NO_CHANNEL: Final = "none"
CHANNELS: Final[tuple[str, ...]] = get_args(Kind)
SENTENCES: Final[Mapping[tuple[Attribute, str], str]] = MappingProxyType(
    {
        (Attribute.BANGS, MORE): "make the bangs longer",
        (Attribute.BANGS, LESS): "make the bangs shorter",
        (Attribute.EYEGLASSES, MORE): "add eyeglasses",
        (Attribute.EYEGLASSES, LESS): "remove the eyeglasses",
        (Attribute.BEARD, MORE): "give this person a fuller beard",
        (Attribute.BEARD, LESS): "shave off the beard",
        (Attribute.SMILING, MORE): "make the smile bigger",
        (Attribute.SMILING, LESS): "make the smile smaller",
        (Attribute.AGE, MORE): "make this person look older",
        (Attribute.AGE, LESS): "make this person look younger",
    }
)
_MIDDLE: Final = 2  # degrees up to here are asked for more, the others for less


@dataclass(frozen=True)
class Conditions:
    """What all trials of a sweep have in common.

    quality: of inversion and match. seed: of the choice of faces and of all noise. snrs_db: Es/N0.
    channels: of "awgn", "rayleigh", "rician", fading block by block, perfect CSI.
    """

    quality: Quality = "balanced"
    seed: int = 0
    snrs_db: tuple[float, ...] = PAPER_SNRS_DB
    channels: tuple[str, ...] = CHANNELS
    k_factor_db: float = 9.0

    def __post_init__(self) -> None:
        unknown = set(self.channels) - set(CHANNELS)
        if unknown or not self.channels or not self.snrs_db:
            raise InvalidRequest(
                f"got channels {self.channels} and SNRs {self.snrs_db}; expected some of "
                f"{', '.join(CHANNELS)} and at least one SNR"
            )


@dataclass(frozen=True)
class Trial:
    """A face with its sentence, and what to run on it.

    part: "main", "ood" or "changes", the table it is for. faces: the set it comes from. channels:
    of the conditions' ones. blank: also what a channel without noise would give.
    """

    part: str
    faces: str
    image: str
    face: Tensor
    sentence: str
    wish: Wish
    schemes: tuple[str, ...]
    channels: tuple[str, ...]
    blank: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def cells(self, conditions: Conditions) -> Iterator[tuple[str, str, float | None]]:
        """(scheme, channel, SNR) of every row, the photograph's own and the noiseless ones
        first.
        """
        yield ORIGINAL, NO_CHANNEL, None
        for scheme in self.schemes:
            if self.blank and scheme.startswith(OURS):
                yield scheme, NO_CHANNEL, None
            for snr_db in conditions.snrs_db:
                for channel in self.channels:
                    yield scheme, channel, snr_db

    def key(self, conditions: Conditions, scheme: str, channel: str, snr_db: float | None) -> str:
        """The cell's name among all rows."""
        snr = "" if snr_db is None else f"{snr_db:g}"
        parts = (self.faces, self.image, self.sentence, scheme, channel, snr)
        return "|".join((*parts, conditions.quality, str(conditions.seed)))


class Tools:
    """What a process needs to run trials: the networks of a bundle, and the panel.

    The schemes multiply as the services do (EDSC_PRECISION); who measures them does in float32.
    """

    def __init__(
        self,
        bundle: Path | None,
        data: Path,
        *,
        metric_weights: Path | None = None,
        commit: str = "unknown",
    ) -> None:
        self.bundle = Bundle.open(bundle)
        device = torch.device("cpu")
        self.precision = precision_of(Settings().precision, device)
        self.candidates = Candidates(self.bundle, device, self.precision)
        # The first pass of a process prepares its kernels: no scheme's time.
        first = Editor(self.candidates.transmitter)
        grey = torch.zeros(1, 3, self.size, self.size)
        first.draw(first.inverted(grey, "balanced", Watch()))
        self.panel = Panel(self.bundle, data, Official.open(metric_weights))
        self.commit = commit

    @property
    def reader(self) -> TextReader:
        return self.candidates.transmitter.reader

    @property
    def size(self) -> int:
        """Side of the square pictures, px."""
        return self.candidates.transmitter.image_size


def choose_sentence(number: int, degrees: Tensor) -> tuple[str, Attribute, str]:
    """Sentence, attribute and direction for the number-th trial.

    The attributes take turns; the direction is the one in which there is more room, from the
    degrees [5] that the judge sees in the photograph, so that every request can be met.
    """
    attribute = ATTRIBUTES[number % len(ATTRIBUTES)]
    direction = MORE if int(degrees[attribute.index]) <= _MIDDLE else LESS
    return SENTENCES[attribute, direction], attribute, direction


def read_wish(reader: TextReader, sentence: str, attribute: Attribute, direction: str) -> Wish:
    """What the bundle's reader understands; a refused sentence is sent as no edit."""
    try:
        edit = None if sentence == NO_EDIT else reader(sentence).edit
    except InstructionRefused:
        edit = None
    return Wish(attribute, direction, edit)


def noise_seed(conditions: Conditions, trial: Trial, channel: str, snr_db: float) -> int:
    """The same for every scheme: under block fading they all see the same h."""
    words = f"{conditions.seed}|{trial.faces}|{trial.image}|{channel}|{snr_db:g}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=4).digest(), "big")


def run_trial(
    tools: Tools, conditions: Conditions, trial: Trial, done: Collection[str] = ()
) -> Iterator[list[Row]]:
    """The trial's rows, scheme by scheme, without those whose keys are `done`."""
    tools.candidates.memory.clear()
    wanted: dict[str, list[tuple[str, float | None]]] = {}
    for scheme, channel, snr_db in trial.cells(conditions):
        if trial.key(conditions, scheme, channel, snr_db) not in done:
            wanted.setdefault(scheme, []).append((channel, snr_db))
    if not wanted:
        return
    reference = tools.panel.reference(trial.face)
    for name, cells in wanted.items():
        if name == ORIGINAL:
            row = _frame(tools, conditions, trial, ORIGINAL, NO_CHANNEL, None)
            packed = {key: pack(value) for key, value in reference.embeddings.items()}
            yield [{**row, "embeddings": packed, "degrees": reference.degrees.tolist()}]
            continue
        yield _run_scheme(tools, conditions, trial, reference, name, cells)


def _frame(
    tools: Tools,
    conditions: Conditions,
    trial: Trial,
    scheme: str,
    channel: str,
    snr_db: float | None,
) -> Row:
    return {
        "key": trial.key(conditions, scheme, channel, snr_db),
        "part": trial.part,
        "faces": trial.faces,
        "image": trial.image,
        "sentence": trial.sentence,
        "attribute": trial.wish.attribute.value,
        "direction": trial.wish.direction,
        "understood": trial.wish.understood,
        "scheme": scheme,
        "channel": channel,
        "snr_db": snr_db,
        "quality": conditions.quality,
        "seed": conditions.seed,
        "commit": tools.commit,
        "bundle": tools.bundle.digest,
        "precision": str(tools.precision).removeprefix("torch."),
        "judge": tools.panel.judge_name,
        **trial.extra,
    }


def _run_scheme(
    tools: Tools,
    conditions: Conditions,
    trial: Trial,
    reference: Reference,
    name: str,
    cells: list[tuple[str, float | None]],
) -> list[Row]:
    scheme = tools.candidates[name]
    sent_at: dict[float | None, tuple[Sent, dict[str, float]]] = {}
    rows: list[Row] = []
    images: list[Tensor] = []
    for channel, snr_db in cells:
        row = _frame(tools, conditions, trial, name, channel, snr_db)
        at = snr_db if follows_snr(scheme) else None
        coded_for = conditions.snrs_db[-1] if snr_db is None else snr_db
        if at not in sent_at:
            watch = Watch()
            try:
                sent = scheme.transmit(
                    trial.face, trial.wish.edit, coded_for, conditions.quality, watch
                )
            except RateUnreachable as error:
                # A result: there is no stream that small. The same at every SNR.
                frames = (_frame(tools, conditions, trial, name, c, s) for c, s in cells)
                return [{**frame, "error": str(error)} for frame in frames]
            sent_at[at] = sent, watch.timings_ms
        sent, spent = sent_at[at]
        if snr_db is None:
            images.append(sent.picture)
            rows.append(row)
            continue
        rows.append({**row, **_through(scheme, conditions, trial, sent, spent, channel, snr_db)})
        images.append(rows[-1].pop("image_tensor"))
    measured = tools.panel.measure(images, reference, trial.wish)
    return [{**row, **values} for row, values in zip(rows, measured, strict=True)]


def _through(
    scheme: BaseScheme,
    conditions: Conditions,
    trial: Trial,
    sent: Sent,
    spent: dict[str, float],
    channel: str,
    snr_db: float,
) -> Row:
    """Send once: what the link says of itself, and the picture as `image_tensor`."""
    seed = noise_seed(conditions, trial, channel, snr_db)
    kind: Kind = next(k for k in get_args(Kind) if k == channel)
    air = Channel(ChannelConfig(kind, k_factor_db=conditions.k_factor_db))
    watch = Watch(timings_ms=dict(spent))
    with watch("propagate"):
        reception = air(sent.symbols, snr_db, torch.Generator().manual_seed(seed))
    got = scheme.receive(reception, watch)
    bandwidth = scheme.cbr()
    left = _latent_left(scheme, conditions, trial, reception, snr_db)
    degrees = got.degrees or sent.degrees
    gain = 1.0 if reception.h is None else float(average_power(reception.h)[0])
    return {
        "image_tensor": got.image,
        "k_factor_db": conditions.k_factor_db if channel == "rician" else None,
        "noise_seed": seed,
        "gain": round(gain, 6),
        "uses": scheme.uses,
        "header_uses": scheme.header_uses,
        "cbr": bandwidth.paper,
        "cbr_complex": bandwidth.complex_uses,
        "cbr_printed": scheme.cbr_printed,
        "bits": None if sent.data is None else 8 * len(sent.data),
        "ber": scheme.bit_error_rate(sent, got),
        "blocks": got.blocks,
        "block_errors": got.block_errors,
        "decoded": got.decoded and got.command == sent.command,
        "reached": degrees.reached,
        "match_steps": degrees.match_steps,
        "latent_left": left,
        "timings_ms": {stage: round(ms, 3) for stage, ms in watch.timings_ms.items()},
        "seconds": round(sum(watch.timings_ms.values()) / 1000, 6),
    }


@torch.no_grad()
def _latent_left(
    scheme: BaseScheme,
    conditions: Conditions,
    trial: Trial,
    reception: Reception,
    snr_db: float,
) -> float | None:
    """|A (w_hat - w)|^2 / sum lambda: the share of the latent that is lost, as the bounds count it.

    None for schemes that send pictures.
    """
    if not isinstance(scheme, LatentScheme):
        return None
    # The edit that was sent: it was made for the average SNR.
    w, _ = scheme.editor.latent(trial.face, trial.wish.edit, conditions.quality, snr_db=snr_db)
    x_hat, equalised_db = equalise(reception)
    coded_for = noise_variance_to_snr_db(reception.noise_variance)
    w_hat = scheme.adapters.decoder(x_hat, equalised_db, coded_for)
    code = scheme.adapters.encoder
    error = ((w_hat - w.cpu()) @ code.analysis.T).square().sum()
    return round(float(error / code.spectrum.sum()), 6)
