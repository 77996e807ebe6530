"""Written sentences: their labels, the slice that is held out, and how they are varied."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from shared.attributes import ATTRIBUTES, Attribute, Edit
from training.misspelling import misspell
from training.sentences import labelled
from training.written import (
    draw_written,
    held_out,
    of_another,
    of_no_person,
    parse_label,
    read_written,
    split_written,
    vary,
    with_a_cure,
    written_words,
)


@pytest.mark.parametrize(
    ("label", "edit"),
    [
        ("be+3", Edit(Attribute.BEARD, change=3)),
        ("ey-1", Edit(Attribute.EYEGLASSES, change=-1)),
        ("sm=0", Edit(Attribute.SMILING, target=0)),
        ("out", None),
        ("sev", None),
    ],
)
def test_labels_are_read(label: str, edit: Edit | None) -> None:
    sentence = parse_label(label, "a sentence")
    assert sentence.edit == edit
    assert (sentence.scope == 2) == (label == "sev")


@pytest.mark.parametrize("label", ["be", "be+6", "be+0", "be=6", "xx+1", "be 3", "OUT", ""])
def test_other_labels_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match="label is"):
        parse_label(label, "a sentence")


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.tsv"
    bad.write_text("be+3\tlonger beard\nout hello\n")
    with pytest.raises(ValueError, match=r"line 2: .*out hello"):
        read_written(bad)
    bad.write_text("out\t?!\nout\t😀\n")
    with pytest.raises(ValueError, match="line 2: expected words"):
        read_written(bad)


def test_the_corpus_has_every_label_and_no_sentence_twice() -> None:
    found = read_written()
    assert max(Counter(s.text for s in found).values()) == 1
    changes = {(s.attribute, s.direction, s.size) for s in found if s.mode == 0}
    targets = {(s.attribute, s.target) for s in found if s.mode == 1}
    assert len(changes) == 5 * 2 * 5
    assert len(targets) == 5 * 6
    assert {s.scope for s in found} == {0, 1, 2}


def test_a_tenth_is_held_out_and_never_drawn() -> None:
    kept, unseen = split_written()
    assert len(kept) + len(unseen) == len(read_written())
    assert 0.08 < len(unseen) / len(read_written()) < 0.12
    assert not {s.text for s in kept} & {s.text for s in unseen}
    assert held_out("No GLASSES!") == held_out("no glasses.")


def test_typing_errors_are_rarely_words() -> None:
    words = written_words()
    assert "beard" in words
    assert list(words) == sorted(set(words))


def test_drawing_repeats_with_the_seed() -> None:
    first = [draw_written(rng) for rng in [Random(4)] for _ in range(300)]
    assert first == [draw_written(rng) for rng in [Random(4)] for _ in range(300)]
    assert {s.scope for s in first} == {0, 1, 2}


def variants(text: str, edit: Edit | None) -> dict[str, Edit | None]:
    rng = Random(7)
    drawn = [vary(labelled(text, edit), rng) for _ in range(800)]
    return {s.text: s.edit for s in drawn}


def test_variants_ask_for_the_same() -> None:
    plain = Edit(Attribute.EYEGLASSES, target=0)
    found = variants("Take off her glasses, she has her lenses in.", plain)
    assert set(found.values()) == {plain}
    assert "take off his specs, he has his lenses in." in found
    assert len(found) > 300


def test_a_size_is_changed_with_its_label() -> None:
    found = variants("a bit longer fringe please", Edit(Attribute.BANGS, change=1))
    assert found["a bit longer fringe please"] == Edit(Attribute.BANGS, change=1)
    assert found["extremely longer fringe please"] == Edit(Attribute.BANGS, change=5)
    assert found["somewhat longer fringe please"] == Edit(Attribute.BANGS, change=2)
    mixed = variants("just a bit longer fringe please", Edit(Attribute.BANGS, change=1))
    assert {edit.change for edit in mixed.values() if edit is not None} == {1}


def test_a_plain_change_is_asked_for_in_other_sizes_too() -> None:
    found = variants("Make his beard longer", Edit(Attribute.BEARD, change=3))
    assert found["make his beard longer"] == Edit(Attribute.BEARD, change=3)
    assert found["make his beard a bit longer"] == Edit(Attribute.BEARD, change=1)
    assert found["make his beard far longer"] == Edit(Attribute.BEARD, change=4)
    found = variants("Trim the fringe.", Edit(Attribute.BANGS, change=-3))
    assert {edit.change for edit in found.values() if edit is not None} == {-1, -2, -3, -4, -5}
    for word, change in (("considerably", -4), ("massively", -5)):
        loud = {edit for text, edit in found.items() if word in text}
        assert loud == {Edit(Attribute.BANGS, change=change)}


@pytest.mark.parametrize(
    "text",
    [
        "my older brother should smile wide",  # said of somebody
        "longer bangs, shorter than hers",  # a comparison
        "let the beard grow an inch longer",  # an amount
        "not a longer beard",
    ],
)
def test_no_size_is_put_where_it_does_not_fit(text: str) -> None:
    plain = Edit(Attribute.BEARD, change=3)
    assert set(variants(text, plain).values()) == {plain}


def test_sizes_are_written_carelessly() -> None:
    rng = Random(5)
    found = [misspell("trim the beard a lot", rng, 1.0) for _ in range(400)]
    assert any(text.endswith(" alot") for text in found)
    assert any(text.endswith(" a lot") for text in found)
    found = [misspell("way too long", rng, 1.0) for _ in range(400)]
    assert any(text.startswith("way to ") for text in found)


def test_refusals_stay_refusals() -> None:
    assert set(variants("give her a slightly bigger hat", None).values()) == {None}


def test_codes_are_the_attributes_first_letters() -> None:
    assert [parse_label(f"{a[:2]}+1", "x").attribute for a in ATTRIBUTES] == list(range(5))


def others(text: str, edit: Edit) -> dict[str, Edit | None]:
    rng = Random(9)
    drawn = [of_another(labelled(text, edit), rng) for _ in range(200)]
    return {s.text: s.edit for s in drawn}


def test_the_same_request_about_another_thing_is_refused() -> None:
    plain = Edit(Attribute.SMILING, change=-3)
    found = others("Her smile is too wide.", plain)
    assert set(found.values()) == {None}
    assert "her nose is too wide." in found
    # Where more than the noun tells what it is about, the request is left alone.
    assert others("Her smile shows too many teeth.", plain) == {
        "Her smile shows too many teeth.": plain
    }


def test_requests_about_bangs_and_beards_change_places() -> None:
    found = others("trim the beard a bit", Edit(Attribute.BEARD, change=-1))
    assert found["trim the fringe a bit"] == Edit(Attribute.BANGS, change=-1)
    assert found["trim the hat a bit"] is None


def test_animals_and_things_are_not_edited() -> None:
    rng = Random(2)
    asked = labelled("Put glasses on her.", Edit(Attribute.EYEGLASSES, change=3))
    found = {s.text: s.edit for s in (of_no_person(asked, rng) for _ in range(300))}
    assert set(found.values()) == {None}
    assert "put glasses on the snowman." in found
    named = labelled("Put glasses on my father.", Edit(Attribute.EYEGLASSES, change=3))
    assert of_no_person(named, rng) == named


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("change", [4, -1])
def test_a_complaint_with_its_cure_asks_for_what_the_complaint_does(
    attribute: Attribute, change: int
) -> None:
    edit = Edit(attribute, change=change)
    rng = Random(4)
    drawn = [with_a_cure(labelled("This is far too much.", edit), rng) for _ in range(60)]
    assert {s.edit for s in drawn} == {edit}
    assert all(s.text.startswith("This is far too much") for s in drawn)


def test_complaints_are_drawn_with_a_cure(tmp_path: Path) -> None:
    file = tmp_path / "few.tsv"
    file.write_text("ba+4\tthe fringe is far too short\nsm+3\tmore of a smile\n")
    assert len(split_written(file)[0]) == 2
    rng = Random(3)
    drawn = [draw_written(rng, file) for _ in range(400)]
    cured = [s for s in drawn if s.edit is not None and s.edit.attribute is Attribute.BANGS]
    assert max(len(s.text) for s in cured) > len("the fringe is far too short") + 20
