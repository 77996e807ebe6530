"""Attributes, degrees and edits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.attributes import ATTRIBUTES, DEGREE_NAMES, MAX_DEGREE, Attribute, Edit
from shared.errors import InvalidRequest

# The same examples in every run, however busy the machine is.
REPEATABLE = settings(derandomize=True, deadline=None)
CHANGES = st.integers(-5, 5).filter(bool)


def test_the_order_is_the_order_of_every_tensor() -> None:
    assert [str(a) for a in ATTRIBUTES] == ["bangs", "eyeglasses", "beard", "smiling", "age"]
    assert [a.index for a in ATTRIBUTES] == [0, 1, 2, 3, 4]


def test_every_degree_has_a_name_of_its_own() -> None:
    for attribute in ATTRIBUTES:
        assert len(set(DEGREE_NAMES[attribute])) == MAX_DEGREE + 1


@pytest.mark.parametrize("name", ["age", "young", " Young ", "AGE"])
def test_young_is_age(name: str) -> None:
    assert Attribute.parse(name) is Attribute.AGE


@pytest.mark.parametrize("name", ["", "hair", "old", "smile "])
def test_other_words_are_refused_with_what_is_expected(name: str) -> None:
    with pytest.raises(InvalidRequest, match="expected one of bangs, eyeglasses, beard"):
        Attribute.parse(name)


@REPEATABLE
@given(degree=st.integers(0, 5), change=CHANGES)
def test_a_change_is_clamped(degree: int, change: int) -> None:
    edit = Edit(Attribute.BEARD, change=change)
    assert edit.expected(degree) == min(5, max(0, degree + change))  # Eq. (10)
    assert (edit.mode, edit.value) == ("change", abs(change))
    assert edit.direction == ("more" if change > 0 else "less")


@REPEATABLE
@given(degree=st.integers(0, 5), target=st.integers(0, 5))
def test_a_target_is_reached_from_anywhere(degree: int, target: int) -> None:
    edit = Edit(Attribute.AGE, target=target)
    assert edit.expected(degree) == target
    assert (edit.mode, edit.value) == ("target", None)
    assert edit.direction == {0: "less", 5: "more"}.get(target)


@pytest.mark.parametrize("change", [0, 6, -6, 1.5, True, "1"])
def test_changes_out_of_range_are_refused(change: object) -> None:
    with pytest.raises(InvalidRequest, match=r"change is .*1\.\.5"):
        Edit(Attribute.BANGS, change=change)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [-1, 6, 2.0, False])
def test_targets_out_of_range_are_refused(target: object) -> None:
    with pytest.raises(InvalidRequest, match=r"target is .*0\.\.5"):
        Edit(Attribute.BANGS, target=target)  # type: ignore[arg-type]


def test_exactly_one_of_change_and_target() -> None:
    for both in ({}, {"change": 1, "target": 1}):
        with pytest.raises(InvalidRequest, match="expected exactly one"):
            Edit(Attribute.BANGS, **both)


def test_a_degree_before_the_edit_is_checked() -> None:
    with pytest.raises(InvalidRequest, match="degree is 7"):
        Edit(Attribute.BANGS, change=1).expected(7)


def test_edits_in_plain_words() -> None:
    assert Edit(Attribute.BEARD, change=2).describe() == "beard: 2 degrees more"
    assert Edit(Attribute.SMILING, change=-1).describe() == "smiling: 1 degree less"
    assert Edit(Attribute.AGE, target=1).describe() == "age: a teenager"
