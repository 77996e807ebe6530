"""Edits of unseen faces, judged by a predictor that had no part in making them.

::

    face --invert--> w --------------------A_CE, 12 dB, A_CD, G--> plain --judge--> degrees
                     |                                               `---EdgeFace--> cosine
                     '--match (the guide's eye)--> w' --same link--> edited --judge, EdgeFace

Every attribute is changed by -3..3 degrees where the result stays in 0..5. The walk is steered by
the guide (`transmitter.opinions`), so what it sees afterwards proves little; the judge (`edsc train
judge`) is asked whether the received picture shows the degree that the link said it would. Both
pictures cross with the same noise.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.bars import Bar, grouped
from evaluation.metrics import non_target_drift
from shared.attributes import ATTRIBUTES, MAX_DEGREE, Attribute, Edit
from shared.errors import InvalidRequest
from training.data import FaceSet
from transmitter.editing import Quality, match
from transmitter.inversion import invert
from transmitter.pipeline import INVERSION_STEPS, Transmitter
from transmitter.predictor import Predictor, expected_degree

LARGEST_CHANGE = 3

Embed = Callable[[Tensor], Tensor]  # pictures [B, 3, S, S] -> unit vectors [B, 512]
Route = Callable[[Tensor, int], Tensor]  # latents [B, k], seed -> received pictures [B, 3, S, S]


@dataclass(frozen=True)
class EditedFace:
    """One edit of one face: what was asked, what the link said, what others saw.

    before, expected: degrees by the guide, 0..5. reached: whether it foresaw the
    expected one behind the channel. judged_before, judged: the judge's degrees of the received
    pictures. drift: mean change of the other four attributes in the judge's expected degrees.
    same, same_plain: cosine of the received picture with and without edit to the photograph.
    """

    face: int
    attribute: Attribute
    change: int
    before: int
    expected: int
    reached: bool
    judged_before: int
    judged: int
    drift: float
    same: float
    same_plain: float


@torch.no_grad()
def edit_faces(
    transmitter: Transmitter,
    judge: Predictor,
    route: Route,
    embed: Embed,
    faces: FaceSet,
    quality: Quality,
    snr_db: float,
) -> Iterator[EditedFace]:
    """Make every possible edit of every face and look at what arrives.

    snr_db: of `route`, which the transmitter knows.
    """
    arrival = transmitter.arrival(snr_db)
    for number in range(len(faces)):
        face = faces.batch(torch.tensor([number])).to(transmitter.device)
        with torch.enable_grad():  # a refined inversion needs gradients
            w = invert(
                face,
                transmitter.encoder,
                transmitter.generator,
                transmitter.predictor,
                INVERSION_STEPS[quality],
            )
        plain = route(w, number)
        plain_scores = judge.steady_scores(plain)
        plain_degrees = expected_degree(judge.score_logits(plain_scores))
        who = embed(face)
        same_plain = float((embed(plain) * who).sum())
        guide = transmitter.guide
        before = guide.score_degrees(transmitter.seen(w))[0]
        for edit in possible_edits(before):
            found = match(
                w,
                edit,
                generator=transmitter.generator,
                fields=transmitter.fields,
                predictor=guide,
                regressor=transmitter.regressor,
                arrival=arrival,
                limits=quality,
            )
            edited, index = route(found.w, number), edit.attribute.index
            scores = judge.steady_scores(edited)
            after = expected_degree(judge.score_logits(scores))
            drift = non_target_drift(plain_degrees, after, edit.attribute)
            assert edit.change is not None  # possible_edits makes no targets
            yield EditedFace(
                face=number,
                attribute=edit.attribute,
                change=edit.change,
                before=int(before[index]),
                expected=found.expected,
                reached=found.reached,
                judged_before=int(judge.score_degrees(plain_scores)[0, index]),
                judged=int(judge.score_degrees(scores)[0, index]),
                drift=float(drift),
                same=float((embed(edited) * who).sum()),
                same_plain=same_plain,
            )


def possible_edits(before: Tensor) -> Iterator[Edit]:
    """Changes by -3..3 of degrees [5] that stay in 0..5, every attribute."""
    for attribute in ATTRIBUTES:
        degree = int(before[attribute.index])
        for change in range(-LARGEST_CHANGE, LARGEST_CHANGE + 1):
            if change and 0 <= degree + change <= MAX_DEGREE:
                yield Edit(attribute, change=change)


def edit_bars(edits: list[EditedFace]) -> list[Bar]:
    """The bars on edits, then what explains them. Raises InvalidRequest for no edits."""
    if not edits:
        raise InvalidRequest("got 0 edits, expected at least one")
    face = torch.tensor([e.face for e in edits])
    off = torch.tensor([abs(e.judged - e.expected) for e in edits])
    exact, within = (off == 0).double(), (off <= 1).double()
    drift = torch.tensor([e.drift for e in edits], dtype=torch.float64)
    same = torch.tensor([e.same for e in edits], dtype=torch.float64)
    plain = torch.tensor([e.same_plain for e in edits], dtype=torch.float64)
    age = torch.tensor([e.attribute is Attribute.AGE for e in edits])
    reached = torch.tensor([e.reached for e in edits]).double()
    agree = torch.tensor([abs(e.judged_before - e.before) for e in edits])
    moved = torch.tensor([(e.judged - e.judged_before) * e.change > 0 for e in edits]).double()
    faces = f"{len(face.unique())} faces, resampled whole"
    bars = [
        Bar("hit_exact", "edits, judge: exactly the degree", grouped(exact, face), 0.70, unit="%"),
        Bar("hit_within", "edits, judge: within one degree", grouped(within, face), 0.92, unit="%"),
        Bar(
            "drift",
            "edits, judge: drift of the other attributes",
            grouped(drift, face),
            0.35,
            at_least=False,
            unit="degrees",
            note=faces,
        ),
    ]
    for name, rows, wanted in (("identity_kept", ~age, 0.85), ("identity_kept_age", age, None)):
        kept = grouped(same[rows], face[rows], over=plain[rows]) if bool(rows.any()) else None
        what = "age only" if wanted is None else "age apart"
        note = "" if kept else "no such edit was possible"
        bars.append(Bar(name, f"edits: identity kept, {what}", kept, wanted, unit="%", note=note))
    bars += [
        Bar("edit_moved", "edits, judge: moved the asked way", grouped(moved, face), unit="%"),
        Bar("edit_reached", "edits, guide: exact", grouped(reached, face), unit="%"),
        Bar(
            "judges_agree",
            "judge and guide on the unedited face: same degree",
            grouped((agree == 0).double(), face),
            unit="%",
            note="what an exact hit rate is to be compared with",
        ),
        Bar(
            "judges_agree_within",
            "judge and guide on the unedited face: within one",
            grouped((agree <= 1).double(), face),
            unit="%",
        ),
    ]
    for attribute in ATTRIBUTES:
        for way, sign in (("more", 1), ("less", -1)):
            rows = torch.tensor([e.attribute is attribute and e.change * sign > 0 for e in edits])
            if bool(rows.any()):
                name = f"hit_{attribute}_{way}"
                hit = grouped(exact[rows], face[rows])
                bars.append(Bar(name, f"edits, judge: exact, {attribute} {way}", hit, unit="%"))
    return bars
