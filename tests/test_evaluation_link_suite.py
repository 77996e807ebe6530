"""The suite's judgement of sentences, its report and the model card."""

from pathlib import Path
from typing import Any

import pytest

from evaluation.card import model_card
from evaluation.link_suite import judged, run
from shared.attributes import Attribute, Edit
from shared.bundle import Bundle, write_scores
from shared.errors import InvalidRequest
from transmitter.text import Reading

MORE = {"attribute": "smiling", "mode": "change", "direction": "more", "size": 3, "target": None}
NONE = {"attribute": "beard", "mode": "target", "direction": "less", "size": None, "target": 0}
EITHER = {
    "attribute": "beard",
    "mode": "target",
    "direction": "less",
    "size": None,
    "target": 0,
    "modes_ok": ["target", "change"],
    "sizes_ok": [4, 5],
}


@pytest.mark.parametrize(
    ("edit", "row", "expected"),
    [
        (Edit(Attribute.SMILING, change=3), MORE, (True, True)),
        (Edit(Attribute.SMILING, change=2), MORE, (True, False)),
        (Edit(Attribute.SMILING, change=-3), MORE, (False, False)),
        (Edit(Attribute.AGE, change=3), MORE, (False, False)),
        (Edit(Attribute.SMILING, target=5), MORE, (True, False)),
        (Edit(Attribute.SMILING, target=3), MORE, (False, False)),
        (Edit(Attribute.BEARD, target=0), NONE, (True, True)),
        (Edit(Attribute.BEARD, target=1), NONE, (True, False)),
        (Edit(Attribute.BEARD, change=-5), NONE, (True, False)),
        (Edit(Attribute.BEARD, change=5), NONE, (False, False)),
        (Edit(Attribute.BEARD, change=-5), EITHER, (True, True)),
        (Edit(Attribute.BEARD, change=-2), EITHER, (True, False)),
        (Edit(Attribute.BEARD, change=5), EITHER, (False, False)),
    ],
)
def test_a_reading_is_judged_by_its_label(
    edit: Edit, row: dict[str, Any], expected: tuple[bool, bool]
) -> None:
    assert judged(Reading(edit, 0.9), row) == expected


def test_no_photographs_names_the_folder(random_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="raw_photos"):
        run(Bundle.open(random_bundle), tmp_path)


def test_the_card_says_what_was_not_measured(random_bundle: Path) -> None:
    bundle = Bundle.open(random_bundle)
    index = {**bundle.index, "scores": {}}
    provenance = {"recipe": "random", "data": "nothing"}
    index["nets"] = {
        net: {**entry, "provenance": provenance} for net, entry in bundle.index["nets"].items()
    }
    text = model_card(Bundle(bundle.folder, index))
    assert "Not measured yet" in text
    assert all(net in text for net in bundle.nets)


@pytest.mark.slow
def test_the_shipped_bundle_is_measured_on_four_photographs(
    bundle_folder: Path, data_folder: Path
) -> None:
    report = run(Bundle.open(bundle_folder), data_folder, limit=4, edited=1)
    assert report.photos == 4
    assert report.psnr_db is not None
    assert 0 < report.psnr_db.mean < 40
    assert all(0 <= value.mean <= 1 for value in report.edits_moved.values())


def test_scores_are_kept_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"format": 1, "name": "x", "nets": {}}')
    write_scores(tmp_path, {"link": 1})
    write_scores(tmp_path, {"bench": 2})
    assert Bundle.open(tmp_path).scores == {"link": 1, "bench": 2}
