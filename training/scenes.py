"""Pictures for the face finder to learn from: photographs moved, mixed and spoiled, and pictures
without any face.

::

    photo --turn, scale, flip, place--> over clutter --spoil--> scene
    four scenes, halved -------------------------------------> mosaic (several, smaller faces)
    clutter | corners of photos | shuffled photos -----------> empty scene

Everything is drawn from one `torch.Generator`, so a resumed run goes on with the same pictures.
"""

import csv
import io
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared.errors import InvalidRequest
from transmitter.faces import face_frame, face_size

CANVAS = 192  # px, photographs are kept at this longer side
_MIRRORED = [1, 0, 2, 4, 3]  # left and right change places


@dataclass(frozen=True)
class PhotoSet:
    """Unaligned photographs in memory, each in the top left corner of a square canvas.

    images: uint8 [N, 3, CANVAS, CANVAS]. extents: [N, 2] width and height, px of the canvas.
    points: [N, 5, 2] px of the canvas. scales: [N] canvas px per original px.
    """

    names: tuple[str, ...]
    images: Tensor
    extents: Tensor
    points: Tensor
    scales: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, start: int, stop: int) -> "PhotoSet":
        part = slice(start, stop)
        return PhotoSet(
            self.names[part],
            self.images[part],
            self.extents[part],
            self.points[part],
            self.scales[part],
        )

    def photo(self, number: int) -> Tensor:
        """One photograph without its canvas: uint8 [3, H, W]."""
        width, height = (int(v) for v in self.extents[number])
        return self.images[number, :, :height, :width]


def load_photos(folder: Path, limit: int | None = None) -> PhotoSet:
    """Read `photos.tar` and `landmarks.csv` of a folder of unaligned photographs."""
    archive = folder / "photos.tar"
    if not archive.is_file():
        raise InvalidRequest(
            f"no photographs at {archive}: point EDSC_DATA or --data at the data folder"
        )
    with (folder / "landmarks.csv").open(newline="") as file:
        rows = {row.pop("image"): [float(v) for v in row.values()] for row in csv.DictReader(file)}
    names: list[str] = []
    images: list[Tensor] = []
    extents: list[tuple[int, int]] = []
    points: list[Tensor] = []
    scales: list[float] = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or (limit is not None and len(names) >= limit):
                continue
            file_in_tar = tar.extractfile(member)
            assert file_in_tar is not None  # isfile() was true
            with Image.open(io.BytesIO(file_in_tar.read())) as opened:
                picture = opened.convert("RGB")
            scale = CANVAS / max(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            small = np.array(
                picture.resize(
                    (width, height),
                    Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC,
                )
            )
            canvas = torch.zeros(3, CANVAS, CANVAS, dtype=torch.uint8)
            canvas[:, :height, :width] = torch.from_numpy(small).permute(2, 0, 1)
            names.append(member.name)
            images.append(canvas)
            extents.append((width, height))
            points.append(torch.tensor(rows[member.name]).reshape(5, 2) * scale)
            scales.append(scale)
    return PhotoSet(
        tuple(names),
        torch.stack(images),
        torch.tensor(extents).float(),
        torch.stack(points),
        torch.tensor(scales),
    )


@dataclass(frozen=True)
class Scenes:
    """pictures: [B, 3, S, S] in [-1, 1]. points: [B, K, 5, 2] px; known: [B, K] bool, a face that
    must be found; unclear: [B, K] bool, a face that may be found (too much of it is cut off)."""

    pictures: Tensor
    points: Tensor
    known: Tensor
    unclear: Tensor


def draw_scenes(photos: PhotoSet, index: Tensor, side: int, generator: torch.Generator) -> Scenes:
    """Scenes from photographs `index` [B]: 5/8 of one face, 1/8 empty, 2/8 mosaics of those."""
    count = len(index)
    empty, mosaic = max(1, count // 8), max(1, count // 4)
    single = max(1, count - empty - mosaic)
    pictures, points, known, unclear = _faces(photos, index[:single], side, generator)
    nothing = _empty(photos, index[-empty:], side, generator)
    pictures = torch.cat([pictures, nothing])
    points = torch.cat([points, torch.zeros(empty, 1, 5, 2)])
    known = torch.cat([known, torch.zeros(empty, 1, dtype=torch.bool)])
    unclear = torch.cat([unclear, torch.zeros(empty, 1, dtype=torch.bool)])
    # Mosaics: two by two scenes of this batch, halved.
    tiles = torch.randint(len(pictures), (mosaic, 4), generator=generator)
    halves = F.avg_pool2d(pictures, 2)[tiles]  # [M, 4, 3, S/2, S/2]
    rows = torch.cat([torch.cat([halves[:, 0], halves[:, 1]], 3),
                      torch.cat([halves[:, 2], halves[:, 3]], 3)], 2)  # fmt: skip
    corners = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]) * (side / 2)
    four = points[tiles, 0] / 2 + corners[:, None]  # [M, 4, 5, 2]
    seen = face_size(four) > 0.08 * side  # smaller: too few pixels to insist
    single_known, single_unclear = known[tiles, 0], unclear[tiles, 0]  # [M, 4]
    points = torch.cat([points.expand(-1, 4, -1, -1), four])
    only = torch.tensor([True, False, False, False])
    known = torch.cat([known & only, single_known & seen])
    unclear = torch.cat([unclear & only, single_unclear | (single_known & ~seen)])
    return Scenes(spoil(torch.cat([pictures, rows]), generator), points, known, unclear)


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _faces(
    photos: PhotoSet, index: Tensor, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One photograph a scene -> pictures [B, 3, S, S], points [B, 1, 5, 2], known, unclear."""
    count = len(index)
    points, extents = photos.points[index], photos.extents[index]
    # Log-uniform size; half the side of the FFHQ crop, so 1.2 is a face larger than the picture.
    size = side * torch.exp(_uniform(math.log(0.1), math.log(1.15), count, generator))
    zoom = size / face_size(points).clamp(min=4.0)  # [B]
    angle = torch.randn(count, generator=generator) * 0.26
    wild = torch.rand(count, generator=generator) < 0.3
    angle = torch.where(wild, _uniform(-0.7, 0.7, count, generator), angle)
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    stretch = torch.exp(torch.randn(count, generator=generator) * 0.06)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    forward = torch.stack(
        [torch.stack([cos * flip * stretch, -sin / stretch], -1),
         torch.stack([sin * flip * stretch, cos / stretch], -1)], -2
    )  # [B, 2, 2], photo px -> scene px  # fmt: skip
    # A small face may be anywhere, a large one is mostly inside.
    room = (0.5 - 0.25 * size / side).clamp(0.1, 0.45) * side
    spot = (torch.rand(count, 2, generator=generator) * 2 - 1) * room[:, None] + side / 2
    middle = points.mean(1)  # [B, 2]
    moved = (points - middle[:, None]) @ forward.mT + spot[:, None]  # [B, 5, 2]
    moved = torch.where(flip[:, None, None] < 0, moved[:, _MIRRORED], moved)

    line = torch.arange(side) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    scene = torch.stack([x, y], -1).reshape(1, -1, 2) - spot[:, None]  # [B, S*S, 2]
    where = scene @ torch.linalg.inv(forward).mT + middle[:, None]
    inside = ((where >= 0) & (where <= extents[:, None])).all(-1)  # [B, S*S]
    inside = inside.reshape(count, 1, side, side)
    grid = (where / CANVAS * 2 - 1).reshape(count, side, side, 2)
    sampled = torch.empty(count, 3, side, side)
    # Reduced copies for small faces: plain sampling would skip pixels.
    level = torch.where(zoom > 0.7, 0, torch.where(zoom > 0.35, 1, 2))
    for step in range(3):
        chosen = torch.nonzero(level == step)[:, 0]
        if len(chosen) == 0:
            continue
        source = photos.images[index[chosen]].float()
        source = F.avg_pool2d(source, 2**step) if step else source
        sampled[chosen] = F.grid_sample(
            source, grid[chosen], "bilinear", "border", align_corners=False
        )
    behind = _clutter(photos, index.roll(1), side, generator)
    pictures = torch.where(inside, sampled / 127.5 - 1, behind)
    shown = ((moved >= 0) & (moved <= side)).all(-1).sum(-1)  # [B] points inside
    centre = moved.mean(1)
    held = ((centre >= 2) & (centre <= side - 2)).all(-1)
    known = held & (shown >= 4)
    _cover(pictures, moved, generator)
    return pictures, moved[:, None], known[:, None], ~known[:, None]


def draw_crops(
    photos: PhotoSet, index: Tensor, side: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Faces cut out by points that are somewhat wrong, as a first look leaves them.

    Returns pictures [B, 3, side, side] in [-1, 1] and the right points [B, 5, 2], px of them.
    """
    count = len(index)
    points, extents = photos.points[index], photos.extents[index]
    frames = [face_frame(five, scale) for five in points]
    centre = torch.stack([frame[0] for frame in frames]).float()  # [B, 2]
    axis = torch.stack([frame[1] for frame in frames]).float()  # [B, 2]
    wide = torch.where(torch.rand(count, generator=generator) < 0.1, 2.0, 1.0)
    angle = torch.randn(count, generator=generator) * 0.12 * wide
    grow = torch.exp(torch.randn(count, generator=generator) * 0.08 * wide)
    shift = torch.randn(count, 2, generator=generator) * 0.05 * wide[:, None]
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * grow, angle.sin() * grow
    x = torch.stack([cos * axis[:, 0] - sin * axis[:, 1], sin * axis[:, 0] + cos * axis[:, 1]], -1)
    y = torch.stack([-x[:, 1], x[:, 0]], -1)
    stretch = torch.exp(torch.randn(count, 1, generator=generator) * 0.05)
    axes = torch.stack([x * flip[:, None] * stretch, y / stretch], -1)  # [B, 2, 2], columns x, y
    centre = centre + shift * axis.norm(dim=1, keepdim=True)

    line = (torch.arange(side) + 0.5) / side * 2 - 1
    v, u = torch.meshgrid(line, line, indexing="ij")
    square = torch.stack([u, v], -1).reshape(1, -1, 2)
    where = square @ axes.mT + centre[:, None]  # [B, S*S, 2] px of the canvas
    period = 2 * extents[:, None]
    folded = where.remainder(period)
    folded = torch.minimum(folded, period - folded)  # mirrored borders, as `align` has them
    grid = (folded / CANVAS * 2 - 1).reshape(count, side, side, 2)
    source = photos.images[index].float()
    pictures = F.grid_sample(source, grid, "bilinear", "border", align_corners=False)
    inside = torch.linalg.solve(axes, (points - centre[:, None]).mT).mT  # [B, 5, 2] in -1..1
    inside = torch.where(flip[:, None, None] < 0, inside[:, _MIRRORED], inside)
    pixels = (inside + 1) / 2 * side
    pictures = pictures / 127.5 - 1
    _cover(pictures, pixels, generator)
    return spoil(pictures, generator), pixels


def _cover(pictures: Tensor, points: Tensor, generator: torch.Generator) -> None:
    """Hide part of some faces behind a rectangle: a hand, a cup, another head."""
    side = pictures.shape[-1]
    for number in torch.nonzero(torch.rand(len(pictures), generator=generator) < 0.12)[:, 0]:
        size = float(face_size(points[number]))
        width, height = (_uniform(0.2, 0.6, 2, generator) * size).tolist()
        near = points[number, int(torch.randint(5, (1,), generator=generator))]
        left, top = (near - torch.tensor([width, height]) / 2).tolist()
        box = [int(max(0, min(side, v))) for v in (left, left + width, top, top + height)]
        shade = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        pictures[number, :, box[2] : box[3], box[0] : box[1]] = shade


def _clutter(photos: PhotoSet, index: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """What lies around a photograph: flat colours, clouds, noise, patterns. [B, 3, S, S]."""
    count = len(index)
    out = torch.empty(count, 3, side, side)
    kinds = torch.randint(6, (count,), generator=generator).tolist()
    line = torch.linspace(-1, 1, side)
    for number, kind in enumerate(kinds):
        base = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        if kind == 0:  # flat
            out[number] = base
        elif kind == 1:  # the colours of a photograph, nothing else of it
            cells = int(torch.randint(1, 6, (1,), generator=generator))
            small = F.adaptive_avg_pool2d(photos.images[index[number]].float(), cells)
            out[number] = _enlarge(small / 127.5 - 1, side)
        elif kind == 2:  # clouds and noise of any coarseness
            cells = int(2 ** float(_uniform(1, math.log2(side), 1, generator)))
            grain = torch.randn(3, cells, cells, generator=generator)
            out[number] = _enlarge(grain * 0.5 + base, side)
        elif kind == 3:  # gradient
            slope = torch.randn(3, 2, generator=generator)
            out[number] = base + slope[:, :1, None] * line + slope[:, 1:, None] * line[:, None]
        elif kind == 4:  # stripes and checks
            out[number] = _stripes(side, base, generator)
        else:  # lines of writing
            out[number] = _writing(side, base, generator)
    return out.clamp_(-1, 1)


def _enlarge(small: Tensor, side: int) -> Tensor:
    return F.interpolate(small[None], (side, side), mode="bilinear")[0]


def _stripes(side: int, base: Tensor, generator: torch.Generator) -> Tensor:
    turn, phase = (torch.rand(2, generator=generator) * 6.28).tolist()
    rate = float(torch.exp(_uniform(math.log(0.03), math.log(1.5), 1, generator)))
    line = torch.arange(side).float()
    u = math.cos(turn) * line + math.sin(turn) * line[:, None]
    wave = torch.sin(u * rate + phase)
    mode = int(torch.randint(4, (1,), generator=generator))
    if mode in (1, 3):  # across, too
        v = math.cos(turn) * line[:, None] - math.sin(turn) * line
        wave = wave * torch.sin(v * rate * float(_uniform(0.5, 2, 1, generator)))
    if mode >= 2:  # hard edges
        wave = wave.sign()
    return base + wave * (torch.rand(3, 1, 1, generator=generator) * 1.5 - 0.5)


def _writing(side: int, base: Tensor, generator: torch.Generator) -> Tensor:
    ink = torch.rand(3, 1, 1, generator=generator) * 2 - 1
    pitch = int(torch.randint(6, 24, (1,), generator=generator))
    rows, fine = -(-side // pitch), max(1, pitch // 5)
    marks = torch.rand(1, rows * 4, -(-side // fine), generator=generator) < 0.55
    words = torch.rand(1, rows, -(-side // (3 * pitch)) * 3, generator=generator) < 0.8
    page = F.interpolate(marks[None].float(), (side, side))[0]
    page = page * F.interpolate(words[None].float(), (side, side))[0]
    gaps = (torch.arange(side) % pitch < 0.65 * pitch).float()[:, None]
    return base + (ink - base) * page * gaps


def _empty(photos: PhotoSet, index: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Pictures without a face: clutter, corners of photographs, photographs in pieces."""
    out = _clutter(photos, index, side, generator)
    kinds = torch.randint(4, (len(index),), generator=generator).tolist()
    for number, kind in enumerate(kinds):
        chosen = index[number]
        if kind in (1, 3):  # a part of the photograph beside the face
            box = _beside(photos.points[chosen], photos.extents[chosen], generator)
            if box is None:
                continue
            left, top, right, bottom = box
            part = photos.images[chosen, :, top:bottom, left:right].float() / 127.5 - 1
            out[number] = _enlarge(part, side)
        elif kind == 2:  # skin, hair and edges, but no face: pieces in another order
            pieces = int(torch.randint(4, 9, (1,), generator=generator))
            step = side // pieces
            points = photos.points[chosen]
            cut = _enlarge_around(photos, int(chosen), points, step * pieces)
            grid = cut.unfold(1, step, step).unfold(2, step, step)  # [3, p, p, step, step]
            order = torch.randperm(pieces * pieces, generator=generator)
            mixed = grid.flatten(1, 2)[:, order].unflatten(1, (pieces, pieces))
            whole = mixed.permute(0, 1, 3, 2, 4).reshape(3, step * pieces, step * pieces)
            out[number] = _enlarge(whole, side)
    return out


def empty_scenes(photos: PhotoSet, count: int, side: int, seed: int = 1) -> Tensor:
    """Spoiled pictures without a face, always the same: [count, 3, S, S] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(count) % len(photos)
    return spoil(_empty(photos, index, side, generator), generator)


def _beside(
    points: Tensor, extent: Tensor, generator: torch.Generator
) -> tuple[int, int, int, int] | None:
    """A box of at least 24 px outside the head, or None where the head leaves no room."""
    size = float(face_size(points))
    x, y = points.mean(0).tolist()
    width, height = (int(v) for v in extent)
    room = [
        (0, 0, int(x - 0.75 * size), height),
        (int(x + 0.75 * size), 0, width, height),
        (0, 0, width, int(y - 1.0 * size)),
        (0, int(y + 0.85 * size), width, height),
    ]
    room = [box for box in room if box[2] - box[0] >= 24 and box[3] - box[1] >= 24]
    if not room:
        return None
    left, top, right, bottom = room[int(torch.randint(len(room), (1,), generator=generator))]
    longest = min(right - left, bottom - top)
    edge = int(torch.randint(24, longest + 1, (1,), generator=generator))
    left += int(torch.randint(right - left - edge + 1, (1,), generator=generator))
    top += int(torch.randint(bottom - top - edge + 1, (1,), generator=generator))
    return left, top, left + edge, top + edge


def _enlarge_around(photos: PhotoSet, number: int, points: Tensor, side: int) -> Tensor:
    """The square of a face, as large as the photograph allows: [3, side, side]."""
    size = float(face_size(points))
    x, y = points.mean(0).tolist()
    photo = photos.photo(number)
    top, left = max(0, int(y - 0.8 * size)), max(0, int(x - 0.8 * size))
    part = photo[:, top : int(y + 0.8 * size) + 2, left : int(x + 0.8 * size) + 2]
    return _enlarge(part.float() / 127.5 - 1, side)


def spoil(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Light, colour, blur, noise and JPEG, each on some of the pictures [B, 3, S, S]."""
    count, side = len(pictures), pictures.shape[-1]

    def some(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    def spread(width: float) -> Tensor:
        return (torch.randn(count, generator=generator) * width)[:, None, None, None]

    out = pictures.clone()
    for number in torch.nonzero(some(0.25))[:, 0].tolist():  # out of focus or enlarged
        low = int(side * float(_uniform(0.25, 0.8, 1, generator)))
        small = F.interpolate(out[number][None], (low, low), mode="bilinear", antialias=True)
        out[number] = _enlarge(small[0], side)
    grey = out.mean(1, keepdim=True)
    colour = torch.where(some(0.15), torch.zeros(count), 1 + 0.3 * spread(1.0).flatten())
    out = grey + (out - grey) * colour[:, None, None, None]
    tint = torch.randn(count, 3, 1, 1, generator=generator) * 0.08
    out = out * torch.exp(spread(0.25)) + spread(0.2) + tint
    gamma = torch.exp(spread(0.25))
    out = ((out.clamp(-1, 1) + 1) / 2).pow(gamma) * 2 - 1
    level = torch.where(some(0.3), _uniform(0.02, 0.2, count, generator), torch.zeros(count))
    noisy = torch.nonzero(level)[:, 0]
    shape = (len(noisy), 3, side, side)
    out[noisy] += torch.randn(shape, generator=generator) * level[noisy][:, None, None, None]
    out = out.clamp(-1, 1)
    for number in torch.nonzero(some(0.15))[:, 0].tolist():
        quality = int(torch.randint(10, 60, (1,), generator=generator))
        pixels = ((out[number] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as again:
            array = np.array(again)
        out[number] = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    return out


def make_fake_photos(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Write `raw_photos_train` with drawn faces, for tests without photographs."""
    generator = np.random.default_rng(seed)
    root = folder / "raw_photos_train"
    root.mkdir(parents=True, exist_ok=True)
    shape = np.array([[-0.5, -0.54], [0.5, -0.54], [0, 0.08], [-0.44, 0.5], [0.44, 0.5]])
    rows: list[list[object]] = []
    with tarfile.open(root / "photos.tar", "w") as tar:
        for number in range(count):
            width, height = (int(v) for v in generator.integers(150, 220, 2))
            points = shape * generator.uniform(25, 45) + np.array([width, height]) / 2
            y, x = np.mgrid[:height, :width] + 0.5
            picture = np.full((height, width, 3), generator.integers(0, 256, 3), np.float64)
            for px, py in points:
                near = np.exp(-((x - px) ** 2 + (y - py) ** 2) / 40)[..., None]
                picture = picture * (1 - near) + 20 * near
            buffer = io.BytesIO()
            Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG")
            name = f"{number:06d}.jpg"
            info = tarfile.TarInfo(name)
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
            rows.append([name, *np.round(points.flatten(), 1)])
    corners = ("right_eye", "left_eye", "nose", "mouth_right", "mouth_left")
    with (root / "landmarks.csv").open("w", newline="") as file:
        header = ["image", *(f"{corner}_{axis}" for corner in corners for axis in "xy")]
        csv.writer(file).writerows([header, *rows])
    return folder
