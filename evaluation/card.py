"""The model card of a bundle, written from its index and from what was measured; never by hand."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evaluation.bars import Bar, table
from shared.bundle import Bundle, write_scores

CARD = "README.md"

_INTRODUCTION = """\
Weights of Editable-DeepSC for {size} x {size} px faces: 512 real numbers per face over a radio
channel. `edsc evaluate --suite bundle --write` (and `--suite link`) writes this file from what was
measured and recorded.

**Data.** Trained on {data}. The pictures are for non-commercial
research and are not part of this repository; the weights are offered for research under the same
condition.

**Use.** Research on semantic communication. Not for identifying people, not for deceiving them:
what the receiver draws is a generated picture of a face that was edited on the way.

**Limits.** 512 noisy numbers cannot hold a photograph: pictures are softer than the original, and
backgrounds, jewellery and hands are guessed. CelebA's people are mostly young, light-skinned
celebrities facing the camera; others are drawn less well. Degrees 0..5 come from binary labels
(ordered evidence and quantiles of a learned score, `training/degrees.py`), so degree 3 of
eyeglasses means "middle of the scale", not "thick frame".
"""


def model_card(bundle: Bundle) -> str:
    """Markdown: what the bundle is, how each net was made, and how well the link does with it."""
    size = bundle.config("generator")["image_size"]
    data = bundle.provenance("generator")["data"]
    lines = [f"# {bundle.name}", "", _INTRODUCTION.format(size=size, data=data)]
    lines += ["## Scores", "", *_scores(bundle.scores), "", "## Nets", "", *_nets(bundle), ""]
    return "\n".join(lines)


def write_card(folder: Path) -> Path:
    """Write the card beside the weights."""
    path = folder / CARD
    path.write_text(model_card(Bundle.open(folder)), "utf-8")
    return path


def keep(
    folder: Path,
    name: str,
    report: Mapping[str, Any],
    *,
    output: Path | None = None,
    write: bool = False,
) -> None:
    """What every suite does with its report: JSON to `output`; with `write` also the scores of the
    bundle at `folder`, under the suite's name, and its model card.
    """
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if write:
        write_scores(folder, {name: report})
        write_card(folder)


def _figure(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f} | {value['low']:.3f} .. {value['high']:.3f} | {value['count']}"


def _scores(scores: Any) -> Iterator[str]:
    suite, link = scores.get("bundle"), scores.get("link")
    if not suite and not link:
        yield "Not measured yet: `edsc evaluate --suite bundle --write`."
        return
    if suite:
        yield from _bars(suite)
    if suite and link:
        yield ""
    if link:
        yield from _link(link)


def _bars(suite: Any) -> Iterator[str]:
    bars = [Bar.from_json(row) for row in suite["bars"]]
    options, missed = suite["options"], [bar for bar in bars if bar.verdict == "missed"]
    yield (
        f"`edsc evaluate --suite bundle`, `{options['quality']}`: aligned faces of the test split"
        " (people it has never seen), AWGN, 95 % bootstrap intervals. `perceptual` is the"
        " predictor's own feature distance, uncalibrated; `fd_edgeface` a Frechet distance on"
        " EdgeFace-XS embeddings; edits cross at 12 dB and are judged by a predictor that the"
        " transmitter does not have, against the degree that the link promised."
    )
    yield ""
    if missed:
        yield (
            "**Short of its bar:** "
            + "; ".join(f"{bar.what}, {bar.value} where {bar.bar} was wanted" for bar in missed)
            + "."
        )
    else:
        yield "No bar that was measured is missed."
    yield ""
    yield from table(bars)


def _link(link: Any) -> Iterator[str]:
    yield (
        f"{link['photos']} unaligned photographs of the test split, {link['snr_db']:g} dB AWGN,"
        f" `{link['quality']}`; a face was found in {link['faces_found']}. Means with 95 %"
        " bootstrap intervals. Identity is the cosine of EdgeFace-XS embeddings of the received"
        " picture and of the aligned photograph."
    )
    yield ""
    yield "| what | mean | interval | N |"
    yield "|---|---|---|---|"
    yield f"| PSNR, dB | {_figure(link['psnr_db'])} |"
    yield f"| identity cosine | {_figure(link['identity'])} |"
    for name, value in link["edits_moved"].items():
        yield f"| {name}: degree moved as asked in the received picture | {_figure(value)} |"
    for name, value in link["edits_reached"].items():
        yield f"| {name}: exactly the degree asked | {_figure(value)} |"
    for name, value in link["sentences"].items():
        yield f"| test sentences: {name} | {_figure(value)} |"
    if link["sentences"]:
        yield ""
        yield (
            "The net was chosen before it was shown these sentences, once. Some short ones stand in"
            " the training sentences too (tests/sentences/README.md counts them)."
        )


def _nets(bundle: Bundle) -> Iterator[str]:
    yield "| net | recipe | images or samples | steps | hours | device | seed | commit | MB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for net in bundle.nets:
        made = bundle.provenance(net)
        cells = [made.get(key, "") for key in ("recipe", "images", "steps", "hours", "device")]
        cells += [made.get("seed", ""), made.get("commit", "")]
        megabytes = bundle.index["nets"][net]["bytes"] / 1e6
        yield f"| {net} | " + " | ".join(str(cell) for cell in cells) + f" | {megabytes:.1f} |"
