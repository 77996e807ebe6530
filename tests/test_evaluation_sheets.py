"""Sheets: whom they show, how they are laid out, how small they are."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation import sheets
from evaluation.sheets import SHEETS, Sheet, Studio, draw, lay_out, write_small
from shared.attributes import Attribute
from shared.bundle import Bundle
from shared.errors import InvalidRequest


def test_six_sheets_are_named_after_what_they_show() -> None:
    assert [sheet.name for sheet in SHEETS] == [
        "eyeglasses-added",
        "eyeglasses-removed",
        "bangs-added",
        "bangs-removed",
        "beard-added",
        "beard-removed",
    ]


@pytest.fixture
def studio(random_bundle: Path) -> Studio:
    """Sampled faces whose scores are set by hand: seed 0 shows the least, seed 11 the most."""
    made = Studio(Bundle.open(random_bundle), 12.0, candidates=12)
    cuts = made.guide.cuts
    made.scores = torch.linspace(float(cuts.min()) - 8, float(cuts.max()) + 8, 12)
    made.scores = made.scores[:, None].expand(12, 5).contiguous()
    made.male = torch.tensor([-1.0, 1.0] * 6)
    return made


def test_faces_to_edit_are_on_the_other_side(studio: Studio) -> None:
    degrees = studio.guide.score_degrees(studio.scores)[:, 0]
    without = int((degrees == 0).sum())
    assert studio.choose(Sheet(Attribute.BANGS, 4), without).tolist() == list(range(without))
    shown = studio.choose(Sheet(Attribute.BANGS, 0), 2)
    assert bool((degrees[shown] >= 3).all())
    many = studio.choose(Sheet(Attribute.BANGS, 0), 11)  # filled up with the nearest
    assert many.tolist() == list(range(1, 12))
    men = studio.choose(Sheet(Attribute.BEARD, 4), 1)
    assert float(studio.male[men]) > 0


def test_every_face_is_above_its_edit() -> None:
    shades = torch.linspace(-1, 1, 10)
    pairs = [
        (torch.full((1, 3, 8, 8), float(a)), torch.full((1, 3, 8, 8), float(b)))
        for a, b in shades.reshape(5, 2)
    ]
    sheet = lay_out(pairs, columns=3)
    assert sheet.size == (24, 2 * 16 + 6)
    expected = ((shades + 1) * 127.5).round()
    for number in range(5):
        row, column = divmod(number, 3)
        for below in (0, 1):
            got = sheet.getpixel((8 * column + 4, 22 * row + 8 * below + 4))
            assert isinstance(got, tuple)
            assert abs(got[0] - float(expected[2 * number + below])) <= 1
    with pytest.raises(InvalidRequest, match="got 0 faces"):
        lay_out([])


def test_files_stay_small(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (150, 150, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.to(torch.uint8).numpy())
    path = tmp_path / "noise.webp"
    assert write_small(picture, path, largest=15_000) < 90
    assert path.stat().st_size <= 15_000
    with pytest.raises(InvalidRequest, match="expected at most 100"):
        write_small(picture, path, largest=100)


def test_sheets_of_a_bundle_are_drawn(
    random_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "SHOWN", 3)
    lines = list(draw(random_bundle, tmp_path / "docs", candidates=6))
    assert len(lines) == len(SHEETS)
    for sheet in SHEETS:
        with Image.open(tmp_path / "docs" / f"{sheet.name}.webp") as picture:
            assert picture.size == (3 * 32, 2 * 32)
