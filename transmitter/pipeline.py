"""The transmitter: a photograph and a sentence in, power-normalised symbols out.

::

    photo --decode--> pixels --find, align--> face [1, 3, 128, 128] --invert--> w [1, 512]
    sentence --read--> edit ---------------------------------------------.      |
                                                                         match (JECC)
    symbols x [1, 256] <--channel encoder (knows the SNR)---- w' <--------------'
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.adapters import Adapters, ChannelDecoder, ChannelEncoder
from shared.attributes import Edit
from shared.batching import Item, Operation, Result, Steps, alone, ask_one
from shared.bundle import Bundle
from shared.compute import in_precision, in_shares, most_in_a_pass
from shared.errors import Cancelled, InvalidRequest, NoFaceFound
from shared.images import decode_photo, to_float
from shared.stylegan2 import Generator
from transmitter.editing import Arrival, Matching, Quality, Sight, arrival_of, matching
from transmitter.faces import FaceFinder, align
from transmitter.fields import Fields
from transmitter.inversion import InversionEncoder, Inverting, inverting
from transmitter.opinions import Opinions
from transmitter.regressor import Regressor
from transmitter.text import Reading, TextReader

INVERSION_STEPS: dict[Quality, int] = {"fast": 0, "balanced": 10, "paper": 110}
SMALLEST_ALIGNED = 16  # px: below, a square shows no face
NO_EDIT = "-"  # the sentence that sends a photograph as it is


@dataclass(frozen=True)
class Transmission:
    """What one message was made of.

    symbols: [1, 256] complex64, mean |x|^2 = 1. before, after: degrees 0..5 of the five attributes
    as the predictor sees them in the rendering before the edit, and after it as it will arrive on
    average; before and expected are None where nothing was edited. faces_found: 0 where the picture
    came aligned. aligned: [1, 3, 128, 128] what was inverted; sent: what a receiver behind a
    perfect channel would draw.
    """

    symbols: Tensor
    edit: Edit | None
    confidence: float | None
    before: tuple[int, ...] | None
    expected: int | None
    after: tuple[int, ...]
    reached: bool | None
    match_steps: int
    faces_found: int
    aligned: Tensor
    sent: Tensor
    timings_ms: dict[str, float]


class Transmitter:
    """Inference only: `transmitter(photo, sentence, snr_db=6.0)` gives the symbols."""

    def __init__(
        self,
        *,
        finder: FaceFinder,
        reader: TextReader,
        encoder: InversionEncoder,
        generator: Generator,
        guide: Opinions,
        fields: Fields,
        regressor: Regressor | None,
        channel_encoder: ChannelEncoder,
        channel_decoder: ChannelDecoder,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        """precision: of the products in convolutions; see `shared.compute.precision_of`."""
        self.device = torch.device(device)
        self.precision = precision
        self.finder = finder
        self.reader = reader
        self.encoder = encoder.to(self.device)
        self.generator = generator.to(self.device)
        self.guide = guide.to(self.device)
        self.predictor = self.guide.first
        self.fields = fields.to(self.device)
        self.regressor = None if regressor is None else regressor.to(self.device)
        self.channel_encoder = channel_encoder.to(self.device)
        self.channel_decoder = channel_decoder.to(self.device)  # the receiver's, to foresee it
        most = most_in_a_pass(self.device)
        self._read = Operation("read", _each(self.read), aside=True)
        self._decode = Operation("decode", _each(decode_photo), aside=True)
        self._align = Operation("align", _each(self._align_one), aside=True)

        def hastened(operation: Operation[Item, Result]) -> Operation[Item, Result]:
            return in_shares(in_precision(operation, precision, self.device), self.device)

        inverting = Inverting.of(self.encoder, self.generator, self.predictor, most=most)
        # What requests share, and the editor that the baselines run on its own.
        self.inversion = Inverting(
            encode=hastened(inverting.encode),
            see=hastened(inverting.see),
            descend=hastened(inverting.descend),
        )
        walks = Matching.of(self.generator, self.fields, self.guide, self.regressor, most)
        self.matching = replace(
            walks,
            walk=in_shares(walks.walk, self.device, 1),
            foresee=None if walks.foresee is None else in_shares(walks.foresee, self.device, 1),
            look=hastened(walks.look),
        )
        self._draw = hastened(Operation("draw", self._drawn, most, dear=True))
        self._code = Operation("code", self._encoded)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> "Transmitter":
        """Load every net of the transmitter. Raises BundleError where one is missing or broken."""
        adapters = Adapters.from_bundle(bundle)
        return cls(
            finder=FaceFinder.from_bundle(bundle),
            reader=TextReader.from_bundle(bundle),
            encoder=InversionEncoder.from_bundle(bundle),
            generator=Generator.from_bundle(bundle),
            guide=Opinions.from_bundle(bundle),
            fields=Fields.from_bundle(bundle),
            regressor=Regressor.from_bundle(bundle),
            channel_encoder=adapters.encoder,
            channel_decoder=adapters.decoder,
            device=device,
            precision=precision,
        )

    @property
    def image_size(self) -> int:
        return self.generator.config.image_size

    def __call__(
        self,
        photo: bytes | Tensor,
        instruction: str,
        *,
        snr_db: float,
        quality: Quality = "balanced",
    ) -> Tensor:
        """photo: bytes of an upload, or uint8 [3, H, W] -> symbols [1, 256] complex64."""
        return self.transmit(photo, instruction, snr_db=snr_db, quality=quality).symbols

    def read(self, instruction: str) -> Reading:
        """The edit that a sentence asks for. Raises InstructionRefused where it asks for none."""
        return self.reader(instruction)

    def transmit(
        self,
        photo: bytes | Tensor,
        instruction: str,
        *,
        snr_db: float,
        quality: Quality = "balanced",
        align: bool = True,
        cancelled: Callable[[], bool] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> Transmission:
        """Invert, edit and encode one photograph.

        instruction: a sentence, or "-" to send the face unedited. snr_db: what the channel is
        expected to be. align: find the largest face and cut it out; without, the picture must be
        square. Raises InvalidRequest and its kinds for what cannot be sent, Cancelled once
        `cancelled()` is true.
        """
        return alone(
            self.transmitting(
                photo,
                instruction,
                snr_db=snr_db,
                quality=quality,
                align=align,
                cancelled=cancelled,
                progress=progress,
            )
        )

    def transmitting(
        self,
        photo: bytes | Tensor,
        instruction: str,
        *,
        snr_db: float,
        quality: Quality = "balanced",
        align: bool = True,
        cancelled: Callable[[], bool] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> Steps[Transmission]:
        """`transmit` as a request in steps, which shares the networks' passes with others."""
        if quality not in INVERSION_STEPS:
            raise InvalidRequest(
                f"got quality {quality!r}, expected one of {', '.join(INVERSION_STEPS)}"
            )
        watch = _Watch(cancelled, progress)
        with watch("read"):  # first: a refused sentence should not cost an inversion
            reading = None
            if instruction.strip() != NO_EDIT:
                reading = yield from ask_one(self._read, instruction)
        pixels = photo  # [3, H, W] once decoded
        with watch("decode"):
            if isinstance(pixels, bytes):
                pixels = yield from ask_one(self._decode, pixels)
        with watch("align"):
            face, faces_found = yield from ask_one(self._align, (pixels, align))
        with watch("invert"):
            face = face.to(self.device)
            steps = INVERSION_STEPS[quality]
            w = yield from inverting(face, self.inversion, steps, cancelled=cancelled)
        found = None
        with watch("edit"):
            if reading is not None:
                found = yield from matching(
                    w,
                    reading.edit,
                    self.matching,
                    arrival=self.arrival(snr_db),
                    limits=quality,
                    cancelled=cancelled,
                    progress=watch.within("edit"),
                )
                w = found.w
        with watch("encode"):
            symbols = yield from ask_one(self._code, (w, snr_db))  # [1, 256]
        with watch("draw"):
            if found is None:
                look = yield from ask_one(self.matching.look, Sight(w))
                sent, after = look.image, self.guide.score_degrees(look.scores[None])[0]
            else:
                # What was seen is what arrives; without a step the two are the same.
                sent, after = found.image, found.after
                if found.steps:
                    sent = yield from ask_one(self._draw, w)
        return Transmission(
            symbols=symbols.cpu(),
            edit=None if reading is None else reading.edit,
            confidence=None if reading is None else reading.confidence,
            before=None if found is None else _degrees(found.before),
            expected=None if found is None else found.expected,
            after=_degrees(after),
            reached=None if found is None else found.reached,
            match_steps=0 if found is None else found.steps,
            faces_found=faces_found,
            aligned=face.cpu(),
            sent=sent.cpu(),
            timings_ms=watch.timings_ms(),
        )

    def seen(self, w: Tensor) -> Tensor:
        """Scores [1, 5] of the picture that a latent [1, 512] draws, as matching takes them."""
        (look,) = self.matching.look([Sight(w)])
        return look.scores[None]

    def draw(self, w: Tensor) -> Tensor:
        """The picture [B, 3, S, S] in [-1, 1] that latents w [B, 512] stand for."""
        return torch.cat(self._draw(w.to(self.device).split(1))).cpu()

    @torch.no_grad()
    def _drawn(self, latents: Sequence[Tensor]) -> Sequence[Tensor]:
        images = self.generator.synthesis(torch.cat(list(latents))).float().clamp(-1, 1)
        # Clones: a picture that is kept should not keep the others of its batch in memory.
        return [image.clone() for image in images.split(1)]

    def arrival(self, snr_db: float) -> Arrival:
        """How latents arrive on average at this SNR."""
        return arrival_of(self.channel_encoder, self.channel_decoder, snr_db)

    @torch.no_grad()
    def _encoded(self, items: Sequence[tuple[Tensor, float]]) -> Sequence[Tensor]:
        w = torch.cat([w for w, _ in items])  # [B, 512]
        snr_db = torch.tensor([snr_db for _, snr_db in items], device=w.device)  # [B]
        return self.channel_encoder(w, snr_db).split(1)  # type: ignore[no-any-return]

    def _align_one(self, photo: tuple[Tensor, bool]) -> tuple[Tensor, int]:
        return self.aligned(*photo)

    def aligned(self, pixels: Tensor, find: bool) -> tuple[Tensor, int]:
        """The face [1, 3, S, S] in [-1, 1], and how many faces the picture showed.

        pixels: uint8 [3, H, W]. find: look for the largest face; without, the picture is the face,
        and must be square. Raises NoFaceFound, InvalidRequest.
        """
        size = self.image_size
        height, width = pixels.shape[1:]
        if not find:
            if height != width or height < SMALLEST_ALIGNED:
                raise InvalidRequest(
                    f"got a {width} x {height} px picture with align=false, expected a square one"
                    f" of at least {SMALLEST_ALIGNED} px"
                )
            image = to_float(pixels)
            if height != size:
                image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
            return image.clamp(-1, 1), 0
        faces = self.finder(pixels)
        if not faces:
            raise NoFaceFound(
                f"found no face in this {width} x {height} px picture; expected a photo that shows"
                " one clearly (send align=false if it is an aligned face already)"
            )
        return align(pixels, faces[0].points, size), len(faces)


def _each(function: Callable[[Item], Result]) -> Callable[[Sequence[Item]], Sequence[Result]]:
    return lambda items: [function(item) for item in items]


def _degrees(found: Tensor) -> tuple[int, ...]:
    return tuple(int(degree) for degree in found.tolist())


class _Watch:
    """Times the stages, tells of them as they begin, and stops between them when asked."""

    def __init__(
        self,
        cancelled: Callable[[], bool] | None,
        progress: Callable[[str, float], None] | None,
    ) -> None:
        self._cancelled, self._progress = cancelled, progress
        self._milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled(f"dropped before {stage}: the caller is gone")
        if self._progress is not None:
            self._progress(stage, 0.0)
        started = time.perf_counter()
        yield
        self._milliseconds[stage] = 1000 * (time.perf_counter() - started)

    def within(self, stage: str) -> Callable[[float], None] | None:
        """For a stage that can tell how far it is, 0..1."""
        progress = self._progress
        if progress is None:
            return None
        return lambda done: progress(stage, done)

    def timings_ms(self) -> dict[str, float]:
        """Milliseconds of every stage, and their total."""
        return {**self._milliseconds, "total": sum(self._milliseconds.values())}
