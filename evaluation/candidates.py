"""What is compared: every scheme of `shared.schemes`, and Editable-DeepSC with a part changed.

::

    NAME                          as the services offer it
    editable-deepsc/raw           no adapters: the latent is normalised, sent, and taken as received
    editable-deepsc/per-snr       a pair of adapters for every SNR, where the bundle has them
    editable-deepsc/unmatched     one walk along the field of the length its mean slope predicts
    editable-deepsc/steps-N       N steps of Eq. (8) instead of what the quality says

Editing is remembered by picture: the latent of a face, and what was drawn from it, are computed
once however many schemes, channels and SNRs ask for them, and the time that it took the first time
is booked each time. So a row's timings are those of a transmitter that had to do the work.
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from baselines.carriers import CodedCarrier
from baselines.coherent import equalise
from baselines.editor import Degrees, Editor, Watch
from baselines.schemes import BaseScheme, LatentLink, LatentScheme, PictureScheme, Schemes
from shared.adapters import NET_PER_SNR, Adapters
from shared.attributes import Edit
from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.schemes import PLANS, Scheme
from shared.symbols import Reception, normalise_power, to_complex, to_real
from transmitter.editing import LIMITS, Quality, aim_of
from transmitter.pipeline import Transmitter

OURS: Final = Scheme.EDITABLE_DEEPSC.value
RAW: Final = f"{OURS}/raw"
PER_SNR: Final = f"{OURS}/per-snr"
UNMATCHED: Final = f"{OURS}/unmatched"
_STEPS: Final = f"{OURS}/steps-"
LONGEST_WALK: Final = LIMITS["balanced"].max_steps
KEPT: Final = 64  # pictures that are remembered

Value = TypeVar("Value")


def steps_name(steps: int) -> str:
    """Name of Editable-DeepSC with so many inversion steps."""
    return f"{_STEPS}{steps}"


def steps_of(name: str) -> int | None:
    """The inversion steps in a name, None where it says nothing of them."""
    return int(name.removeprefix(_STEPS)) if name.startswith(_STEPS) else None


class Memory:
    """Remembers results with the milliseconds that each stage of them took."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Any, dict[str, float]]] = {}

    def once(self, key: Hashable, watch: Watch, make: Callable[[Watch], Value]) -> Value:
        """`make(watch of its own)` the first time; its timings are booked on `watch` every time."""
        if key not in self._kept:
            own = Watch()
            value = make(own)
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = value, own.timings_ms
        value, spent = self._kept[key]
        for stage, ms in spent.items():
            watch.timings_ms[stage] = watch.timings_ms.get(stage, 0.0) + ms
        found: Value = value
        return found

    def clear(self) -> None:
        """Forget everything: the next face is another one."""
        self._kept.clear()


def fingerprint(picture: Tensor) -> bytes:
    """The identity of a tensor's values."""
    return hashlib.blake2b(picture.contiguous().numpy().tobytes(), digest_size=16).digest()


class RememberingEditor(Editor):
    """An editor that does the same work once."""

    def __init__(self, transmitter: Transmitter, memory: Memory | None = None) -> None:
        super().__init__(transmitter)
        self.memory = memory or Memory()

    def latent(
        self,
        face: Tensor,
        edit: Edit | None,
        quality: Quality,
        watch: Watch | None = None,
        snr_db: float | None = None,
    ) -> tuple[Tensor, Degrees | None]:
        if edit is None:  # an inversion is the same whatever the channel
            snr_db = None
        key = ("latent", self._kind, fingerprint(face), edit, quality, snr_db)
        return self.memory.once(
            key, watch or Watch(), lambda own: self._latent(face, edit, quality, own, snr_db)
        )

    def inverted(self, face: Tensor, quality: Quality, watch: Watch) -> Tensor:
        plain = super().inverted
        key = ("inverted", self._kind, fingerprint(face), quality)
        return self.memory.once(key, watch, lambda own: plain(face, quality, own))

    def draw(self, w: Tensor, watch: Watch | None = None) -> Tensor:
        plain = super().draw
        key = ("draw", fingerprint(w.cpu()))
        return self.memory.once(key, watch or Watch(), lambda own: plain(w, own))

    @property
    def _kind(self) -> str:
        return "as it is"

    def _latent(
        self,
        face: Tensor,
        edit: Edit | None,
        quality: Quality,
        watch: Watch,
        snr_db: float | None,
    ) -> tuple[Tensor, Degrees | None]:
        return super().latent(face, edit, quality, watch, snr_db)


class SteppedEditor(RememberingEditor):
    """Inverts by a given number of steps of Eq. (8), then edits as the quality says."""

    def __init__(self, transmitter: Transmitter, memory: Memory, steps: int) -> None:
        super().__init__(transmitter, memory)
        self.steps = steps

    @property
    def _kind(self) -> str:
        return f"{self.steps} steps"

    def inversion_steps(self, quality: Quality) -> int:
        """The given number, whatever the quality; it still limits the walk."""
        return self.steps


class UnmatchedEditor(RememberingEditor):
    """Edits by one walk of a predicted length; nothing looks at what came out of it."""

    @property
    def _kind(self) -> str:
        return "unmatched"

    def _latent(
        self,
        face: Tensor,
        edit: Edit | None,
        quality: Quality,
        watch: Watch,
        snr_db: float | None,
    ) -> tuple[Tensor, Degrees | None]:
        w, _ = super()._latent(face, None, quality, watch, None)
        if edit is None:
            return w, None
        nets, index = self.transmitter, edit.attribute.index
        with watch("edit"), torch.no_grad():
            scores = nets.seen(w)
            before = nets.guide.score_degrees(scores)[0]
            expected = edit.expected(int(before[index]))
            steps = 0
            if expected != int(before[index]):
                rise = aim_of(nets.guide.cuts[index].tolist(), expected) - float(scores[0, index])
                turn_rad = math.copysign(nets.fields.config.step_rad, rise)
                slope = max(nets.fields.config.slopes[index], 1e-6)  # of the score, per radian
                steps = min(LONGEST_WALK, max(1, round(abs(rise) / (slope * abs(turn_rad)))))
                for _ in range(steps):
                    w = nets.fields.step(w, edit.attribute, turn_rad)
        after = self.degrees(Editor.draw(self, w))
        return w, Degrees(
            after=after,
            before=tuple(int(d) for d in before),
            expected=expected,
            reached=after[index] == expected,
            match_steps=steps,
        )


class RawLatent(LatentLink):
    """Editable-DeepSC without adapters: the latent's own numbers on the air, as a frozen system."""

    def __init__(self, editor: Editor) -> None:
        self.plan, self.editor = PLANS[Scheme.EDITABLE_DEEPSC], editor

    @property
    def uses(self) -> int:
        return self.editor.transmitter.generator.config.w_dim // 2

    def encode(self, w: Tensor, snr_db: float) -> Tensor:
        """w [1, k] -> symbols [1, n]; there is nothing that could follow the SNR."""
        del snr_db
        return normalise_power(to_complex(w.cpu()))

    def decode(self, reception: Reception) -> Tensor:
        """What arrived -> w_hat [1, k]: |w|^2 = k, so unit power undoes itself."""
        x_hat, _ = equalise(reception)
        return (math.sqrt(2) * to_real(x_hat)).to(self.editor.transmitter.device)


class Candidates:
    """Everything that can be compared, by name; the networks are loaded once."""

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.bundle = bundle
        self.transmitter = Transmitter.from_bundle(bundle, device, precision)
        self.memory = Memory()
        self.editor = RememberingEditor(self.transmitter, self.memory)
        self._schemes = Schemes(self.editor, bundle)
        self._changed: dict[str, BaseScheme] = {}

    def __getitem__(self, name: str) -> BaseScheme:
        """The scheme `name`. Raises what `Schemes` raises, InvalidRequest for unknown changes."""
        if "/" not in name:
            return self._schemes[name]
        if name not in self._changed:
            self._changed[name] = self._change(name)
        return self._changed[name]

    def _change(self, name: str) -> BaseScheme:
        steps = steps_of(name)
        plan = PLANS[Scheme.EDITABLE_DEEPSC]
        if name == RAW:
            return RawLatent(self.editor)
        if name == PER_SNR:
            return LatentScheme(plan, self.editor, Adapters.from_bundle(self.bundle, NET_PER_SNR))
        if name == UNMATCHED:
            editor: Editor = UnmatchedEditor(self.transmitter, self.memory)
        elif steps is not None:
            editor = SteppedEditor(self.transmitter, self.memory, steps)
        else:
            raise InvalidRequest(
                f"scheme is {name!r}; expected {RAW}, {PER_SNR}, {UNMATCHED} or {_STEPS}N"
            )
        return LatentScheme(plan, editor, Adapters.from_bundle(self.bundle))


def follows_snr(scheme: BaseScheme) -> bool:
    """Whether what a transmitter sends depends on the SNR: not for digital schemes."""
    if isinstance(scheme, RawLatent):
        return False
    return not (isinstance(scheme, PictureScheme) and isinstance(scheme.carrier, CodedCarrier))


def parameters(bundle: Bundle) -> Mapping[str, int]:
    """Numbers in every net of a bundle (count)."""

    def pairs() -> Iterator[tuple[str, int]]:
        for net in bundle.nets:
            yield net, sum(tensor.numel() for tensor in bundle.tensors(net).values())

    return dict(pairs())
