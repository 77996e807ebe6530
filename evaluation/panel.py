"""The panel that judges received pictures: every metric of one picture, and its embeddings.

::

    photograph --.                            psnr_db, ms_ssim, perceptual, identity, lpips_*
                 +--> measure --> numbers:    degrees, hit, moved, drift (by the judge)
    received ----'                            embeddings, for fd_NAME and kd_NAME later

The judge is the bundle's net `judge`, a predictor trained apart from the one that steers the edit;
where a bundle has none the predictor itself judges, and `Panel.judge_name` says so, for then hits
are flattered. EdgeFace and the official metrics are used where their files are.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics import cosine, ms_ssim, non_target_drift, psnr_db
from evaluation.official import Official
from shared.attributes import Attribute, Edit
from shared.bundle import Bundle
from shared.errors import InvalidRequest
from training.teachers import IDENTITY_FILE, FaceIdentity
from transmitter.predictor import Predictor

MORE: Final = "more"
LESS: Final = "less"
PSNR_CAP_DB: Final = 100.0  # of equal pictures, which JSON has no number for
_BATCH: Final = 16


@dataclass(frozen=True)
class Reference:
    """The photograph to compare with, and what the judge sees in it.

    face: [1, 3, S, S]. degrees: [5] int64. expected_degrees: [5] float. embeddings: by name [D].
    """

    face: Tensor
    degrees: Tensor
    expected_degrees: Tensor
    embeddings: Mapping[str, Tensor]


@dataclass(frozen=True)
class Wish:
    """What the sentence asks for, and what was understood.

    attribute, direction: what the sentence was chosen for, "more" or "less". edit: as read.
    """

    attribute: Attribute
    direction: str
    edit: Edit | None

    @property
    def understood(self) -> bool:
        """Whether the reading has the attribute and the direction that were meant."""
        edit = self.edit
        return (
            edit is not None
            and edit.attribute is self.attribute
            and edit.direction == self.direction
        )


class Panel:
    """Judges of one bundle, on the CPU. data: the data folder, for EdgeFace where it is there."""

    def __init__(self, bundle: Bundle, data: Path, official: Official | None = None) -> None:
        self.judge_name = "judge" if bundle.has("judge") else "predictor"
        self.predictor = Predictor.from_bundle(bundle)
        self.judge = Predictor.from_bundle(bundle, self.judge_name)
        self.official = official or Official()
        there = (data / "nets" / IDENTITY_FILE).is_file()
        self.identity = FaceIdentity(data) if there else None

    @property
    def embedding_names(self) -> tuple[str, ...]:
        """Embeddings that rows carry: what fd_ and kd_ can be computed on."""
        names = ["predictor"]
        if self.identity is not None:
            names.append("edgeface")
        if self.official.inception is not None:
            names.append("inception")
        return tuple(names)

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, S, S] in [-1, 1] -> embeddings [B, D] float32 by name.

        predictor: the bundle's own, means of its last stage. edgeface: of a face recogniser.
        inception: of the FID network.
        """
        found = {"predictor": self.predictor.features(images)[-1].float().mean((2, 3))}
        if self.identity is not None:
            found["edgeface"] = self.identity(_at_least(images, 112))
        if self.official.inception is not None:
            found["inception"] = self.official.inception(images)
        return found

    @torch.no_grad()
    def reference(self, face: Tensor) -> Reference:
        """What every picture made from this face [1, 3, S, S] is compared with."""
        embeddings = {name: rows[0] for name, rows in self.embed(face).items()}
        return Reference(
            face,
            self.judge.degrees(face)[0],
            self.judge.expected_degrees(face)[0],
            embeddings,
        )

    @torch.no_grad()
    def measure(
        self, images: Sequence[Tensor], reference: Reference, wish: Wish
    ) -> list[dict[str, Any]]:
        """Pictures [1, 3, S, S] each -> for each its metrics, plain values ready for JSON.

        hit: the judge sees exactly the degree asked of the photograph, Eq. (10); false where the
        sentence was misread. moved: at least a degree the way that was asked. Both are None where
        the photograph was at that end already. drift: of the other attributes, in degrees.
        """
        if not images:
            raise InvalidRequest("got 0 pictures to measure, expected at least one")
        rows: list[dict[str, Any]] = []
        for start in range(0, len(images), _BATCH):
            rows += self._measure(torch.cat(list(images[start : start + _BATCH])), reference, wish)
        return rows

    def _measure(self, images: Tensor, reference: Reference, wish: Wish) -> list[dict[str, Any]]:
        face = reference.face.expand_as(images)
        degrees = self.judge.degrees(images)  # [B, 5]
        expected_degrees = self.judge.expected_degrees(images)
        embeddings = self.embed(images)
        before = int(reference.degrees[wish.attribute.index])
        way = 1 if wish.direction == MORE else -1
        possible = 0 <= before + way <= 5
        asked = wish.edit.expected(before) if wish.edit and wish.understood else None
        columns: dict[str, Tensor] = {
            "psnr_db": psnr_db(images, face).clamp_max(PSNR_CAP_DB),
            "ms_ssim": ms_ssim(images, face),
            "perceptual": self.predictor.perceptual(images, face),
            "drift": non_target_drift(
                reference.expected_degrees[None], expected_degrees, wish.attribute
            ),
        }
        if "edgeface" in embeddings:
            mine = reference.embeddings["edgeface"][None].expand_as(embeddings["edgeface"])
            columns["identity"] = cosine(embeddings["edgeface"], mine)
        for name, net in self.official.lpips.items():
            columns[name] = net(images, face)
        rows = []
        for number in range(len(images)):
            after = int(degrees[number, wish.attribute.index])
            row: dict[str, Any] = {
                name: round(float(values[number]), 6) for name, values in columns.items()
            }
            row["degree_before"], row["degree_after"], row["degree_asked"] = before, after, asked
            row["hit"] = (asked is not None and after == asked) if possible else None
            row["moved"] = ((after - before) * way > 0) if possible else None
            row["embeddings"] = {name: pack(values[number]) for name, values in embeddings.items()}
            rows.append(row)
        return rows


def pack(embedding: Tensor) -> str:
    """An embedding [D] as text: base64 of little-endian fp16, whose rounding metrics do not
    feel.
    """
    return base64.b64encode(embedding.numpy().astype("<f2").tobytes()).decode()


def unpack(text: str) -> Tensor:
    """The inverse of `pack`: [D] float32."""
    values = np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float32)
    return torch.from_numpy(values)


def _at_least(images: Tensor, side: int) -> Tensor:
    """Small pictures (of tests) enlarged, so that a recogniser's crop has pixels."""
    if images.shape[-1] >= side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear")
