"""The text-driven editor on its own: a picture in, an edited picture out, no channel in between.

    face [1, 3, S, S] --invert--> w --match the attribute (Eqs. 10, 11)--> w' --draw--> face'

It is the transmitter of Editable-DeepSC without its channel encoder, the part that the paper gives
to Talk-to-Edit in its baselines. Schemes of kind M1 run it on what was received, schemes of kind M2
on what is going to be sent.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.attributes import Edit
from shared.batching import alone
from shared.errors import Cancelled, InvalidRequest
from transmitter.editing import Quality, matching
from transmitter.inversion import inverting
from transmitter.pipeline import INVERSION_STEPS, Transmitter

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Degrees:
    """What the predictor saw, degrees 0..5 of the five attributes.

    before: in the rendering before the edit; None where nothing was edited. expected: asked of the
    edited attribute (Eq. 10). after: in the picture that came out. reached: whether it shows
    `expected`. match_steps: steps of the walk.
    """

    after: tuple[int, ...]
    before: tuple[int, ...] | None = None
    expected: int | None = None
    reached: bool | None = None
    match_steps: int = 0


@dataclass
class Watch:
    """Times stages in milliseconds, tells of them as they begin, stops between them when asked.

    `cancelled()` true raises Cancelled at the next stage.
    """

    cancelled: Callable[[], bool] | None = None
    progress: Progress | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.cancelled is not None and self.cancelled():
            raise Cancelled(f"dropped before {stage}: the caller is gone")
        if self.progress is not None:
            self.progress(stage, 0.0)
        started = time.perf_counter()
        yield
        spent = 1000 * (time.perf_counter() - started)
        self.timings_ms[stage] = self.timings_ms.get(stage, 0.0) + spent

    def within(self, stage: str) -> Callable[[float], None] | None:
        """For a stage that can tell how far it is, 0..1."""
        progress = self.progress
        return None if progress is None else lambda done: progress(stage, done)


class Editor:
    """Inference only. Shares the networks of a transmitter, so both may serve one process."""

    def __init__(self, transmitter: Transmitter) -> None:
        self.transmitter = transmitter

    @property
    def image_size(self) -> int:
        """Side of the square pictures, px."""
        return self.transmitter.image_size

    def inversion_steps(self, quality: Quality) -> int:
        """Steps of Eq. (8) that this quality takes. Raises InvalidRequest for an unknown one."""
        if quality not in INVERSION_STEPS:
            raise InvalidRequest(
                f"quality is {quality!r}; expected one of {', '.join(INVERSION_STEPS)}"
            )
        return INVERSION_STEPS[quality]

    def inverted(self, face: Tensor, quality: Quality, watch: Watch) -> Tensor:
        """The latent w [1, 512] of the face [1, 3, S, S] as it is; stage invert."""
        nets = self.transmitter
        with watch("invert"):
            steps = self.inversion_steps(quality)
            return alone(
                inverting(face.to(nets.device), nets.inversion, steps, cancelled=watch.cancelled)
            )

    def latent(
        self,
        face: Tensor,
        edit: Edit | None,
        quality: Quality,
        watch: Watch | None = None,
        snr_db: float | None = None,
    ) -> tuple[Tensor, Degrees | None]:
        """The latent w [1, 512] of the edited face, and what the walk saw; stages invert, edit.

        face: [1, 3, S, S] in [-1, 1]. edit: None inverts only, and the degrees are None. snr_db:
        of the channel that the latent itself will cross; None where a picture is sent.
        """
        watch, nets = watch or Watch(), self.transmitter
        w = self.inverted(face, quality, watch)
        if edit is None:
            return w, None
        with watch("edit"):
            found = alone(
                matching(
                    w,
                    edit,
                    nets.matching,
                    arrival=None if snr_db is None else nets.arrival(snr_db),
                    limits=quality,
                    cancelled=watch.cancelled,
                    progress=watch.within("edit"),
                )
            )
        return found.w, Degrees(
            after=_plain(found.after),
            before=_plain(found.before),
            expected=found.expected,
            reached=found.reached,
            match_steps=found.steps,
        )

    def draw(self, w: Tensor, watch: Watch | None = None) -> Tensor:
        """w [1, 512] -> the generator's picture [1, 3, S, S] in [-1, 1]; stage draw."""
        with (watch or Watch())("draw"):
            return self.transmitter.draw(w)

    @torch.no_grad()
    def degrees(self, image: Tensor) -> tuple[int, ...]:
        """Degrees 0..5 of the five attributes that the guide sees in image [1, 3, S, S]."""
        nets = self.transmitter
        return _plain(nets.guide.degrees(image.to(nets.device))[0])

    def __call__(
        self, face: Tensor, edit: Edit | None, quality: Quality, watch: Watch | None = None
    ) -> tuple[Tensor, Degrees]:
        """The edited picture [1, 3, S, S] in [-1, 1] and its degrees; without an edit, the face."""
        if edit is None:
            return face, Degrees(after=self.degrees(face))
        w, degrees = self.latent(face, edit, quality, watch)
        assert degrees is not None  # there was an edit
        return self.draw(w, watch), degrees


def _plain(found: Tensor) -> tuple[int, ...]:
    return tuple(int(degree) for degree in found)
