"""Tables and verdicts from rows that were made up: what must come out is known."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.candidates import OURS
from evaluation.claims import percent, quality_words, verdicts
from evaluation.metrics import Figure
from evaluation.panel import pack, unpack
from evaluation.report import bandwidth_page, costs_page, errors_page, index_page, quality_page
from evaluation.results import Results
from evaluation.trial import NO_CHANNEL, ORIGINAL, Row
from shared.bundle import Bundle

FACES = 60
OTHERS = ("edit+deepsc", "edit+jpeg-ldpc")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.results._RESAMPLES", 40)


def _row(image: int, scheme: str, snr_db: float | None, **values: Any) -> Row:
    return {
        "key": f"{image}{scheme}{snr_db}",
        "part": "main",
        "faces": "celeba128",
        "image": f"face{image:03d}",
        "sentence": "add eyeglasses",
        "scheme": scheme,
        "channel": NO_CHANNEL if snr_db is None else "awgn",
        "snr_db": snr_db,
        "quality": "balanced",
        "commit": "0123456789ab",
        "bundle": "f" * 64,
        "precision": "float32",
        "judge": "judge",
        **values,
    }


def _made_up(ours: float, seed: int = 0) -> list[Row]:
    """Ours is at `ours` of the others' perceptual distance at -6 dB, and behind them at 18 dB."""
    draws = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for image in range(FACES):
        face = torch.randn(16, generator=draws)
        rows.append(_row(image, ORIGINAL, None, embeddings={"edgeface": pack(face)}))
        for snr_db in (-6.0, 18.0):
            for scheme, factor in ((OURS, ours), *((name, 1.0) for name in OTHERS)):
                level = factor if snr_db < 0 else (1.0 if scheme == OURS else 0.2)
                noise = torch.randn(16, generator=draws)
                wobble = 1 + 0.1 * float(torch.rand((), generator=draws))
                digital = scheme == "edit+jpeg-ldpc"
                lost = 12 if snr_db < 0 else 0
                rows.append(
                    _row(
                        image,
                        scheme,
                        snr_db,
                        perceptual=0.4 * level * wobble,
                        moved=True,
                        hit=image % 2 == 0,
                        drift=0.1,
                        embeddings={"edgeface": pack(face + level * noise + level)},
                        seconds=1.0 if scheme == OURS else 3.0,
                        timings_ms={"edit": 900.0 if scheme == OURS else 2900.0, "draw": 100.0},
                        uses={OURS: 256, "edit+deepsc": 2048}.get(scheme, 17280),
                        header_uses=0,
                        cbr={OURS: 512, "edit+deepsc": 4096}.get(scheme, 34560) / 49152,
                        cbr_complex={OURS: 256, "edit+deepsc": 2048}.get(scheme, 17280) / 49152,
                        cbr_printed=0.0104,
                        bits=11464 if digital else None,
                        ber=0.3 * (lost > 0) if digital else None,
                        blocks=12 if digital else 0,
                        block_errors=lost if digital else 0,
                        decoded=not (digital and lost),
                    )
                )
    return rows


def test_a_large_gain_holds_and_no_gain_does_not() -> None:
    good = {v.claim: v.word for v in verdicts(Results(_made_up(0.3)))}
    bad = {v.claim: v.word for v in verdicts(Results(_made_up(1.3)))}
    at_minus_6 = [claim for claim in good if claim.startswith("-6 dB")]
    assert len(at_minus_6) == 3
    assert [good[claim] for claim in at_minus_6] == ["holds", "holds", "holds"]
    assert [bad[claim] for claim in at_minus_6] == ["does not hold"] * 3
    seconds = next(claim for claim in good if claim.startswith("seconds"))
    assert good[seconds] == "holds in the mean"
    first = next(claim for claim in good if claim.startswith("first in perceptual"))
    assert (good[first], bad[first]) == ("holds in the mean", "does not hold")


def test_what_was_not_decoded_is_not_counted_as_quick() -> None:
    """An editor that gets nothing to edit takes no time, which is no merit."""
    rows = _made_up(0.3)
    lost = [row for row in rows if row["scheme"] == "edit+jpeg-ldpc" and not row["decoded"]]
    assert lost
    for row in lost:
        row["seconds"], row["timings_ms"] = 0.01, {"draw": 10.0}
    results = Results(rows)
    assert results.stages("edit+jpeg-ldpc") == {"edit": 2900.0, "draw": 100.0}
    seconds = next(v for v in verdicts(results) if v.claim.startswith("seconds"))
    assert seconds.word == "holds in the mean"


def test_gain_is_over_the_best_of_the_others() -> None:
    rows = _made_up(0.5)
    for row in rows:
        if row["scheme"] == "edit+deepsc" and "perceptual" in row:
            row["perceptual"] *= 0.8
    found = Results(rows).gain("perceptual", "awgn", -6.0)
    assert found is not None
    assert found[0] == "edit+deepsc"
    assert found[1].mean == pytest.approx(1 - 0.5 / 0.8, abs=0.02)
    assert found[1].low < found[1].mean < found[1].high


def test_a_scheme_with_missing_pictures_is_no_competitor() -> None:
    rows = [r for r in _made_up(0.5) if r["scheme"] != "edit+deepsc" or r["image"] != "face000"]
    assert {name for name, _ in Results(rows).competitors("awgn", -6.0)} == {"edit+jpeg-ldpc"}


def test_where_others_are_first_the_text_says_so() -> None:
    words = " ".join(quality_words(Results(_made_up(0.3))))
    assert "smaller than that of edit+" in words
    assert "At 18 dB another scheme is first" in words
    even = " ".join(quality_words(Results(_made_up(1.0))))
    assert "cannot be told apart" in even
    assert "is better than ours" in " ".join(quality_words(Results(_made_up(2.0))))


def test_gains_read_both_ways() -> None:
    assert percent(Figure(0.4, 0.35, 0.44, 9)) == "40 % [35, 44] smaller"
    assert percent(Figure(-0.15, -0.25, -0.07, 9)) == "15 % [7, 25] larger"


def test_pages_print_the_papers_count_beside_the_honest_one(bundle_folder: Path) -> None:
    results, bundle = Results(_made_up(0.3)), Bundle.open(bundle_folder)
    bandwidth = "\n".join(bandwidth_page(results))
    assert "| editable-deepsc | 0.0104 | 0.0104 | 0.0104 | 0.0052 | 256 |" in bandwidth
    assert "| edit+jpeg-ldpc | 0.0389 |" in bandwidth
    assert "edit+jpeg-ldpc takes 67.5 times the channel uses" in bandwidth
    errors = "\n".join(errors_page(results, bundle))
    assert "| -6 | 83 |" in errors
    assert "| edit+jpeg-ldpc | -2.3 | -6 | 0.300 [0.300, 0.300] | 1.000 | 1.000" in errors
    costs = "\n".join(costs_page(results, bundle))
    assert "| editable-deepsc | 1.000 [1.000, 1.000] | 900.0 | 100.0 |" in costs
    assert "79.1 M" in costs
    assert "few" not in "\n".join(quality_page(results))  # 60 faces are enough
    assert "[quality](quality.md)" in "\n".join(index_page(results, bundle, ["quality.md"]))


def test_embeddings_survive_their_text() -> None:
    x = torch.randn(512, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(unpack(pack(x)), x, atol=2e-3, rtol=1e-3)
