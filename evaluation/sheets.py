"""`edsc evaluate --suite sheets`: what edits look like, on faces of nobody.

One picture per attribute and way, eyeglasses, bangs and beard put on and taken off: twenty sampled
faces, each above its edit. Both arrive over the link, at the same SNR and with the same noise.

A face to put glasses on has none to begin with, and one to take them off has some: seeds are gone
through in order and the first fitting faces are taken, or, where too few fit, the nearest. Beards
are put on faces that the predictor takes for men's. Nobody chooses by looking.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from evaluation.bundle_suite import Route
from shared.adapters import Adapters
from shared.attributes import Attribute, Edit
from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.images import to_uint8
from shared.stylegan2 import Generator
from transmitter.editing import arrival_of, match
from transmitter.fields import Fields
from transmitter.opinions import Opinions
from transmitter.regressor import Regressor

SHOWN = 20
COLUMNS: Final = 10
LARGEST_BYTES: Final = 300_000
BATCH: Final = 32
GAP: Final = 6  # px between a pair of rows and the next


@dataclass(frozen=True)
class Sheet:
    """What one sheet shows: an attribute walked to `target` from faces on the other side."""

    attribute: Attribute
    target: int

    @property
    def name(self) -> str:
        return f"{self.attribute.value}-{'added' if self.target else 'removed'}"


SHEETS: Final = tuple(
    Sheet(attribute, target)
    for attribute in (Attribute.EYEGLASSES, Attribute.BANGS, Attribute.BEARD)
    for target in (4, 0)
)


class Studio:
    """The nets that sheets need, and the sampled faces to choose from."""

    def __init__(self, bundle: Bundle, snr_db: float, candidates: int) -> None:
        self.fields, self.guide = Fields.from_bundle(bundle), Opinions.from_bundle(bundle)
        self.regressor = Regressor.from_bundle(bundle)
        adapters = Adapters.from_bundle(bundle)
        self.generator = Generator.from_bundle(bundle)
        self.route, self.snr_db = Route(adapters, self.generator), snr_db
        self.arrival = arrival_of(adapters.encoder, adapters.decoder, snr_db)
        self.w, self.scores, self.male = self._sample(candidates)

    @torch.no_grad()
    def _sample(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [N, 512] of the seeds 0..N-1, their scores [N, 5], how male they look [N]."""
        latents, scores, male = [], [], []
        named = self.guide.first.config.auxiliary
        for start in range(0, count, BATCH):
            seeds = range(start, min(start + BATCH, count))
            z = torch.cat([_z(seed, self.generator.config.z_dim) for seed in seeds])
            w = self.generator.mapping(z)
            image = self.generator.synthesis(w).clamp(-1, 1)
            _, evidence = self.guide.first.heads(self.guide.first.features(image)[-1].flatten(1))
            latents.append(w)
            scores.append(self.guide.steady_scores(image))
            male.append(
                evidence[:, named.index("Male")] if "Male" in named else torch.zeros(len(w))
            )
        return torch.cat(latents), torch.cat(scores), torch.cat(male)

    def choose(self, sheet: Sheet, count: int) -> Tensor:
        """Seeds [count] of the faces for a sheet, in order.

        To add: the first that show nothing of it. To remove: the first that show degree 3 or more,
        filled up with those whose score is highest.
        """
        index = sheet.attribute.index
        degree = self.guide.score_degrees(self.scores)[:, index]
        fits = degree == 0 if sheet.target else degree >= 3
        if sheet.attribute is Attribute.BEARD and sheet.target:
            fits = fits & (self.male > 0)
        first = fits.nonzero()[:count, 0]
        if len(first) < count:
            sign = -1.0 if sheet.target else 1.0
            order = (sign * self.scores[:, index]).masked_fill(fits, -torch.inf).argsort()
            first = torch.cat([first, order.flip(0)[: count - len(first)]])
        return first.sort().values

    @torch.no_grad()
    def pairs(self, sheet: Sheet, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What arrives of each face without and with the edit, [1, 3, S, S] each."""
        for seed in seeds.tolist():
            w = self.w[seed : seed + 1]
            found = match(
                w,
                Edit(sheet.attribute, target=sheet.target),
                generator=self.generator,
                fields=self.fields,
                predictor=self.guide,
                regressor=self.regressor,
                arrival=self.arrival,
                limits="balanced",
            )
            yield self.route(w, self.snr_db, seed), self.route(found.w, self.snr_db, seed)


def _z(seed: int, size: int) -> Tensor:
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed))


def lay_out(pairs: Sequence[tuple[Tensor, Tensor]], columns: int = COLUMNS) -> Image.Image:
    """Pairs of pictures [1, 3, S, S], the second of each below the first, `columns` a row."""
    if not pairs:
        raise InvalidRequest("got 0 faces for a sheet, expected at least one")
    side = pairs[0][0].shape[-1]
    rows = -(-len(pairs) // columns)
    height = rows * 2 * side + (rows - 1) * GAP
    sheet = Image.new("RGB", (min(columns, len(pairs)) * side, height), "white")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, columns)
        for below, image in enumerate(pair):
            tile = Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy())
            sheet.paste(tile, (column * side, row * (2 * side + GAP) + below * side))
    return sheet


def write_small(sheet: Image.Image, path: Path, largest: int = LARGEST_BYTES) -> int:
    """Write WebP at the best quality that keeps the file below `largest` bytes; its quality.

    Raises InvalidRequest where even the worst is larger.
    """
    for quality in range(90, 0, -10):
        buffer = io.BytesIO()
        sheet.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= largest:
            path.write_bytes(buffer.getvalue())
            return quality
    raise InvalidRequest(
        f"a sheet of {sheet.width} x {sheet.height} px takes {buffer.tell()} bytes at the least,"
        f" expected at most {largest}"
    )


def draw(
    folder: Path | None, out: Path, *, snr_db: float = 12.0, candidates: int = 1000
) -> Iterator[str]:
    """Draw every sheet of a bundle into the folder `out`; a line for each."""
    studio = Studio(Bundle.open(folder), snr_db, candidates)
    out.mkdir(parents=True, exist_ok=True)
    for sheet in SHEETS:
        seeds = studio.choose(sheet, SHOWN)
        path = out / f"{sheet.name}.webp"
        write_small(lay_out(list(studio.pairs(sheet, seeds))), path)
        listed = " ".join(str(seed) for seed in seeds.tolist())
        yield f"{path}  {path.stat().st_size / 1000:.0f} kB  seeds {listed}"
