"""Face sets in tiny copies of their official layouts: names, splits, cuts, degrees."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.datasets import FaceSet, cut_ffhq, open_faces
from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.images import to_float
from training.data import make_fake_data
from transmitter.faces import FaceFinder, align

POINTS = "69 109 106 113 77 142 73 152 108 154"


def _picture(path: Path, width: int, height: int, seed: int = 0) -> Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    draws = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (5, 4, 3), generator=draws, dtype=torch.uint8)
    picture = Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    if path.suffix == ".jpg":
        picture.save(path, quality=100, subsampling=0)
    else:
        picture.save(path)
    with Image.open(path) as stored:
        data = bytearray(stored.convert("RGB").tobytes())
    return torch.frombuffer(data, dtype=torch.uint8).reshape(height, width, 3).permute(2, 0, 1)


def _only(faces: FaceSet) -> Tensor:
    (subject,) = faces.subjects(32)
    assert subject.face.shape == (1, 3, 32, 32)
    assert subject.face.dtype == torch.float32
    return subject.face


def test_celeba_is_cut_by_its_own_points_and_split(tmp_path: Path) -> None:
    for name, seed in (("000001.jpg", 1), ("182638.jpg", 2)):
        pixels = _picture(tmp_path / "Img" / "img_align_celeba" / name, 178, 218, seed)
    (tmp_path / "Anno").mkdir()
    (tmp_path / "Anno" / "list_landmarks_align_celeba.txt").write_text(
        "2\nlefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y "
        f"rightmouth_x rightmouth_y\n000001.jpg  {POINTS}\n182638.jpg  {POINTS}\n"
    )
    assert len(open_faces(f"celeba:{tmp_path}", tmp_path)) == 2
    (tmp_path / "Eval").mkdir()
    (tmp_path / "Eval" / "list_eval_partition.txt").write_text("000001.jpg 0\n182638.jpg 2\n")
    faces = open_faces(f"celeba:{tmp_path}", tmp_path)
    assert faces.names == ("182638.jpg",)
    points = torch.tensor([float(v) for v in POINTS.split()]).reshape(5, 2)
    torch.testing.assert_close(_only(faces), align(pixels, points, 32))


def test_celeba_hq_takes_the_test_split_of_celeba(tmp_path: Path) -> None:
    for number in (0, 1):
        pixels = _picture(tmp_path / "CelebA-HQ-img" / f"{number}.jpg", 64, 64, number)
    (tmp_path / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx orig_idx orig_file\n0 119613 119614.jpg\n1 190000 190001.jpg\n"
    )
    faces = open_faces(f"celeba-hq:{tmp_path}", tmp_path)
    assert faces.names == ("1.jpg",)
    torch.testing.assert_close(_only(faces), cut_ffhq(pixels, 32))


def test_metfaces_are_the_inner_part_of_the_ffhq_square(tmp_path: Path) -> None:
    pixels = _picture(tmp_path / "images" / "1001-00.png", 100, 100)
    face = _only(open_faces(f"metfaces:{tmp_path}", tmp_path))
    inner = to_float(pixels[:, 8:92, 8:92])  # 0.85 of 100 px, to whole pixels on either side
    assert float((face.mean((0, 2, 3)) - inner.mean((0, 2, 3))).abs().max()) < 0.01


@pytest.mark.parametrize("square", [True, False])
def test_celeba_dialog_brings_degrees(tmp_path: Path, square: bool) -> None:
    pixels = _picture(tmp_path / "image" / "182638.jpg", *((64, 64) if square else (178, 218)))
    _picture(tmp_path / "image" / "000001.jpg", 64, 64)
    (tmp_path / "test_attr_list.txt").write_text("182638.jpg 0 1 2 3 4\n")
    (tmp_path / "list_landmarks_align_celeba.txt").write_text(f"1\nheader\n182638.jpg {POINTS}\n")
    faces = open_faces(f"celeba-dialog:{tmp_path}", tmp_path)
    (subject,) = faces.subjects(32)
    assert subject.degrees == (0, 1, 2, 3, 4)
    points = torch.tensor([float(v) for v in POINTS.split()]).reshape(5, 2)
    expected = cut_ffhq(pixels, 32) if square else align(pixels, points, 32)
    torch.testing.assert_close(subject.face, expected)


def test_photos_have_points_in_a_table(tmp_path: Path) -> None:
    pixels = _picture(tmp_path / "raw_photos" / "1.jpg", 200, 200)
    with (tmp_path / "raw_photos" / "landmarks.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", *"abcdefghij"], ["1.jpg", *POINTS.split()]])
    points = torch.tensor([float(v) for v in POINTS.split()]).reshape(5, 2)
    face = _only(open_faces("photos", tmp_path))
    torch.testing.assert_close(face, align(pixels, points, 32))


def test_a_folder_is_searched_for_faces(tmp_path: Path, random_bundle: Path) -> None:
    """Random nets believe in no face, or in some: pictures without one are passed over."""
    _picture(tmp_path / "anyone.png", 90, 120)
    (tmp_path / "notes.txt").write_text("no picture")
    finder = FaceFinder.from_bundle(Bundle.open(random_bundle))
    faces = open_faces(f"folder:{tmp_path}", tmp_path, finder)
    assert faces.names == ("anyone.png",)
    assert len(list(faces.subjects(32))) <= 1
    with pytest.raises(InvalidRequest, match="no face finder"):
        list(open_faces(f"folder:{tmp_path}", tmp_path).subjects(32))


def test_a_small_limit_is_a_subset_and_seeds_differ(tmp_path: Path) -> None:
    faces = open_faces("celeba128", make_fake_data(tmp_path, count=12, size=32))
    assert faces.order(0) == faces.order(0)
    assert sorted(faces.order(0)) == sorted(faces.order(1)) == sorted(faces.names)
    assert faces.order(0) != faces.order(1)
    names = [subject.name for subject in faces.subjects(32)]
    assert names == faces.order(0)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nobody", "'nobody'.*celeba128"),
        ("celeba", "'celeba'.*celeba:PATH"),
        ("metfaces:{tmp}", "images is no folder"),
        ("celeba:{tmp}", "has none of img_align_celeba"),
        ("folder:{tmp}", "no pictures"),
        ("celeba-hq:{tmp}/absent", "absent is no folder"),
        ("ood", "no faces at"),
    ],
)
def test_missing_files_are_named(where: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=message):
        open_faces(where.format(tmp=tmp_path), tmp_path)


def test_real_sets_open(data_folder: Path) -> None:
    assert len(open_faces("celeba128", data_folder)) == 1205
    assert len(open_faces("ood", data_folder)) == 317
    subject = next(open_faces("photos", data_folder).subjects(128))
    assert subject.face.shape == (1, 3, 128, 128)
