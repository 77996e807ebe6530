"""The face finder's recipe: its scenes, its targets, two steps, and a resumed run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.bundle import Bundle
from shared.errors import InvalidRequest
from training import faces
from training.faces import match, rate_at, targets, train
from training.run import RunOptions
from training.scenes import (
    CANVAS,
    Scenes,
    draw_crops,
    draw_scenes,
    empty_scenes,
    load_photos,
    make_fake_photos,
)
from transmitter.faces import Face, FaceFinder, box_of

SHAPE = torch.tensor([[-0.5, -0.54], [0.5, -0.54], [0.0, 0.08], [-0.44, 0.5], [0.44, 0.5]])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_photos(tmp_path_factory.mktemp("data"))


def options(data: Path, folder: Path, steps: int) -> RunOptions:
    return RunOptions(data, folder / "bundle", folder / "runs", steps=steps, device="cpu")


def test_photos_are_read_with_their_points(data: Path) -> None:
    photos = load_photos(data / "raw_photos_train")
    assert len(photos) == 12
    assert photos.images.shape == (12, 3, CANVAS, CANVAS)
    for number in range(len(photos)):
        photo = photos.photo(number)
        assert max(photo.shape[1:]) == CANVAS
        for x, y in photos.points[number].tolist():  # a dark dot at each point
            assert int(photo[:, int(y), int(x)].max()) < 90
    with pytest.raises(InvalidRequest, match=r"photos\.tar"):
        load_photos(data / "nothing")


def test_points_follow_the_scene(data: Path) -> None:
    photos = load_photos(data / "raw_photos_train")
    generator = torch.Generator().manual_seed(0)
    darker, seen = 0, 0
    for _ in range(4):
        scenes = draw_scenes(photos, torch.arange(12), 128, generator)
        for number, face in torch.nonzero(scenes.known).tolist():
            picture = scenes.pictures[number].mean(0)
            x, y = scenes.points[number, face, 0].int().tolist()  # the image-left eye
            if 4 <= x < 124 and 4 <= y < 124:
                seen += 1
                around = picture[y - 4 : y + 5, x - 4 : x + 5]
                darker += int(picture[y - 1 : y + 2, x - 1 : x + 2].mean() < around.mean())
    assert seen > 20
    assert darker > 0.75 * seen


def test_points_follow_the_crop(data: Path) -> None:
    photos = load_photos(data / "raw_photos_train")
    generator = torch.Generator().manual_seed(0)
    pictures, points = draw_crops(photos, torch.arange(12), 96, 0.85, generator)
    assert pictures.shape == (12, 3, 96, 96)
    darker = 0
    for number in range(12):
        picture = pictures[number].mean(0)
        x, y = points[number, 4].int().tolist()  # the image-right mouth corner
        around = picture[y - 6 : y + 7, x - 6 : x + 7]
        darker += int(picture[y - 1 : y + 2, x - 1 : x + 2].mean() < around.mean())
    assert darker >= 9
    # Cut only slightly wrong: the eyes are near where an upright face has them.
    assert float((points[:, 0] - torch.tensor([34.0, 45.0])).norm(dim=1).mean()) < 15


def test_scenes_hold_several_none_and_repeat(data: Path) -> None:
    photos = load_photos(data / "raw_photos_train")
    drawn = [
        draw_scenes(photos, torch.arange(16) % 12, 96, torch.Generator().manual_seed(5))
        for _ in range(2)
    ]
    assert torch.equal(drawn[0].pictures, drawn[1].pictures)
    scenes = drawn[0]
    assert scenes.pictures.shape == (16, 3, 96, 96)
    assert float(scenes.pictures.abs().max()) <= 1
    assert int(scenes.known.sum(1).max()) >= 2
    assert not bool((scenes.known & scenes.unclear).any())
    assert empty_scenes(photos, 5, 64).shape == (5, 3, 64, 64)


def test_targets() -> None:
    points = torch.stack([SHAPE * 40 + 60, SHAPE * 20 + 110])[None]  # [1, 2, 5, 2]
    known, unclear = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    scenes = Scenes(torch.zeros(1, 3, 128, 128), points, known, unclear)
    heat, sure, owner = targets(scenes, 128)
    assert heat.shape == (1, 16, 16)
    assert torch.nonzero(heat == 1).tolist() == [[0, 7, 7]]  # (60, 60) lies in cell 7, 7
    assert int(owner[0, 7, 7]) == 0
    assert bool(sure[0, 7, 7])
    assert not bool(sure[0, 13, 13])  # near the face that is cut off: no opinion
    assert bool(sure[0, 0, 0])


def test_rate_warms_up_and_comes_to_rest_twice() -> None:
    end = faces.FINDER_STEPS
    assert rate_at(0) < 0.05 * faces.RATE
    assert rate_at(end // 5) > 0.85 * faces.RATE
    assert rate_at(end - 1) == pytest.approx(0.0)
    assert rate_at(end + faces.POINTS_STEPS // 10) > 0.9 * faces.RATE
    assert rate_at(end + faces.POINTS_STEPS) == pytest.approx(0.0)


def test_match() -> None:
    points = SHAPE * 40 + 100
    face = Face(points + torch.tensor([2.0, 0.0]), box_of(points), 0.9)
    assert match(face, points) == pytest.approx(0.05)
    assert match(None, points) is None
    assert match(replace(face, points=points + 60), points) is None


def test_two_steps_write_a_finder(data: Path, tmp_path: Path) -> None:
    train(options(data, tmp_path, 2))
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.provenance("faces")["steps"] == 2
    finder = FaceFinder.from_bundle(bundle)
    assert finder(torch.zeros(3, 64, 64, dtype=torch.uint8)) == []
    assert list((tmp_path / "runs" / "faces").glob("sheet-*.png"))
    log = (tmp_path / "runs" / "faces" / "log.jsonl").read_text().splitlines()
    assert '"found"' in log[-1]


def test_a_resumed_run_is_the_same_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faces, "BATCH", 8)
    monkeypatch.setattr(faces, "FINDER_STEPS", 2)  # the second net learns from then on
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(options(data, whole, 4))
    train(options(data, parts, 1))
    train(options(data, parts, 3))
    expected = Bundle.open(whole / "bundle").tensors("faces")
    got = Bundle.open(parts / "bundle").tensors("faces")
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key
