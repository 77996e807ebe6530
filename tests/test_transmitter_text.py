"""The sentence reader: tokens, the ladder, refusal, the recipe, the shipped net."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from evaluation.link_suite import SENTENCES
from evaluation.link_suite import read_sentences as read_test_sentences
from shared.attributes import ATTRIBUTES, Edit
from shared.bundle import Bundle, default_folder
from shared.errors import InstructionRefused, InvalidRequest
from training.misspelling import misspell
from training.patterns import expand, parse, phrases, split, tidy
from training.run import RunOptions
from training.sentences import (
    DEV_SET,
    labelled,
    make_sentence,
    read_sentences,
)
from training.text import (
    Recipe,
    draw_chunk,
    loss_of,
    read_all,
    score,
    to_tensors,
    train,
    warm_start,
)
from transmitter.text import (
    MAX_CHARACTERS,
    SCOPES,
    Heads,
    TextConfig,
    TextEncoder,
    TextReader,
    Vocabulary,
    decide,
    one_error,
    pieces,
    tokenise,
)

TINY = TextConfig(("beard", "older", "make"), pieces=128, width=8, hidden=6, layers=2, members=2)
SHORT = Recipe(steps=4, batch=8, chunk=3, warm_up=2)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don’t make HER smile!", ["dont", "make", "her", "smile", "."]),
        ("clean-shaven, pleeease 😀", ["clean", "shaven", ",", "please"]),
        ("Un café, s'il vous plaît", ["un", "cafe", ",", "sil", "vous", "plait"]),
        ("in her 30s?", ["in", "her", "30", "s", "?"]),
        ("😀🔥 \u200b \t", []),
    ],
)
def test_tokenise_drops_case_accents_and_emoji(text: str, tokens: list[str]) -> None:
    assert tokenise(text) == tokens


@pytest.mark.parametrize("wrong", ["berad", "bead", "beardd", "bearf", "beeard"])
def test_a_mistyped_word_stands_for_the_word(wrong: str) -> None:
    known = Vocabulary(["beard", "smile"])
    assert known("beard") == (1,)
    assert known(wrong) == (0, 1)
    assert known("hat") == (0,)


def test_two_errors_are_forgiven_in_a_long_word() -> None:
    known = Vocabulary(["moustache", "eyeglasses"])
    assert known("moustahec") == (0, 1)
    assert known("a" * 2000) == (0,)


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [("her", "hre", True), ("her", "he", True), ("", "a", True), ("smile", "slime", False)],
)
def test_one_error(one: str, other: str, near: bool) -> None:
    assert one_error(one, other) is near
    assert one_error(other, one) is near


def test_pieces_of_words_and_numbers_are_bounded() -> None:
    assert "tens 3" in pieces("34")
    assert "tens 3" in pieces("35")
    assert pieces("berad")[-1] == pieces("beard")[-1]
    assert len(pieces("a" * 2000)) < 40


def certain(**winners: int) -> Heads:
    """Head probabilities of one sentence, sure of the given class of each head."""
    counts = zip(Heads._fields, TextEncoder.CLASSES, strict=True)
    return Heads(
        **{
            name: torch.nn.functional.one_hot(torch.tensor(winners.get(name, 0)), count).double()
            for name, count in counts
        }
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_ladder_becomes_a_signed_change(size: int) -> None:
    more = decide(certain(attribute=2, size=size - 1), 0.5)
    less = decide(certain(attribute=2, direction=1, size=size - 1), 0.5)
    assert more.edit == Edit(ATTRIBUTES[2], change=size)
    assert more.confidence == 1.0
    assert less.edit == Edit(ATTRIBUTES[2], change=-size)


def test_targets_are_read_whatever_the_size_says() -> None:
    assert decide(certain(attribute=4, mode=1, target=0, size=3), 0.5).edit == Edit(
        ATTRIBUTES[4], target=0
    )


def test_refusals_say_why_and_what_can_be_asked() -> None:
    with pytest.raises(InstructionRefused, match="bangs, eyeglasses, beard, smile or age"):
        decide(certain(scope=SCOPES.index("out")), 0.5)
    with pytest.raises(InstructionRefused, match="one at a time"):
        decide(certain(scope=SCOPES.index("several")), 0.5)
    torn = certain()._replace(attribute=torch.tensor([0.45, 0.45, 0.1, 0, 0]).double())
    with pytest.raises(InstructionRefused):
        decide(torn, 0.5)


def test_the_reader_refuses_what_holds_no_words() -> None:
    reader = TextReader(TextEncoder(TINY))
    for empty in ("", "  \n"):
        with pytest.raises(InvalidRequest, match="empty"):
            reader(empty)
    with pytest.raises(InvalidRequest, match=f"10000 .* at most {MAX_CHARACTERS}"):
        reader("a" * 10_000)
    for wordless in ("😀😀", "?!", "-", "。"):
        with pytest.raises(InstructionRefused, match="no words"):
            reader(wordless)


def test_a_sentence_reads_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(TINY).eval()
    batch = [tokenise(t) for t in ("older", "make the beard a bit longer, please", "no glasses")]
    together = encoder(encoder.number(batch))
    for i, tokens in enumerate(batch):
        for whole, one in zip(together, encoder(encoder.number([tokens])), strict=True):
            torch.testing.assert_close(whole[i], one[0], rtol=1e-5, atol=1e-6)


def test_configurations_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        TextConfig(hidden=0)
    with pytest.raises(InvalidRequest, match="threshold is 2"):
        TextConfig(threshold=2)


def test_patterns_expand() -> None:
    rng = Random(0)
    found = {
        expand("make (it|{N}) [much] {C}", {"N": "beard", "C": "longer"}, rng) for _ in range(99)
    }
    assert found == {
        f"make {noun} {much}longer" for noun in ("it", "beard") for much in ("", "much ")
    }
    with pytest.raises(ValueError, match="ends before"):
        expand("make (it longer", {}, rng)


def test_articles_are_mended() -> None:
    assert tidy("give him a a bit longer beard") == "give him a bit longer beard"
    assert tidy("a the older face, a older man") == "the older face, an older man"


def test_every_phrase_can_be_parsed() -> None:
    def texts(part: object) -> list[str]:
        if isinstance(part, dict):
            return [text for inner in part.values() for text in texts(inner)]
        if isinstance(part, list):
            return [text for inner in part for text in texts(inner)]
        return [part] if isinstance(part, str) else []

    for name in ("phrases", "grammar"):
        for text in texts(phrases(name)):
            assert all(parse(pattern) for pattern in split(text))


def test_the_grammar_reaches_every_label_and_repeats_with_the_seed() -> None:
    first = [make_sentence(rng) for rng in [Random(3)] for _ in range(3000)]
    assert first == [make_sentence(rng) for rng in [Random(3)] for _ in range(3000)]
    assert {s.scope for s in first} == {0, 1, 2}
    changes = {(s.attribute, s.direction, s.size) for s in first if s.mode == 0}
    targets = {(s.attribute, s.target) for s in first if s.mode == 1}
    assert len(changes) == 5 * 2 * 5
    assert len(targets) == 5 * 6
    assert not any("{" in s.text for s in first if s.scope == 0)


def test_misspelling_stays_near() -> None:
    rng = Random(1)
    text = "make the moustache a little thicker please"
    wrong = [misspell(text, rng, often=1.0) for _ in range(200)]
    assert sum(w != text for w in wrong) > 190
    assert all(abs(len(w) - len(text)) <= 5 for w in wrong)


def test_labels_that_a_sentence_lacks_cost_nothing() -> None:
    encoder = TextEncoder(TINY)
    refused = [labelled("hello", None)]
    sentences, labels = to_tensors(encoder, refused, torch.device("cpu"))
    heads = encoder(sentences)
    scope_only = torch.nn.functional.cross_entropy(heads.scope, labels[:, 0])
    torch.testing.assert_close(loss_of(heads, labels, 0.0), scope_only)


def test_a_chunk_depends_on_its_number_alone() -> None:
    assert draw_chunk(5, 2, SHORT) == draw_chunk(5, 2, SHORT) != draw_chunk(5, 3, SHORT)


def options(folder: Path, **changes: Any) -> RunOptions:
    return RunOptions(
        data=folder, bundle=folder / "bundle", runs=folder / "runs", device="cpu", **changes
    )


def test_the_recipe_resumes_exactly_and_its_net_is_read_back(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(options(whole), SHORT, TINY)
    train(options(halves, steps=2), SHORT, TINY)
    train(options(halves, steps=2), SHORT, TINY)
    bundles = [Bundle.open(folder / "bundle") for folder in (whole, halves)]
    one, two = (bundle.tensors("text") for bundle in bundles)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert bundles[0].config("text")["hidden"] == TINY.hidden
    assert bundles[0].provenance("text")["steps"] == 4
    reader = TextReader.from_bundle(bundles[0])
    with contextlib.suppress(InstructionRefused):  # four steps teach little: either answer is one
        assert reader("make the smile bigger").edit.attribute in ATTRIBUTES


def test_a_warm_start_keeps_the_words_that_both_know(tmp_path: Path) -> None:
    train(options(tmp_path), SHORT, TINY)
    bundle = Bundle.open(tmp_path / "bundle")
    grown = TextEncoder(replace(TINY, vocabulary=("a", "beard", "make")))
    table = grown.get_parameter("members.1.words.weight")
    before = table.detach().clone()
    assert [run["steps"] for run in warm_start(grown, bundle)] == [4]
    old = bundle.tensors("text")["members.1.words.weight"]
    assert torch.equal(table[[0, 2, 3]], old[[0, 1, 3]])
    assert torch.equal(table[1], before[1])
    with pytest.raises(InvalidRequest, match="shape differs"):
        warm_start(TextEncoder(replace(TINY, hidden=7)), bundle)


def test_the_development_sentences_are_well_formed(tmp_path: Path) -> None:
    found = read_sentences(DEV_SET)
    assert sum(s.scope == 0 for s in found) >= 100
    assert sum(s.scope != 0 for s in found) >= 50
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "older", "in_scope": true}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_sentences(bad)


def shipped() -> TextReader:
    folder = default_folder()
    if not (folder / "bundle.json").is_file() or not Bundle.open(folder, verify=False).has("text"):
        pytest.skip(f"no bundle with a text encoder at {folder}")
    return TextReader.from_bundle(Bundle.open(folder))


@pytest.mark.parametrize(
    ("text", "attribute", "change", "target"),
    [
        ("make the smile bigger", 3, 3, None),
        ("give him a fuller beard", 2, 3, None),
        ("no beard at all", 2, None, 0),
        ("cover half of the forehead", 0, None, 3),
        ("in the thirties", 4, None, 2),
        ("Older.", 4, 3, None),
        ("The smile is too big.", 3, -3, None),
        ("a bit longer bangs", 0, 1, None),
        ("make the beard much shorter", 2, -4, None),
        ("Add glasses", 1, 3, None),
        ("make him a child", 4, None, 0),
        ("take off the glasses", 1, None, 0),
    ],
)
def test_the_shipped_reader_reads(
    text: str, attribute: int, change: int | None, target: int | None
) -> None:
    reading = shipped()(text)
    assert reading.edit == Edit(ATTRIBUTES[attribute], change=change, target=target)
    assert 0.5 < reading.confidence <= 1


@pytest.mark.parametrize(
    "text", ["make her hair blue", "hello", "add a beard and glasses", "12345"]
)
def test_the_shipped_reader_refuses(text: str) -> None:
    with pytest.raises(InstructionRefused, match="beard"):
        shipped()(text)


def test_the_shipped_reader_keeps_what_it_reached_on_sentences_it_was_not_trained_on() -> None:
    """Floors below the measured shares, against regressions; the model card has the shares.

    Asked for are 98 % right attribute and direction, 90 % right size, 95 % of the others refused.
    Of today's test set and of those before it together: of one alone the share refused is known to
    two or three in a hundred.
    """
    reader = shipped()
    if not (SENTENCES / "in_scope.jsonl").is_file():
        pytest.skip(f"no test sentences at {SENTENCES}")
    sets = [read_test_sentences(reader, folder) for folder in (SENTENCES, SENTENCES / "seen")]
    counts = {name: sum(figures[name].count for figures in sets) for name in sets[0]}
    shares = {
        name: sum(figures[name].mean * figures[name].count for figures in sets) / count
        for name, count in counts.items()
    }
    assert counts["attribute and way"] >= 2300
    assert counts["refused"] >= 900
    assert shares["attribute and way"] >= 0.98, shares
    assert shares["size as well"] >= 0.97, shares
    assert shares["refused"] >= 0.97, shares


def test_scores_count_what_they_say() -> None:
    asked: Sequence[Any] = [
        labelled("a", Edit(ATTRIBUTES[0], change=2)),
        labelled("b", Edit(ATTRIBUTES[0], target=4)),
        labelled("c", None),
    ]
    given = [certain(size=2), certain(mode=1, target=4), certain(scope=1)]
    assert score(read_all(given, 0.5), asked) == {"direction": 1.0, "size": 0.5, "refused": 1.0}
