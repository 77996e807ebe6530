"""`edsc evaluate --suite link`: the whole link on photographs it has never seen, one command.

::

    200 raw photos --find, align--> face --invert (balanced)--> w --12 dB AWGN--> picture
                                                             |
                  every attribute, more and less ------------'--> did the degree move as asked?
    test sentences --read--> right attribute, direction, size; out of scope refused?

Photographs are the test split's; nothing here is used to choose a weight or a threshold.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from channel_sim.channel import Channel, ChannelConfig
from evaluation.card import keep
from evaluation.metrics import Figure, figure, psnr_db
from receiver.pipeline import Receiver
from shared.attributes import ATTRIBUTES, MAX_DEGREE, Attribute, Edit
from shared.bundle import Bundle
from shared.errors import InstructionRefused, InvalidRequest
from shared.images import decode_photo
from training.run import default_data
from training.teachers import FaceIdentity
from transmitter.editing import Quality, match
from transmitter.faces import align
from transmitter.inversion import invert
from transmitter.pipeline import INVERSION_STEPS, Transmitter
from transmitter.text import Reading, TextReader

SENTENCES = Path(__file__).parents[1] / "tests" / "sentences"


@dataclass
class LinkReport:
    """What was measured. Figures are means with 95 % bootstrap intervals."""

    bundle: str
    snr_db: float
    quality: str
    photos: int
    faces_found: int = 0
    psnr_db: Figure | None = None
    identity: Figure | None = None
    edits_moved: dict[str, Figure] = field(default_factory=dict)
    edits_reached: dict[str, Figure] = field(default_factory=dict)
    sentences: dict[str, Figure] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The report as text."""
        yield f"bundle {self.bundle[:12]}, {self.quality}, {self.snr_db:g} dB AWGN"
        yield f"faces found               {self.faces_found} of {self.photos}"
        yield f"PSNR, dB                  {self.psnr_db}"
        yield f"identity cosine           {self.identity}"
        for name, value in self.edits_moved.items():
            exact = self.edits_reached[name].mean
            yield f"moved as asked   {name:18}{value}; exact degree {exact:.2f}"
        for name, value in self.sentences.items():
            yield f"sentences        {name:18}{value}"


def run(
    bundle: Bundle,
    data: Path | None = None,
    *,
    limit: int | None = None,
    edited: int = 100,
    snr_db: float = 12.0,
    quality: Quality = "balanced",
    change: int = 2,
) -> LinkReport:
    """Measure the link; `limit` photographs, the first `edited` of them also edited.

    An edit by `change` degrees is tried for every attribute and direction in which the degree can
    move at all; it counts as moved when the predictor sees a degree further that way in the
    *received* picture than in the photograph's own rendering.
    """
    folder = (data or default_data()) / "raw_photos"
    photos = sorted(folder.glob("*.jpg"))[:limit]
    if not photos:
        raise InvalidRequest(f"no photographs at {folder}: point --data at the data folder")
    transmitter, receiver = Transmitter.from_bundle(bundle), Receiver.from_bundle(bundle)
    recogniser = FaceIdentity(data or default_data())
    report = LinkReport(bundle.digest, snr_db, quality, len(photos))
    channel = Channel(ChannelConfig("awgn"))
    distances, cosines = [], []
    moved: dict[str, list[bool]] = {}
    reached: dict[str, list[bool]] = {}

    def through(w: Tensor, seed: int) -> Tensor:
        with torch.no_grad():
            symbols = transmitter.channel_encoder(w, snr_db)
        draws = torch.Generator().manual_seed(seed)
        return receiver(channel(symbols, snr_db=snr_db, generator=draws))

    for number, path in enumerate(photos):
        pixels = decode_photo(path.read_bytes())
        faces = transmitter.finder(pixels)
        if not faces:
            continue
        report.faces_found += 1
        face = align(pixels, faces[0].points, transmitter.image_size)
        w = invert(
            face,
            transmitter.encoder,
            transmitter.generator,
            transmitter.predictor,
            INVERSION_STEPS[quality],
        )
        received = through(w, number)
        distances.append(psnr_db(received, face))
        with torch.no_grad():
            cosines.append((recogniser(received) * recogniser(face)).sum(1))
        if report.faces_found > edited:
            continue
        for edit in _possible(transmitter, w, change):
            found = match(
                w,
                edit,
                generator=transmitter.generator,
                fields=transmitter.fields,
                predictor=transmitter.guide,
                regressor=transmitter.regressor,
                arrival=transmitter.arrival(snr_db),
                limits=quality,
            )
            after = transmitter.guide.degrees(through(found.w, number))[0]
            index = edit.attribute.index
            step = int(after[index]) - int(found.before[index])
            name = f"{edit.attribute.value} {edit.direction}"
            moved.setdefault(name, []).append(step * (edit.change or 0) > 0)
            reached.setdefault(name, []).append(int(after[index]) == found.expected)
    report.psnr_db = figure(torch.cat(distances))
    report.identity = figure(torch.cat(cosines))
    for name in sorted(moved):
        report.edits_moved[name] = figure(torch.tensor(moved[name]))
        report.edits_reached[name] = figure(torch.tensor(reached[name]))
    report.sentences = read_sentences(transmitter.reader)
    return report


def _possible(transmitter: Transmitter, w: Tensor, change: int) -> Iterator[Edit]:
    """Edits by +-change of every attribute that is not at that end already."""
    before = transmitter.guide.score_degrees(transmitter.seen(w))[0]
    for attribute in ATTRIBUTES:
        degree = int(before[attribute.index])
        if degree < MAX_DEGREE:
            yield Edit(attribute, change=change)
        if degree > 0:
            yield Edit(attribute, change=-change)


def read_sentences(reader: TextReader, folder: Path = SENTENCES) -> dict[str, Figure]:
    """Shares of the test sentences read right; see tests/sentences/README.md for the labels."""
    right_way, right_size, refused = [], [], []
    for row in _rows(folder / "in_scope.jsonl"):
        try:
            reading = reader(row["text"])
        except InstructionRefused:
            right_way.append(False)
            right_size.append(False)
            continue
        way, size = judged(reading, row)
        right_way.append(way)
        right_size.append(size)
    for row in _rows(folder / "out_of_scope.jsonl"):
        try:
            reader(row["text"])
            refused.append(False)
        except InstructionRefused:
            refused.append(True)
    return {
        "attribute and way": figure(torch.tensor(right_way)),
        "size as well": figure(torch.tensor(right_size)),
        "refused": figure(torch.tensor(refused)),
    }


def judged(reading: Reading, row: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a reading has the right attribute and direction, and the right size as well.

    A sentence labelled with a degree between none and all has no direction: there the reading must
    be a target too, or be of another mode that the label allows.
    """
    edit, modes = reading.edit, row.get("modes_ok", [row["mode"]])
    if edit.attribute is not Attribute.parse(row["attribute"]):
        return False, False
    if row["direction"] is None or (edit.mode == "target" and edit.mode in modes):
        way = edit.mode in modes
    else:
        way = edit.direction == row["direction"]
    if edit.mode == "change":
        right = edit.value in (row.get("sizes_ok") or [row["size"]])
    else:
        right = edit.target in (row.get("targets_ok") or [row["target"]])
    return way, way and right and edit.mode in modes


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


def measure(
    folder: Path | None,
    data: Path | None,
    *,
    limit: int | None = None,
    output: Path | None = None,
    write: bool = False,
) -> Iterator[str]:
    """Run the suite on a bundle; its lines, with the report as JSON and as scores if wanted."""
    bundle = Bundle.open(folder)
    report = run(bundle, data, limit=limit)
    keep(bundle.folder, "link", asdict(report), output=output, write=write)
    yield from report.lines()
