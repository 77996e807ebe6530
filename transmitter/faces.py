"""Find faces, cut them out aligned, put them back.

::

    photo [3, H, W] -- FaceFinder --> [Face, ...]       largest first, five points each
    photo, points   -- align -------> [1, 3, 128, 128]  what the inversion encoder was trained on
    photo, edited   -- paste_back --> [3, H, W]         the edited crop in its old place

Coordinates are pixels of the upright photograph, continuous: pixel (i, j) covers
[j, j + 1] x [i, i + 1], so a picture W wide spans 0..W. The five points are, in this order, the
image-left eye, the image-right eye, the nose, the image-left and the image-right mouth corner.

Two small nets. `FaceNet` looks for the middles of faces on a grid of 8 px (after Zhou et al.,
"Objects as points", 2019): each cell says whether a face is centred there and about where its five
points are. A photograph is seen whole and small first; only where that shows nothing, closer and
from further off. Every find is then cut out upright and at one size: `FaceNet` looks again, which
turns down what merely resembled a face from afar, and `PointNet` says exactly where the points are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.bundle import Bundle
from shared.images import to_uint8

STRIDE = 8
_MULTIPLE = 32  # the net halves five times
LOOK_SIDE = 96  # px, the second look
LOOK_SCALE = 0.85  # of the FFHQ square, as in `align`
# Five points about their middle, in eye distances: where the net starts from.
_MEAN_FACE = ((-0.50, -0.54), (0.50, -0.54), (0.0, 0.08), (-0.44, 0.50), (0.44, 0.50))


@dataclass(frozen=True)
class FaceNetConfig:
    """widths: channels at strides 2, 4, 8, 16, 32. blocks: residual blocks at strides 8, 16, 32."""

    widths: tuple[int, int, int, int, int] = (16, 32, 48, 64, 80)
    blocks: tuple[int, int, int] = (2, 2, 1)


@dataclass(frozen=True)
class FinderConfig:
    """threshold: least score of a face, 0..1. sides: longer side of the photo, px, in each pass;
    later passes run only while nothing was found."""

    threshold: float = 0.5
    sides: tuple[int, ...] = (160, 96, 384, 768)
    max_faces: int = 32


@dataclass(frozen=True)
class Face:
    """points: float32 [5, 2] px, x then y. box: left, top, right, bottom, px, brow to chin.
    score: 0..1, the lesser of two looks."""

    points: Tensor
    box: tuple[float, float, float, float]
    score: float

    @property
    def size(self) -> float:
        """Width of the box, px: what "largest" means."""
        return self.box[2] - self.box[0]


def _conv(into: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + cast(Tensor, self.second(self.first(x))))


class FaceNet(nn.Module):
    """Picture -> a grid of face scores and points.

    ::

        3 -/2-> 16 -/2-> 32 -/2-> 48 -----------------+--> 3x3 --> score, log size, 5 points
                                   \\-/2-> 64 ----+-up/
                                            \\-/2-> 80 -up/
    """

    def __init__(self, config: FaceNetConfig) -> None:
        super().__init__()
        self.config = config
        two, four, eight, sixteen, thirty_two = config.widths
        self.stem = nn.Sequential(_conv(3, two, 2), _conv(two, four, 2))
        self.at8 = self._stage(four, eight, config.blocks[0])
        self.at16 = self._stage(eight, sixteen, config.blocks[1])
        self.at32 = self._stage(sixteen, thirty_two, config.blocks[2])
        self.up16 = nn.Conv2d(thirty_two, sixteen, 1)
        self.up8 = nn.Conv2d(sixteen, eight, 1)
        self.mix = _conv(eight, 64)
        self.out = nn.Conv2d(64, 12, 1)
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            # Faces are rare: starting at a score of 0.02 keeps the first steps calm.
            start = [-4.0, 1.0, *(v for point in _MEAN_FACE for v in point)]
            cast(Tensor, self.out.bias).copy_(torch.tensor(start))

    @staticmethod
    def _stage(into: int, out: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(_conv(into, out, 2), *(_Block(out) for _ in range(blocks)))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image: [B, 3, H, W] in [-1, 1], H and W multiples of 32.

        Returns score logits [B, H/8, W/8] and points [B, H/8, W/8, 5, 2] in px of `image`.
        """
        height, width = image.shape[2:]
        if height % _MULTIPLE or width % _MULTIPLE:
            raise ValueError(f"got a picture {width} x {height}, expected multiples of {_MULTIPLE}")
        at8 = self.at8(self.stem(image))
        at16 = self.at16(at8)
        at32 = self.at32(at16)
        at16 = at16 + F.interpolate(self.up16(at32), scale_factor=2.0, mode="bilinear")
        at8 = at8 + F.interpolate(self.up8(at16), scale_factor=2.0, mode="bilinear")
        out = self.out(self.mix(F.relu(at8)))  # [B, 12, H/8, W/8]
        size = STRIDE * out[:, 1].clamp(-2.0, 4.0).exp()  # [B, H/8, W/8] px
        shape = out[:, 2:].permute(0, 2, 3, 1).unflatten(3, (5, 2))  # [B, H/8, W/8, 5, 2]
        cells = grid_centres(height // STRIDE, width // STRIDE).to(out)  # [H/8, W/8, 2]
        return out[:, 0], cells[:, :, None] + size[..., None, None] * shape


class PointNet(nn.Module):
    """Upright crop of a face -> its five points, exactly.

    ::

        3 -/2-> 16 -/2-> 24 -----------------+--> 3x3 --> 5 maps --> their centres of mass
                          \\-/2-> 40 ---+-up-/
                                   \\-/2-> 64 -up-/

    Each point is the mean of a distribution over the grid (Sun et al., "Integral human pose
    regression", 2018), so a cell of 4 px is no limit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 16, 2), _conv(16, 24, 2), _Block(24))
        self.at8 = nn.Sequential(_conv(24, 40, 2), _Block(40))
        self.at16 = nn.Sequential(_conv(40, 64, 2), _Block(64), _Block(64))
        self.up8 = nn.Conv2d(64, 40, 1)
        self.mix8 = _conv(40, 40)
        self.up4 = nn.Conv2d(40, 24, 1)
        self.mix4 = _conv(24, 32)
        self.out = nn.Conv2d(32, 5, 1)

    def forward(self, crop: Tensor) -> Tensor:
        """crop: [B, 3, S, S] in [-1, 1], S a multiple of 16. Returns points [B, 5, 2], px of it."""
        if crop.shape[2] != crop.shape[3] or crop.shape[2] % 16:
            raise ValueError(f"got a crop {tuple(crop.shape[2:])}, expected S x S, 16 dividing S")
        at4 = self.stem(crop)
        at8 = self.at8(at4)
        at8 = at8 + F.interpolate(self.up8(self.at16(at8)), scale_factor=2.0, mode="bilinear")
        at8 = self.mix8(F.relu(at8))
        at4 = at4 + F.interpolate(self.up4(at8), scale_factor=2.0, mode="bilinear")
        maps = self.out(self.mix4(F.relu(at4))).flatten(2).softmax(2)  # [B, 5, (S/4)^2]
        cells = grid_centres(crop.shape[2] // 4, crop.shape[3] // 4) * (4 / STRIDE)
        return cast(Tensor, maps @ cells.flatten(0, 1).to(maps))  # [B, 5, 2]


class FaceNets(nn.Module):
    """Both nets: what the bundle keeps as `faces`."""

    def __init__(self, config: FaceNetConfig) -> None:
        super().__init__()
        self.config = config
        self.finder = FaceNet(config)
        self.points = PointNet()


def grid_centres(rows: int, columns: int) -> Tensor:
    """Middles of the grid's cells, px: [rows, columns, 2], x then y."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (torch.stack([x, y], dim=-1).float() + 0.5) * STRIDE


def face_size(points: Tensor) -> Tensor:
    """[..., 5, 2] -> [...]: half the side of the FFHQ crop, about twice the eye distance, px.

    The longer of eye distance and eye-mouth distance counts, so a turned head is not taken for a
    small one.
    """
    eyes = points[..., 1, :] - points[..., 0, :]
    mouth = points[..., 3:, :].mean(-2) - points[..., :2, :].mean(-2)
    return torch.maximum(2.0 * eyes.norm(dim=-1), 1.8 * mouth.norm(dim=-1))


def face_frame(points: Tensor, scale: float = 0.85) -> tuple[Tensor, Tensor, Tensor]:
    """The square of a face: centre [2] and half axes x, y [2] in px.

    The FFHQ alignment (Karras et al. 2019, `dataset_tool`) at `scale` of its size. Raises
    ValueError where the points are not finite or coincide.
    """
    if points.shape != (5, 2) or not bool(torch.isfinite(points).all()):
        raise ValueError(f"got points {points.tolist()}, expected 5 finite pairs x, y")
    p = points.double()
    eye, mouth = (p[0] + p[1]) / 2, (p[3] + p[4]) / 2
    eye_to_eye, eye_to_mouth = p[1] - p[0], mouth - eye
    x = eye_to_eye - _rot90(eye_to_mouth)
    length = float(x.norm())
    if length < 1e-6:
        raise ValueError(f"points {points.tolist()} have no direction: they span no face")
    x = x / length * float(face_size(p)) * scale
    return eye + 0.1 * eye_to_mouth, x, _rot90(x)


def _rot90(v: Tensor) -> Tensor:
    return torch.stack([-v[1], v[0]])


def align(photo: Tensor, points: Tensor, size: int = 128, scale: float = 0.85) -> Tensor:
    """Cut the square of a face out of a photograph, upright.

    photo: uint8 [3, H, W]; points: [5, 2] px. Each output pixel averages the area it covers;
    where the square leaves the photograph, the photograph is mirrored.

    Returns float32 [1, 3, size, size] in [-1, 1].
    """
    _check_photo(photo)
    centre, x, y = face_frame(points, scale)
    ratio = 2 * float(x.norm()) / size  # photo pixels per output pixel
    reduce = max(1, int(ratio / 2))  # the bulk of the averaging, on whole pixels
    samples = min(4, max(2, math.ceil(ratio / reduce)))  # the rest, along the turned axes
    u = (torch.arange(size * samples, dtype=torch.float64) + 0.5) / (size * samples) * 2 - 1
    where = centre + u[None, :, None] * x + u[:, None, None] * y  # [S, S, 2] px of the photo
    piece, origin = _piece(photo, where)
    if reduce > 1:
        piece = F.avg_pool2d(piece[None], reduce, ceil_mode=True, count_include_pad=False)[0]
    sampled = _sample(piece, (where - origin) / reduce, "reflection")
    return F.avg_pool2d(sampled, samples).div(127.5).sub(1.0)


def _piece(photo: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the photo that `where` touches (mirrored or not): large photos stay bytes."""
    flat = where.reshape(-1, 2)
    low, high = flat.amin(0), flat.amax(0)
    spans: list[tuple[int, int]] = []
    for axis, extent in ((0, photo.shape[2]), (1, photo.shape[1])):
        first, last = float(low[axis]), float(high[axis])
        # Mirrored coordinates fold back by as much as they leave.
        start = min(first, 2 * extent - last) if last > extent else first
        stop = max(last, -first) if first < 0 else last
        if start < -extent or stop > 2 * extent:  # folds more than once
            start, stop = 0.0, float(extent)
        begin = min(max(math.floor(start) - 2, 0), extent - 1)
        end = max(min(math.ceil(stop) + 2, extent), begin + 1)
        spans.append((begin, end))
    (left, right), (top, bottom) = spans
    origin = torch.tensor([left, top], dtype=where.dtype)
    return photo[:, top:bottom, left:right].float(), origin


def _sample(picture: Tensor, where: Tensor, border: str) -> Tensor:
    """Bilinear samples of [3, H, W] at [h, w, 2] px -> [1, 3, h, w]."""
    extent = torch.tensor([picture.shape[2], picture.shape[1]], dtype=where.dtype)
    grid = (where / extent * 2 - 1).to(picture.dtype)
    return F.grid_sample(picture[None], grid[None], "bilinear", border, align_corners=False)


def paste_back(photo: Tensor, edited: Tensor, points: Tensor, feather: float = 0.2) -> Tensor:
    """Put an edited crop back to where `align` took it from.

    photo: uint8 [3, H, W]; edited: [1, 3, S, S] in [-1, 1]; points: the same five as for `align`.
    The crop fades in over `feather` of its half side, so no edge shows.

    Returns uint8 [3, H, W], a new tensor.
    """
    _check_photo(photo)
    centre, x, y = face_frame(points)
    half = float(x.norm())
    corners = torch.stack([centre + a * x + b * y for a in (-1, 1) for b in (-1, 1)])
    left, top = (max(0, math.floor(float(v))) for v in corners.amin(0))
    right, bottom = (
        min(extent, math.ceil(float(v)))
        for v, extent in zip(corners.amax(0), (photo.shape[2], photo.shape[1]), strict=True)
    )
    if right <= left or bottom <= top:
        return photo.clone()
    crop = to_uint8(edited).float()  # [3, S, S]
    pixels = crop.shape[1]
    # A face smaller than the crop is an average of crop pixels: reduce first, as align does.
    shrink = max(1, min(pixels // 4, math.floor(pixels / (2 * half))))
    crop = F.avg_pool2d(crop[None], shrink, ceil_mode=True, count_include_pad=False)[0]
    column = torch.arange(left, right, dtype=torch.float64) + 0.5 - centre[0]
    row = torch.arange(top, bottom, dtype=torch.float64) + 0.5 - centre[1]
    # Coordinates in the square, -1..1: projections on its half axes.  # [h, w]
    u = (column[None] * x[0] + row[:, None] * x[1]) / half**2
    v = (column[None] * y[0] + row[:, None] * y[1]) / half**2
    extent = pixels / shrink
    where = torch.stack([(u + 1) / 2 * extent, (v + 1) / 2 * extent], dim=-1)
    inside = ((1 - torch.maximum(u.abs(), v.abs())) / feather).clamp(0, 1)
    weight = (inside * inside * (3 - 2 * inside)).float()  # smoothstep
    result = photo.clone()
    old = result[:, top:bottom, left:right].float()
    new = old + weight * (_sample(crop, where, "border")[0] - old)
    result[:, top:bottom, left:right] = new.round().clamp(0, 255).to(torch.uint8)
    return result


def _check_photo(photo: Tensor) -> None:
    if photo.dtype != torch.uint8 or photo.dim() != 3 or photo.shape[0] != 3:
        raise ValueError(
            f"got a photo {photo.dtype} {tuple(photo.shape)}, expected torch.uint8 (3, H, W)"
        )


class FaceFinder:
    """photo -> faces. Build it with `from_bundle`; about 10 ms a photograph on one core."""

    def __init__(self, nets: FaceNets, config: FinderConfig) -> None:
        self.nets = nets.eval()
        self.config = config

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> FaceFinder:
        """Raises BundleError where the bundle has no net `faces` or it does not fit."""
        stored = bundle.config("faces")
        net_config = FaceNetConfig(
            widths=tuple(stored["net"]["widths"]), blocks=tuple(stored["net"]["blocks"])
        )
        finder = stored["finder"]
        config = FinderConfig(finder["threshold"], tuple(finder["sides"]), finder["max_faces"])
        return cls(bundle.load_into("faces", FaceNets(net_config)), config)

    @torch.inference_mode()
    def __call__(self, photo: Tensor) -> list[Face]:
        """photo: uint8 [3, H, W], upright. Returns the faces, largest first; [] where none is.

        A face is found from about 3 % of the photograph's longer side upwards.
        """
        _check_photo(photo)
        longer = max(photo.shape[1:])
        previous = 0
        for side in self.config.sides:
            if side > self.config.sides[0]:
                side = min(side, longer)  # closer than its own pixels shows nothing new
                if side <= previous:
                    break
            previous = max(previous, side)
            faces = self._look_again(photo, self._pass(photo, side))
            if faces:
                return sorted(faces, key=lambda face: face.size, reverse=True)
        return []

    def _pass(self, photo: Tensor, side: int) -> list[tuple[float, Tensor]]:
        """All faces of one look at the photo, longer side reduced (or enlarged) to `side` px."""
        height, width = photo.shape[1:]
        factor = side / max(height, width)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        small = F.interpolate(
            photo[None], size, mode="bilinear", antialias=True, align_corners=False
        )
        image = small.float().div(127.5).sub(1.0)
        right, bottom = (-extent % _MULTIPLE for extent in (size[1], size[0]))
        logits, points = self.nets.finder(F.pad(image, (0, right, 0, bottom)))
        found = peaks(logits[0].sigmoid(), points[0], self.config.threshold, self.config.max_faces)
        scale = torch.tensor([width / size[1], height / size[0]])
        return [(score, five * scale) for score, five in found]

    def _look_again(self, photo: Tensor, found: Sequence[tuple[float, Tensor]]) -> list[Face]:
        """Look at each find upright and at one size; keep those that are still faces."""
        found = [(score, points) for score, points in found if float(face_size(points)) > 2.0]
        if not found:
            return []
        crops = self._cut(photo, [points for _, points in found])
        logits, _ = self.nets.finder(crops)  # [N, G, G]
        middle = LOOK_SIDE // STRIDE // 2
        again = logits[:, middle - 2 : middle + 2, middle - 2 : middle + 2].sigmoid().amax((1, 2))
        faces: list[tuple[float, Tensor]] = []
        for second, crop, (first, points) in zip(again.tolist(), crops, found, strict=True):
            if second >= self.config.threshold:
                exact = self.nets.points(crop[None])[0]  # [5, 2] px of the crop
                faces.append((min(first, second), _to_photo(exact, points)))
        return [Face(points, box_of(points), score) for score, points in suppress(faces)]

    @staticmethod
    def _cut(photo: Tensor, found: Sequence[Tensor]) -> Tensor:
        return torch.cat([align(photo, points, LOOK_SIDE, LOOK_SCALE) for points in found])


def _to_photo(inside: Tensor, points: Tensor) -> Tensor:
    """Points [5, 2] in px of the crop that `points` were cut out to -> px of the photo."""
    centre, x, y = face_frame(points, LOOK_SCALE)
    square = inside.double() / LOOK_SIDE * 2 - 1  # [5, 2] in -1..1
    return (centre + square[:, :1] * x + square[:, 1:] * y).float()


def peaks(
    scores: Tensor, points: Tensor, threshold: float, most: int
) -> list[tuple[float, Tensor]]:
    """Local maxima of a score grid [G, G'] with their points [G, G', 5, 2], best first."""
    highest = F.max_pool2d(scores[None, None], 3, 1, 1)[0, 0]
    rows, columns = torch.nonzero((scores >= threshold) & (scores == highest), as_tuple=True)
    order = scores[rows, columns].argsort(descending=True)[: 4 * most]
    found = [
        (float(scores[r, c]), points[r, c])
        for r, c in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    ]
    return suppress(found)[:most]


def suppress(found: Sequence[tuple[float, Tensor]]) -> list[tuple[float, Tensor]]:
    """Of finds whose boxes overlap (IoU above 0.3), keep the best."""
    kept: list[tuple[float, Tensor]] = []
    for score, points in sorted(found, key=lambda item: item[0], reverse=True):
        if all(overlap(box_of(points), box_of(other)) <= 0.3 for _, other in kept):
            kept.append((score, points))
    return kept


def box_of(points: Tensor) -> tuple[float, float, float, float]:
    """Brow to chin, about: a square of 1.1 face sizes around the middle of the points, px."""
    half = 0.55 * float(face_size(points))
    x, y = points.mean(0).tolist()
    return x - half, y - half, x + half, y + half


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def bundle_config(net: FaceNetConfig, finder: FinderConfig) -> dict[str, object]:
    """What `FaceFinder.from_bundle` reads back."""
    return {"net": asdict(net), "finder": asdict(finder)}
