"""Alignment against its closed form; the shipped finder on photographs and on what are none."""

import csv
import io
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from shared.bundle import Bundle, write_net
from shared.errors import BundleError
from shared.images import decode_photo, to_float, to_uint8
from transmitter.faces import (
    Face,
    FaceFinder,
    FaceNet,
    FaceNetConfig,
    FaceNets,
    FinderConfig,
    PointNet,
    align,
    box_of,
    bundle_config,
    face_frame,
    face_size,
    overlap,
    paste_back,
    peaks,
)

DATA = Path(os.environ.get("EDSC_DATA", Path(__file__).parents[2] / "shared" / "data"))
PHOTOS = DATA / "raw_photos"
# Five points whose square is 0..128 in both directions: see test_identity.
UPRIGHT = torch.tensor([[45.0, 60.0], [83.0, 60.0], [64.0, 82.0], [48.0, 99.0], [80.0, 99.0]])


def noise_photo(width: int, height: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def smooth_photo(width: int, height: int, seed: int = 0) -> Tensor:
    small = noise_photo(width // 16, height // 16, seed).float()
    large = F.interpolate(small[None], (height, width), mode="bicubic", antialias=False)
    return large[0].clamp(0, 255).to(torch.uint8)


def turned(points: Tensor, angle: float, scale: float, shift: tuple[float, float]) -> Tensor:
    """Turn by `angle` (radians, clockwise on the screen), scale, then shift."""
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    matrix = torch.tensor([[cos, sin], [-sin, cos]])
    return points @ matrix + torch.tensor(shift)


def points_of_square(centre: float, half: float) -> Tensor:
    """An upright face whose aligned square is centre +- half."""
    length = half / 0.85  # max(2 |e2e|, 1.8 |e2m|), here the first
    eyes, mouth = length / 2, length / 4
    top = centre - 0.1 * mouth
    xs = [centre - eyes / 2, centre + eyes / 2, centre, centre - eyes / 3, centre + eyes / 3]
    ys = [top, top, top + mouth / 2, top + mouth, top + mouth]
    return torch.tensor(list(zip(xs, ys, strict=True)))


def test_frame_by_hand() -> None:
    # |e2e| = 38, e2m = (0, 39): x = unit((38 + 39, 0)) * max(76, 70.2) * 0.85 = (64.6, 0).
    centre, x, y = face_frame(UPRIGHT)
    assert centre.tolist() == pytest.approx([64.0, 63.9])
    assert x.tolist() == pytest.approx([64.6, 0.0])
    assert y.tolist() == pytest.approx([0.0, 64.6])


def test_long_face_counts_eye_to_mouth() -> None:
    narrow = UPRIGHT * torch.tensor([0.5, 1.0])
    assert float(face_size(narrow)) == pytest.approx(1.8 * 39)


def test_identity() -> None:
    photo = noise_photo(128, 128)
    crop = align(photo, points_of_square(64.0, 64.0))
    # Each output pixel averages 2 x 2 bilinear samples a quarter of a pixel off the middle, that
    # is the kernel (1/8, 3/4, 1/8) along both axes.
    kernel = torch.tensor([0.125, 0.75, 0.125])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    mirrored = F.pad(to_float(photo), (1, 1, 1, 1), "replicate")
    expected = F.conv2d(mirrored, kernel, groups=3)
    assert crop.shape == (1, 3, 128, 128)
    assert float((crop - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("factor", [2, 3, 5, 8])
def test_whole_reduction_is_an_area_average(factor: int) -> None:
    side = 64 * factor
    photo = smooth_photo(side, side) if factor > 2 else noise_photo(side, side)
    crop = align(photo, points_of_square(side / 2, side / 2), size=64)
    expected = F.avg_pool2d(to_float(photo), factor)
    assert float((crop - expected).abs().mean()) < (0.08 if factor == 2 else 0.02)
    assert float((crop - expected).mean().abs()) < 1e-3


def test_borders_are_mirrored() -> None:
    photo = noise_photo(100, 100)
    inside = align(photo, points_of_square(0.0, 32.0), size=64)  # centred on the corner
    assert torch.allclose(inside, inside.flip(2), atol=1e-5)
    assert torch.allclose(inside, inside.flip(3), atol=1e-5)
    outside = align(photo, points_of_square(100.0, 32.0), size=64)
    assert torch.allclose(outside, outside.flip(3), atol=1e-5)


def test_mirroring_does_not_depend_on_what_is_cut_out_first() -> None:
    # A square far larger than the photo folds several times; compare with a photo tiled by hand.
    photo = noise_photo(40, 40)
    tile = torch.cat([photo, photo.flip(2)], 2)
    tile = torch.cat([tile, tile.flip(1)], 1).repeat(1, 3, 3)  # period 80, 240 px
    small = align(photo, points_of_square(20.0, 70.0), size=140)
    large = align(tile, points_of_square(100.0, 70.0), size=140)
    assert torch.allclose(small, large, atol=1e-4)


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_turning_photo_and_points_changes_nothing(quarter: int) -> None:
    photo = noise_photo(150, 150)
    points = turned(UPRIGHT, 0.2, 0.8, (20.0, 5.0))
    spun = torch.rot90(photo, -quarter, (1, 2))  # clockwise
    middle = torch.tensor([75.0, 75.0])
    moved = turned(points - middle, quarter * math.pi / 2, 1.0, (75.0, 75.0))
    assert torch.allclose(align(spun, moved), align(photo, points), atol=1e-3)


@pytest.mark.parametrize("angle", [-0.6, 0.3, 1.0])
def test_points_land_where_an_upright_face_has_them(angle: float) -> None:
    # A dot on each of five points of a turned, enlarged face must land on its aligned place.
    points = turned(UPRIGHT, angle, 2.5, (250.0, 200.0))
    y, x = torch.meshgrid(torch.arange(700) + 0.5, torch.arange(700) + 0.5, indexing="ij")
    frame = align_points(UPRIGHT)
    for number in range(5):
        far = (x - points[number, 0]).square() + (y - points[number, 1]).square()
        photo = (255 * torch.exp(-far / 200)).to(torch.uint8).expand(3, -1, -1)
        crop = (align(photo, points)[0, 0] + 1) / 2  # [128, 128]
        line = torch.arange(128) + 0.5
        found = torch.stack([(crop.sum(0) * line).sum(), (crop.sum(1) * line).sum()]) / crop.sum()
        assert float((found - frame[number]).norm()) < 0.1


def align_points(points: Tensor) -> Tensor:
    """Points of the photo -> px of the aligned 128 px crop."""
    centre, x, y = face_frame(points)
    axes = torch.stack([x, y], 1)
    square: Tensor = torch.linalg.solve(axes, (points.double() - centre).T).T  # [5, 2], -1..1
    return (square * 64 + 64).float()


def test_bad_points_are_refused() -> None:
    photo = noise_photo(20, 20)
    with pytest.raises(ValueError, match="no direction"):
        align(photo, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="finite"):
        align(photo, torch.full((5, 2), torch.nan))
    with pytest.raises(ValueError, match="uint8"):
        align(photo.float(), UPRIGHT)


def test_large_face_is_cut_quickly() -> None:
    photo = noise_photo(2048, 2048)
    points = turned(points_of_square(0.0, 900.0), 0.3, 1.0, (1024.0, 1024.0))
    started = time.perf_counter()
    align(photo, points)
    assert time.perf_counter() - started < 1.5


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_paste_back_of_the_unedited_crop_changes_little(scale: float) -> None:
    photo = smooth_photo(600, 500)
    points = turned(UPRIGHT, 0.35, scale, (150.0, 60.0))
    pasted = paste_back(photo, align(photo, points), points)
    difference = (pasted.float() - photo.float()).abs()
    assert float(difference.mean()) < 1.0
    assert float(difference.max()) < 20


def test_paste_back_shows_the_edit_and_leaves_the_rest() -> None:
    photo = torch.full((3, 300, 300), 100, dtype=torch.uint8)
    points = UPRIGHT + 80.0  # the square 144 +- 64.6
    pasted = paste_back(photo, torch.ones(1, 3, 128, 128), points)
    assert bool((photo == 100).all())
    assert bool((pasted[:, 110:180, 110:180] == 255).all())
    outside = torch.ones(300, 300, dtype=torch.bool)
    outside[79:209, 79:209] = False
    assert bool((pasted[:, outside] == 100).all())
    steps = pasted[0, 144].int().diff().abs()
    assert int(steps.max()) < 40  # it fades in: no edge


def test_paste_back_across_the_border_and_beside_the_photo() -> None:
    photo = noise_photo(90, 70)
    assert paste_back(photo, torch.zeros(1, 3, 128, 128), UPRIGHT - 40.0).shape == photo.shape
    far = paste_back(photo, torch.zeros(1, 3, 128, 128), UPRIGHT + 1000.0)
    assert torch.equal(far, photo)


def test_boxes() -> None:
    box = box_of(UPRIGHT)
    assert box[2] - box[0] == pytest.approx(1.1 * 76, rel=1e-5)
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0


def test_peaks_keep_the_best_of_what_overlaps() -> None:
    scores = torch.zeros(16, 16)
    scores[4, 4], scores[4, 6], scores[12, 12] = 0.9, 0.8, 0.7
    points = UPRIGHT.expand(16, 16, 5, 2).clone() * 0.5
    points[12, 12] += 64
    found = peaks(scores, points, 0.5, 10)
    assert [score for score, _ in found] == pytest.approx([0.9, 0.7])
    assert len(peaks(scores, points, 0.75, 10)) == 1
    assert peaks(scores, points, 0.95, 10) == []


def test_net_refuses_sizes_it_cannot_halve() -> None:
    net = FaceNet(FaceNetConfig()).eval()
    with pytest.raises(ValueError, match="100 x 96"):
        net(torch.zeros(1, 3, 96, 100))
    logits, points = net(torch.zeros(2, 3, 64, 96))
    assert logits.shape == (2, 8, 12)
    assert points.shape == (2, 8, 12, 5, 2)
    both = sum(p.numel() for p in FaceNets(FaceNetConfig()).parameters())
    assert both <= 750_000


def test_point_net_gives_points_inside_the_crop() -> None:
    net = PointNet().eval()
    points = net(torch.zeros(2, 3, 96, 96))
    assert points.shape == (2, 5, 2)
    assert bool(((points > 0) & (points < 96)).all())
    with pytest.raises(ValueError, match="96, 90"):
        net(torch.zeros(1, 3, 96, 90))


def test_face_finder_comes_back_from_a_bundle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = FaceNets(FaceNetConfig(widths=(4, 4, 8, 8, 8), blocks=(1, 1, 1)))
    config = bundle_config(nets.config, FinderConfig(0.61, (160, 320), 5))
    write_net(tmp_path, "faces", config=config, tensors=nets.state_dict(), provenance={})
    finder = FaceFinder.from_bundle(Bundle.open(tmp_path))
    assert finder.config == FinderConfig(0.61, (160, 320), 5)
    assert finder.nets.config == nets.config
    assert finder(noise_photo(1, 1)) == []
    with pytest.raises(BundleError):
        FaceFinder.from_bundle(Bundle.open(_without_faces(tmp_path)))


def _without_faces(folder: Path) -> Path:
    bare = folder / "bare"
    write_net(bare, "other", config={}, tensors={"x": torch.zeros(1)}, provenance={})
    return bare


# What follows needs the trained net of the repository; the photographs are not in it.


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    bundle = Bundle.open(None, verify=False)
    if not bundle.has("faces"):
        pytest.skip(f"the bundle {bundle.folder} has no face finder")
    return FaceFinder.from_bundle(bundle)


def photos() -> dict[str, Tensor]:
    """Names and five points of the photographs, or a skip that says what is missing."""
    table = PHOTOS / "landmarks.csv"
    if not table.is_file():
        pytest.skip(f"no photographs at {PHOTOS} (EDSC_DATA)")
    with table.open(newline="") as file:
        return {
            row.pop("image"): torch.tensor([float(v) for v in row.values()]).reshape(5, 2)
            for row in csv.DictReader(file)
        }


def load(name: str) -> Tensor:
    return decode_photo((PHOTOS / name).read_bytes())


def error(face: Face, points: Tensor) -> float:
    eyes = float((points[1] - points[0]).norm())
    return float((face.points - points).norm(dim=1).mean()) / eyes


def test_photographs(finder: FaceFinder) -> None:
    known = photos()
    errors = []
    for name, points in known.items():
        faces = finder(load(name))
        if faces and error(faces[0], points) < 0.25:
            errors.append(error(faces[0], points))
    assert len(errors) >= 0.98 * len(known)
    assert sum(errors) / len(errors) < 0.06  # of the eye distance


def test_exif_orientation_is_honoured(finder: FaceFinder) -> None:
    name, points = next(iter(photos().items()))
    with Image.open(PHOTOS / name) as image:
        lying = image.transpose(Image.Transpose.ROTATE_90)  # a camera held upright stores this
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        lying.save(buffer, "JPEG", quality=95, exif=exif)
    photo = decode_photo(buffer.getvalue())
    assert photo.shape == load(name).shape
    assert error(finder(photo)[0], points) < 0.1


def test_largest_first(finder: FaceFinder) -> None:
    names = list(photos())[:2]
    large, small = load(names[0]), load(names[1])
    reduced = F.interpolate(small[None].float(), scale_factor=0.6, mode="bilinear", antialias=True)
    montage = torch.full((3, 420, 480), 128, dtype=torch.uint8)
    montage[:, 20 : 20 + large.shape[1], 250 : 250 + large.shape[2]] = large
    part = reduced[0].round().clamp(0, 255).to(torch.uint8)
    montage[:, 200 : 200 + part.shape[1], 30 : 30 + part.shape[2]] = part
    faces = finder(montage)
    assert len(faces) == 2
    assert faces[0].size > faces[1].size
    assert error(faces[0], photos()[names[0]] + torch.tensor([250.0, 20.0])) < 0.1
    assert error(faces[1], photos()[names[1]] * 0.6 + torch.tensor([30.0, 200.0])) < 0.15


@pytest.mark.parametrize("share", [0.12, 0.25])
def test_small_face_in_a_large_photo(finder: FaceFinder, share: float) -> None:
    name, points = next(iter(photos().items()))
    photo = load(name)
    side = int(max(photo.shape[1:]) / share)
    canvas = (smooth_photo(side, side, seed=3).float() * 0.5 + 60).to(torch.uint8)
    left, top = side // 2, side // 5
    canvas[:, top : top + photo.shape[1], left : left + photo.shape[2]] = photo
    faces = finder(canvas)
    assert faces
    assert error(faces[0], points + torch.tensor([float(left), float(top)])) < 0.15


@pytest.mark.parametrize("scale", [0.7, 0.85])
def test_face_that_fills_the_picture(finder: FaceFinder, scale: float) -> None:
    name, points = next(iter(photos().items()))
    photo = to_uint8(align(load(name), points, 200, scale))
    assert len(finder(photo)) == 1


def test_turned_heads(finder: FaceFinder) -> None:
    name = next(iter(photos()))
    with Image.open(PHOTOS / name) as image:
        for angle in (-35, 35):
            spun = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            buffer = io.BytesIO()
            spun.save(buffer, "PNG")
            faces = finder(decode_photo(buffer.getvalue()))
            assert faces, angle
            eyes = faces[0].points[1] - faces[0].points[0]
            tilt = math.degrees(math.atan2(float(eyes[1]), float(eyes[0])))
            assert tilt == pytest.approx(-angle, abs=8)


@pytest.mark.slow
def test_speed_on_one_core(finder: FaceFinder) -> None:
    photo = load(next(iter(photos())))
    finder(photo)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        finder(photo)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1  # about 10 ms where nothing else runs


def pattern(kind: str, number: int) -> Tensor:
    """Pictures that hold no face."""
    chance = np.random.default_rng(number)
    side = (64, 200, 333)[number % 3]
    if kind == "noise":
        return noise_photo(side, side, number)
    if kind == "clouds":
        return smooth_photo(side, side + 40, number)
    image = Image.new("RGB", (side, side), tuple(int(v) for v in chance.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    ink = tuple(int(v) for v in chance.integers(0, 256, 3))
    step = int(chance.integers(3, 30))
    if kind == "checks":
        for x in range(0, side, step):
            for y in range(0, side, step):
                if (x // step + y // step) % 2:
                    draw.rectangle((x, y, x + step - 1, y + step - 1), fill=ink)
    elif kind == "stripes":
        for x in range(-side, side, step):
            draw.line(
                (x, 0, x + int(chance.integers(-side, side)), side), fill=ink, width=step // 3
            )
    elif kind == "discs":
        for _ in range(20):
            x, y, r = (int(v) for v in chance.integers(2, side, 3))
            draw.ellipse(
                (x - r // 4, y - r // 4, x + r // 4, y + r // 4), fill=ink, outline="black"
            )
    elif kind == "text":
        for y in range(0, side, 12):
            draw.text((2, y), "The quick brown fox 0123456789 jumps over it", fill=ink)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("kind", ["noise", "clouds", "flat", "checks", "stripes", "discs", "text"])
def test_no_face_where_there_is_none(finder: FaceFinder, kind: str) -> None:
    for number in range(12):
        assert finder(pattern(kind, number)) == [], f"{kind} {number}"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5), (2000, 3)])
def test_odd_sizes(finder: FaceFinder, size: tuple[int, int]) -> None:
    assert finder(noise_photo(*size)) == []
