"""`edsc evaluate --suite bundle`: every number that a bundle is wanted to reach, one command.

::

    1,205 test faces --invert--> w --adapters, none, closed form; AWGN--> PSNR, identity, perceptual
    some of them    --every edit--> 12 dB --> the judge, EdgeFace            (evaluation.edits)
    5,000 samples, 539 val faces --EdgeFace--> Frechet distance to the training faces
    sentences, 200 photographs, 200 pictures without a face, megabytes, milliseconds

Nothing here chooses a weight or a threshold. `perceptual` is the bundle's own distance (features
of its predictor, uncalibrated), to the photograph, so it includes what inversion loses. "None"
sends the latent as it is and takes what arrives for the latent.
"""

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from channel_sim.channel import Channel, ChannelConfig
from evaluation import bench
from evaluation.arrivals import read_photos
from evaluation.bars import Bar, exactly, statistic
from evaluation.card import keep
from evaluation.edits import edit_bars, edit_faces
from evaluation.faceless import faceless
from evaluation.link_suite import read_sentences
from evaluation.metrics import Figure, figure, frechet_distance, gain_figure, psnr_db
from receiver.pipeline import Receiver
from shared.adapters import NET_PER_SNR, PAPER_SNRS_DB, Adapters, LinearCode
from shared.bundle import INDEX, Bundle
from shared.errors import InvalidRequest
from shared.images import decode_photo
from shared.settings import Settings
from shared.stylegan2 import Generator
from shared.symbols import normalise_power, to_complex, to_real
from training.data import FaceSet, load_faces
from training.faces import match as match_face
from training.predictor import JUDGE
from training.run import default_data
from training.teachers import FaceIdentity
from transmitter.editing import Quality
from transmitter.faces import FaceFinder
from transmitter.inversion import invert
from transmitter.pipeline import INVERSION_STEPS, Transmitter
from transmitter.predictor import Predictor

BATCH = 32
EDIT_SNR_DB = 12.0
PARTS = ("reconstruction", "edits", "samples", "sentences", "faces", "size", "speed")


@dataclass(frozen=True)
class SuiteOptions:
    """How much is measured. The bars are defined for the defaults of `limit` and `samples`.

    limit: test faces, None for all. edited: of them, how many are edited, about 17 times each.
    samples: sampled faces; trained_on: training faces they are compared with, None for all.
    quality: of inversion and edits. per_snr: a bundle folder with the adapters per SNR, where the
    bundle itself lacks them (they are for comparison and need not be shipped).
    """

    limit: int | None = None
    edited: int = 200
    samples: int = 5000
    trained_on: int | None = None
    quality: Quality = "fast"
    per_snr: Path | None = None
    parts: tuple[str, ...] = PARTS
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise InvalidRequest(f"got parts {unknown}, expected some of {', '.join(PARTS)}")


def run(bundle: Bundle, data: Path, options: SuiteOptions) -> Iterator[Bar]:
    """Measure; bars come as soon as they are known."""
    transmitter = Transmitter.from_bundle(bundle)
    asked = {"reconstruction", "edits"} & set(options.parts)
    test = load_faces(data, "test", options.limit) if asked else None
    parts: Mapping[str, Callable[[], Iterator[Bar]]] = {
        "reconstruction": lambda: reconstruction(bundle, transmitter, _of(test), data, options),
        "edits": lambda: editing(bundle, transmitter, _of(test), data, options),
        "samples": lambda: sampling(transmitter.generator, data, options),
        "sentences": lambda: sentences(transmitter),
        "faces": lambda: finding(transmitter.finder, data / "raw_photos"),
        "size": lambda: size(bundle),
        "speed": lambda: speed(bundle),
    }
    for part in PARTS:
        if part in options.parts:
            yield from parts[part]()


def _of(faces: FaceSet | None) -> FaceSet:
    assert faces is not None  # read whenever a part that wants them is asked for
    return faces


# --------------------------------------------------------------------------------- reconstruction


class Route:
    """Latents across plain AWGN with a pair of adapters, or with none, and drawn."""

    def __init__(self, adapters: Adapters | None, generator: Generator) -> None:
        self.adapters, self.generator = adapters, generator
        self.receiver = None if adapters is None else Receiver(adapters.decoder, generator)
        self.channel = Channel(ChannelConfig("awgn"))

    @torch.no_grad()
    def __call__(self, w: Tensor, snr_db: float, seed: int) -> Tensor:
        """w [B, k] -> pictures [B, 3, S, S] in [-1, 1]; equal seeds bring equal noise."""
        draws = torch.Generator().manual_seed(seed)
        if self.adapters is None or self.receiver is None:
            reception = self.channel(normalise_power(to_complex(w)), snr_db, draws)
            arrived = math.sqrt(2) * to_real(reception.y)  # [B, k], unit power and N0 per real
            drawn: Tensor = self.generator.synthesis(arrived)
            return drawn.float().clamp(-1, 1)
        return self.receiver(self.channel(self.adapters.encoder(w, snr_db), snr_db, draws))


def closed_form(adapters: Adapters) -> Adapters:
    """The adapters as their training found them: principal components and water-filling alone."""
    encoder, decoder = adapters.encoder, adapters.decoder
    code = LinearCode(encoder.mean, encoder.analysis, decoder.synthesis, encoder.spectrum)
    return Adapters(adapters.config, code).eval().requires_grad_(False)


def per_snr_adapters(bundle: Bundle, beside: Path | None) -> Adapters | str:
    """The paper's adapters, one pair per SNR, for the bundle's generator; or why there are none."""
    where = bundle if beside is None else Bundle.open(beside)
    if not where.has(NET_PER_SNR):
        return (
            f"no {NET_PER_SNR} in {where.folder.name}:"
            " `python -m training.adapters --per-snr`, then --per-snr FOLDER"
        )
    made_for = where.provenance(NET_PER_SNR).get("made_for", {})
    for net, digest in made_for.items():
        if digest != bundle.index["nets"][net]["sha256"]:
            return f"{NET_PER_SNR} of {where.folder.name} was trained for another {net}"
    return Adapters.from_bundle(where, NET_PER_SNR)


def reconstruction(
    bundle: Bundle, transmitter: Transmitter, faces: FaceSet, data: Path, options: SuiteOptions
) -> Iterator[Bar]:
    """PSNR, identity and perceptual distance of unedited test faces, by code and SNR."""
    generator, predictor = transmitter.generator, transmitter.predictor
    embed = FaceIdentity(data)
    adapters = Adapters.from_bundle(bundle)
    per_snr = per_snr_adapters(bundle, options.per_snr)
    plans = [("adapters", Route(adapters, generator), snr) for snr in PAPER_SNRS_DB]
    plans += [("none", Route(None, generator), -6.0)]
    plans += [("closed", Route(closed_form(adapters), generator), snr) for snr in (-6.0, 0.0)]
    plans += [("as_it_is", Route(Adapters().eval(), generator), -6.0)]
    if isinstance(per_snr, Adapters):
        plans += [("per_snr", Route(per_snr, generator), snr) for snr in PAPER_SNRS_DB]
    rows: dict[tuple[str, str, float], list[Tensor]] = {}
    for part in torch.arange(len(faces)).split(BATCH):
        face = faces.batch(part)
        w = invert(
            face, transmitter.encoder, generator, predictor, INVERSION_STEPS[options.quality]
        )
        with torch.no_grad():
            who = embed(face)
            for name, route, snr_db in plans:
                image = route(w, snr_db, options.seed + int(part[0]))
                found = {"perceptual": predictor.perceptual(image, face)}
                if name == "adapters":
                    found["psnr"] = psnr_db(image, face)
                    found["identity"] = (embed(image) * who).sum(1)
                for what, values in found.items():
                    rows.setdefault((what, name, snr_db), []).append(values)
    measured = {key: torch.cat(values) for key, values in rows.items()}
    yield from reconstruction_bars(measured, per_snr if isinstance(per_snr, str) else "")


def reconstruction_bars(
    rows: Mapping[tuple[str, str, float], Tensor], no_per_snr: str
) -> Iterator[Bar]:
    """Bars from values [N] per (measure, code, SNR); `no_per_snr`: why that code is missing."""
    wanted = {18.0: (20.0, 0.45), 12.0: None, 6.0: (18.5, 0.35), 0.0: None, -6.0: (15.5, 0.15)}
    for snr_db, bar in wanted.items():
        psnr, identity = bar or (None, None)
        for name, words, limit, unit in (
            ("psnr", "PSNR", psnr, "dB"),
            ("identity", "identity cosine", identity, ""),
            ("perceptual", "perceptual distance", None, ""),
        ):
            what = f"reconstruction at {snr_db:g} dB: {words}"
            value = figure(rows[name, "adapters", snr_db])
            yield Bar(f"{name}_{snr_db:g}dB", what, value, limit, name != "perceptual", unit)
    low = rows["perceptual", "adapters", -6.0]
    yield Bar(
        "adapters_gain",
        "perceptual at -6 dB: adapters against none, lower by",
        gain_figure(low, rows["perceptual", "none", -6.0]),
        0.45,
        unit="%",
    )
    yield Bar(
        "adapters_gain_shrunk",
        "the same against a latent sent as it is, shrunk to its mean",
        gain_figure(low, rows["perceptual", "as_it_is", -6.0]),
        unit="%",
    )
    for snr_db in PAPER_SNRS_DB:
        name, what = f"one_adapter_{snr_db:g}dB", f"one adapter against per-SNR at {snr_db:g} dB"
        if ("perceptual", "per_snr", snr_db) not in rows:
            yield Bar(name, what, None, 0.02, at_least=False, unit="%", note=no_per_snr)
            continue
        gain = gain_figure(
            rows["perceptual", "adapters", snr_db], rows["perceptual", "per_snr", snr_db]
        )
        worse = Figure(-gain.mean, -gain.high, -gain.low, gain.count)
        yield Bar(name, f"{what}: worse by", worse, 0.02, at_least=False, unit="%")
    for snr_db in (-6.0, 0.0):
        gain = gain_figure(
            rows["perceptual", "adapters", snr_db], rows["perceptual", "closed", snr_db]
        )
        what = f"perceptual at {snr_db:g} dB: trained against LMMSE, lower by"
        yield Bar(f"trained_gain_{snr_db:g}dB", what, gain, 0.10, unit="%")


# -------------------------------------------------------------------------------------------- edits


def editing(
    bundle: Bundle, transmitter: Transmitter, faces: FaceSet, data: Path, options: SuiteOptions
) -> Iterator[Bar]:
    """Edits of the first `edited` test faces, as an independent judge sees them at 12 dB."""
    if not bundle.has(JUDGE):
        why = "no judge in the bundle: `edsc train judge`"
        yield Bar("hit_exact", "edits, judge: exactly the degree", None, 0.70, unit="%", note=why)
        yield Bar("hit_within", "edits, judge: within one degree", None, 0.92, unit="%", note=why)
        return
    rules = [
        [bundle.config(net).get(key) for key in ("quantiles", "min_gap")]
        for net in (JUDGE, "predictor")
    ]
    if rules[0] != rules[1]:
        raise InvalidRequest(
            f"the judge's degrees are cut by {rules[0]}, the predictor's by {rules[1]}; expected"
            " one rule: `python -m training.predictor --recut`, then train the fields anew"
        )
    route = Route(Adapters.from_bundle(bundle), transmitter.generator)
    edits = edit_faces(
        transmitter,
        Predictor.from_bundle(bundle, JUDGE),
        lambda w, number: route(w, EDIT_SNR_DB, options.seed + number),
        FaceIdentity(data),
        faces.first(options.edited),
        options.quality,
        EDIT_SNR_DB,
    )
    yield from edit_bars(list(edits))


# ------------------------------------------------------------------------------------------ samples


@torch.no_grad()
def sampling(generator: Generator, data: Path, options: SuiteOptions) -> Iterator[Bar]:
    """fd_edgeface of samples to the training faces, over that of val to the training faces."""
    embed = FaceIdentity(data)
    sampled = []
    draws = torch.Generator().manual_seed(options.seed)
    for start in range(0, options.samples, BATCH):
        count = min(BATCH, options.samples - start)
        z = torch.randn(count, generator.config.z_dim, generator=draws)
        sampled.append(embed(generator(z).clamp(-1, 1)))
    sets = []
    for split, limit in (("train", options.trained_on), ("val", None)):
        faces = load_faces(data, split, limit)
        index = torch.arange(len(faces)).split(BATCH)
        sets.append(torch.cat([embed(faces.batch(part)) for part in index]))
        del faces
    train, val = sets
    ours, theirs, ratio = distance_ratio(torch.cat(sampled), val, train, seed=options.seed)
    yield Bar(
        "fd_ratio",
        "fd_edgeface of samples, in distances of val",
        ratio,
        4.0,
        at_least=False,
        note=f"{len(train)} training faces",
    )
    yield Bar("fd_samples", "fd_edgeface: samples to training set", ours, at_least=False)
    yield Bar("fd_val", "fd_edgeface: val to training set", theirs, at_least=False)


def distance_ratio(
    ours: Tensor, theirs: Tensor, reference: Tensor, resamples: int = 50, seed: int = 0
) -> tuple[Figure, Figure, Figure]:
    """Frechet distances of two sets [N, D], [M, D] to a third, and the first over the second.

    A resample holds two thirds of its set's rows, so its distance is larger than the set's own; the
    intervals are moved back to where their middle is the measured value.
    """
    few = condensed(reference)
    draws = torch.Generator().manual_seed(seed)
    found = torch.empty(resamples, 2, dtype=torch.float64)
    for number in range(resamples):
        for column, rows in enumerate((ours, theirs)):
            index = torch.randint(len(rows), (len(rows),), generator=draws)
            found[number, column] = frechet_distance(rows[index], few)
    values = torch.tensor([frechet_distance(ours, few), frechet_distance(theirs, few)])
    columns = (
        (found[:, 0], float(values[0]), len(ours)),
        (found[:, 1], float(values[1]), len(theirs)),
        (found[:, 0] / found[:, 1], float(values[0] / values[1]), len(ours)),
    )
    first, second, ratio = (_recentred(*column) for column in columns)
    return first, second, ratio


def _recentred(resampled: Tensor, value: float, count: int) -> Figure:
    ends = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (ends - resampled.mean() + value).tolist()
    return Figure(value, low, high, count)


def condensed(rows: Tensor) -> Tensor:
    """At most 2 D rows with the mean and the covariance of rows [N, D]; exact, and quick to use."""
    n, d = rows.shape
    if n <= 2 * d:
        return rows.double()
    mean = rows.double().mean(0)
    r = torch.linalg.qr((rows.double() - mean) / math.sqrt(n - 1), mode="r").R  # R^T R = C
    scaled = r * math.sqrt((2 * d - 1) / 2)
    return torch.cat([mean + scaled, mean - scaled])


# ------------------------------------------------------------------- sentences, faces, size, speed


def sentences(transmitter: Transmitter) -> Iterator[Bar]:
    """The test sentences, read."""
    found = read_sentences(transmitter.reader)
    for name, what, key, wanted in (
        ("sentences_right", "attribute, direction and size right", "size as well", 0.98),
        ("sentences_refused", "out of scope refused", "refused", 0.98),
        ("sentences_way", "attribute and direction right", "attribute and way", None),
    ):
        yield Bar(name, f"sentences: {what}", found[key], wanted, unit="%")


def finding(finder: FaceFinder, folder: Path, empty: int = 200) -> Iterator[Bar]:
    """Faces in photographs with known points, and in pictures that have none."""
    with (folder / "landmarks.csv").open(newline="") as file:
        points = {
            row.pop("image"): torch.tensor([float(v) for v in row.values()]).reshape(5, 2)
            for row in csv.DictReader(file)
        }
    names = [name for name in sorted(points) if (folder / name).is_file()]
    if not names:
        raise InvalidRequest(f"no photographs at {folder}: point --data at the data folder")
    errors = []
    for name in names:
        faces = finder(decode_photo((folder / name).read_bytes()))
        error = match_face(faces[0] if faces else None, points[name])
        if error is not None:
            errors.append(error)
    found = torch.zeros(len(names))
    found[: len(errors)] = 1
    yield Bar("faces_found", "photographs: the face is found", figure(found), 0.995, unit="%")
    why = "to one look of the labelling detector" if errors else "no face found"
    yield Bar(
        "landmark_error",
        "photographs: landmark error, of the eye distance",
        figure(torch.tensor(errors)) if errors else None,
        0.04,
        at_least=False,
        unit="%",
        note=why,
    )
    false = torch.tensor([float(bool(finder(picture))) for picture in faceless(empty)])
    what = "noise and patterns: a face is found"
    yield Bar("false_faces", what, figure(false), 0.0, at_least=False, unit="%")


def size(bundle: Bundle) -> Iterator[Bar]:
    """Megabytes of all files of the bundle."""
    count = sum(int(bundle.index["nets"][net]["bytes"]) for net in bundle.nets)
    count += (bundle.folder / INDEX).stat().st_size
    yield Bar("megabytes", "bundle size", exactly(count / 1e6), 100.0, at_least=False, unit="MB")


def speed(bundle: Bundle, edits: int = 20) -> Iterator[Bar]:
    """Median time of one `fast` edit through the four processes, on this machine."""
    from edsc.up import Stack

    photos = tuple(photo.data for photo in read_photos(bench.ROOT / "samples"))
    options = bench.BenchOptions(edits=edits, photos=photos)
    with Stack(Settings(weights=bundle.folder.resolve()), free_ports=True) as stack:
        measured = bench.measure(stack.url, "fast", options)
    seconds = torch.tensor([sample.client_ms / 1000 for sample in measured.samples])
    p50 = statistic(seconds, lambda x: x.quantile(0.5, -1)) if len(seconds) else None
    failed = f"{len(measured.failures)} failed; " if measured.failures else ""
    note = f"{failed}{os.cpu_count()} cores, {torch.get_num_threads()} threads a process"
    what = "`fast` edit through the four processes, median"
    yield Bar("fast_p50", what, p50, 0.6, at_least=False, unit="s", note=note)


# ------------------------------------------------------------------------------------------- report


def measure(
    folder: Path | None,
    data: Path | None,
    options: SuiteOptions,
    *,
    output: Path | None = None,
    write: bool = False,
) -> Iterator[str]:
    """Run the suite; a line per bar as it is known, the report as JSON and as scores."""
    bundle = Bundle.open(folder)
    yield f"bundle {bundle.digest[:12]}, {options.quality}, {torch.get_num_threads()} threads"
    bars = []
    for bar in run(bundle, data or default_data(), options):
        bars.append(bar)
        yield bar.line()
    keep(bundle.folder, "bundle", report(bundle, options, bars), output=output, write=write)
    verdicts = [bar.verdict for bar in bars]
    yield ", ".join(f"{verdicts.count(v)} {v}" for v in ("reached", "missed", "not measured"))


def report(bundle: Bundle, options: SuiteOptions, bars: list[Bar]) -> dict[str, Any]:
    """Plain values."""
    asked = {k: v for k, v in asdict(options).items() if k != "per_snr"}  # a path of this machine
    return {"bundle": bundle.digest, "options": asked, "bars": [bar.to_json() for bar in bars]}
