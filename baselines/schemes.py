"""The schemes as callables: a face and an edit in, what a receiver ends up with out.

::

    scheme(face, edit, snr_db, channel, generator, quality) -> Outcome

              M2: edit                                     M1: edit
                   |                                            |
    face --------> o --> carrier --> x --> channel --> carrier --> o --> image
         transmit(...)                                 receive(...)

`transmit` and `receive` are the two ends; nothing passes between them but the symbols. What the
receiver must know crosses as symbols or is fixed by the scheme: an M1 receiver is told the edit and
the quality in one byte (`baselines.carriers`). The channel is an argument, any function of symbols,
SNR and a generator.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baselines.carriers import (
    COMMANDS,
    Carrier,
    CodedCarrier,
    DeepscCarrier,
    pack_command,
    unpack_command,
)
from baselines.classic import CodedLink, capacity_of, cbr_as_printed
from baselines.coherent import equalise
from baselines.deepsc import Deepsc
from baselines.editor import Degrees, Editor, Watch
from baselines.pictures import Avif, Jpeg, PictureCodec, bytes_at, jpeg_bits_per_pixel
from shared.adapters import AdapterConfig, Adapters, LinearCode
from shared.attributes import Edit
from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.schemes import PLANS, Plan, Scheme
from shared.symbols import Cbr, Reception, cbr, noise_variance_to_snr_db
from transmitter.editing import Quality
from transmitter.pipeline import Transmitter


class Air(Protocol):
    """A channel, for instance `channel_sim.channel.Channel`."""

    def __call__(self, x: Tensor, snr_db: float, generator: torch.Generator) -> Reception: ...


@dataclass(frozen=True)
class Sent:
    """The transmitter's end: symbols [1, n], the picture sent [1, 3, S, S], and what it knows.

    picture: what a receiver behind a perfect channel would see, before an M1 receiver edits it.
    degrees: of that picture; with the walk's before and expected where the edit came first. data:
    the bytes coded, None for analogue carriers. command: the header of an M1 sender.
    """

    symbols: Tensor
    picture: Tensor
    degrees: Degrees
    data: bytes | None = None
    command: int | None = None


@dataclass(frozen=True)
class Got:
    """The receiver's end.

    image: [1, 3, S, S] in [-1, 1], edited where that was the receiver's part. degrees: None unless
    it edited. edit: as its header said. data: bytes as decoded. decoded: no block was lost.
    """

    image: Tensor
    degrees: Degrees | None = None
    edit: Edit | None = None
    data: bytes | None = None
    command: int | None = None
    blocks: int = 0
    block_errors: int = 0

    @property
    def decoded(self) -> bool:
        return self.block_errors == 0


@dataclass(frozen=True)
class Outcome:
    """One picture through one scheme.

    image: [1, 3, S, S] in [-1, 1], what the receiver ends up with. sent: as a perfect channel would
    have delivered it; with M1, before the edit. cbr: real numbers per value (the paper's way of
    counting) and complex uses, CRC, headers, padding and pilots included. cbr_printed: the figure
    the paper has for such a scheme, if any. bits: of the picture's stream, headers included; None
    for analogue schemes, as is ber, the share of the message's bits that are wrong after channel
    decoding. blocks, block_errors: code blocks and lost ones. decoded: everything digital arrived:
    no block is lost, no command misread. degrees: of `image` where the receiver edited, else of
    `sent`. timings_ms: by stage, "total" their sum.
    """

    image: Tensor
    sent: Tensor
    cbr: Cbr
    cbr_printed: float | None
    bits: int | None
    ber: float | None
    blocks: int
    block_errors: int
    decoded: bool
    degrees: Degrees
    timings_ms: dict[str, float]


class BaseScheme:
    """What the two kinds of scheme share: the call, and the counting."""

    plan: Plan
    editor: Editor

    @property
    def name(self) -> str:
        return self.plan.scheme.value

    @property
    def uses(self) -> int:
        """Channel uses of a message, headers included, pilots not (count)."""
        raise NotImplementedError

    @property
    def header_uses(self) -> int:
        """Channel uses among them that carry an M1 sender's command alone (count)."""
        return 0

    @property
    def cbr_printed(self) -> float | None:
        """What the paper prints for such a scheme: 0.0104, 0.0389 or 0.0833 at 128 px; or None."""
        raise NotImplementedError

    def cbr(self, pilots: int = 0) -> Cbr:
        """Bandwidth of a message: every use counted."""
        size = self.editor.image_size
        body = self.uses - self.header_uses
        return cbr(body, size, size, pilots=pilots, header_uses=self.header_uses)

    def transmit(
        self,
        face: Tensor,
        edit: Edit | None,
        snr_db: float,
        quality: Quality,
        watch: Watch | None = None,
    ) -> Sent:
        """face [1, 3, S, S] in [-1, 1], aligned -> symbols. The SNR is the average one."""
        raise NotImplementedError

    def receive(self, reception: Reception, watch: Watch | None = None) -> Got:
        """A Reception of one message -> picture. InvalidRequest for another number of uses."""
        raise NotImplementedError

    def __call__(
        self,
        face: Tensor,
        edit: Edit | None,
        snr_db: float,
        channel: Air,
        generator: torch.Generator,
        quality: Quality = "balanced",
    ) -> Outcome:
        """One face through transmitter, channel and receiver.

        face: [1, 3, S, S] in [-1, 1], aligned. edit: None sends it unedited. snr_db: Es/N0 averaged
        over fading, -20..40. generator: the only randomness, used by `channel` alone: same seed,
        same outcome. Raises RateUnreachable where a picture codec has no stream that small.
        """
        watch = Watch()
        sent = self.transmit(face, edit, snr_db, quality, watch)
        with watch("propagate"):
            reception = channel(sent.symbols, snr_db, generator)
        got = self.receive(reception, watch)
        pilots = 0 if reception.pilots is None else reception.pilots.shape[1]
        return Outcome(
            image=got.image,
            sent=sent.picture,
            cbr=self.cbr(pilots),
            cbr_printed=self.cbr_printed,
            bits=None if sent.data is None else 8 * len(sent.data),
            ber=self.bit_error_rate(sent, got),
            blocks=got.blocks,
            block_errors=got.block_errors,
            decoded=got.decoded and got.command == sent.command,
            degrees=got.degrees or sent.degrees,
            timings_ms={**watch.timings_ms, "total": sum(watch.timings_ms.values())},
        )

    def bit_error_rate(self, sent: Sent, got: Got) -> float | None:
        """Share of wrong bits after channel decoding; None for analogue schemes."""
        del sent, got
        return None


class LatentLink(BaseScheme):
    """The edited latent as symbols, and back: `encode` and `decode` say how.

    adapted: whether adapters do it, so that the editor can foresee what arrives.
    """

    adapted = False

    @property
    def cbr_printed(self) -> float | None:
        return self.cbr().paper if self.plan.scheme is Scheme.EDITABLE_DEEPSC else None

    def encode(self, w: Tensor, snr_db: float) -> Tensor:
        """w [1, k] -> symbols [1, n] of mean power 1, on the CPU."""
        raise NotImplementedError

    def decode(self, reception: Reception) -> Tensor:
        """What arrived -> w_hat [1, k] on the editor's device."""
        raise NotImplementedError

    def transmit(
        self,
        face: Tensor,
        edit: Edit | None,
        snr_db: float,
        quality: Quality,
        watch: Watch | None = None,
    ) -> Sent:
        watch = watch or Watch()
        foreseen_db = snr_db if self.adapted else None
        w, degrees = self.editor.latent(face, edit, quality, watch, foreseen_db)
        with watch("encode"), torch.no_grad():
            symbols = self.encode(w, snr_db)
        picture = self.editor.draw(w)
        return Sent(symbols, picture, degrees or Degrees(after=self.editor.degrees(picture)))

    def receive(self, reception: Reception, watch: Watch | None = None) -> Got:
        watch = watch or Watch()
        _check_uses(reception, self.uses)
        with watch("decode"), torch.no_grad():
            w_hat = self.decode(reception)
        return Got(self.editor.draw(w_hat, watch))


class LatentScheme(LatentLink):
    """A joint source-channel code of adapters: Editable-DeepSC, and its closed form."""

    adapted = True

    def __init__(self, plan: Plan, editor: Editor, adapters: Adapters) -> None:
        self.plan, self.editor = plan, editor
        self.adapters = adapters.to(editor.transmitter.device).eval().requires_grad_(False)

    @property
    def uses(self) -> int:
        return self.adapters.config.latent // 2

    def encode(self, w: Tensor, snr_db: float) -> Tensor:
        symbols: Tensor = self.adapters.encoder(w, snr_db).cpu()
        return symbols

    def decode(self, reception: Reception) -> Tensor:
        device = self.editor.transmitter.device
        x_hat, snr_db = equalise(reception)
        sent_snr_db = noise_variance_to_snr_db(reception.noise_variance)
        w_hat: Tensor = self.adapters.decoder(
            x_hat.to(device), snr_db.to(device), sent_snr_db.to(device)
        )
        return w_hat


class PictureScheme(BaseScheme):
    """The editor on its own, before (M2) or after (M1) a carrier of pictures."""

    def __init__(
        self, plan: Plan, editor: Editor, carrier: Carrier, cbr_printed: float | None
    ) -> None:
        self.plan, self.editor, self.carrier = plan, editor, carrier
        self._cbr_printed = cbr_printed

    @property
    def uses(self) -> int:
        return self.carrier.uses

    @property
    def header_uses(self) -> int:
        return self.carrier.header_uses

    @property
    def cbr_printed(self) -> float | None:
        return self._cbr_printed

    def transmit(
        self,
        face: Tensor,
        edit: Edit | None,
        snr_db: float,
        quality: Quality,
        watch: Watch | None = None,
    ) -> Sent:
        watch = watch or Watch()
        command = None
        picture, degrees = face, None
        if self.plan.edit == "after":
            command = pack_command(edit, quality)
        else:
            picture, degrees = self.editor(face, edit, quality, watch)
        cargo = self.carrier.send(picture, command, snr_db, watch)
        degrees = degrees or Degrees(after=self.editor.degrees(picture))
        return Sent(cargo.symbols, cargo.picture, degrees, cargo.data, command)

    def receive(self, reception: Reception, watch: Watch | None = None) -> Got:
        watch = watch or Watch()
        _check_uses(reception, self.uses)
        arrival = self.carrier.receive(reception, watch)
        image, degrees, edit = arrival.picture, None, None
        # Without a command there is nothing to do; noise may also read as one that does not exist.
        if arrival.command is not None and arrival.command < COMMANDS:
            edit, quality = unpack_command(arrival.command)
            if edit is not None:
                image, degrees = self.editor(image, edit, quality, watch)
        return Got(
            image=image,
            degrees=degrees,
            edit=edit,
            data=arrival.data,
            command=arrival.command,
            blocks=arrival.blocks,
            block_errors=arrival.block_errors,
        )

    def bit_error_rate(self, sent: Sent, got: Got) -> float | None:
        if not isinstance(self.carrier, CodedCarrier) or sent.data is None or got.data is None:
            return None
        return self.carrier.link.bit_errors(sent.data, got.data)


class Schemes(Mapping[str, BaseScheme]):
    """All schemes of a bundle by name; each is made when it is first asked for.

    `schemes["jpeg-ldpc+edit"]` raises InvalidRequest for a name that does not exist, BundleError
    for `deepsc` without its net, Unavailable for LDPC without Sionna.
    """

    def __init__(self, editor: Editor, bundle: Bundle) -> None:
        self.editor, self.bundle = editor, bundle
        self._made: dict[Scheme, BaseScheme] = {}
        self._adapters: Adapters | None = None
        self._deepsc: Deepsc | None = None

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> "Schemes":
        """Load the transmitter's nets, which every scheme edits with.

        Raises BundleError where one is missing or broken.
        """
        return cls(Editor(Transmitter.from_bundle(bundle, device, precision)), bundle)

    def __getitem__(self, name: str) -> BaseScheme:
        scheme = Scheme.parse(name)
        if scheme not in self._made:
            self._made[scheme] = self._make(PLANS[scheme])
        return self._made[scheme]

    def __iter__(self) -> Iterator[str]:
        return (scheme.value for scheme in Scheme)

    def __len__(self) -> int:
        return len(Scheme)

    def __contains__(self, name: object) -> bool:
        return name in set(Scheme)

    def _make(self, plan: Plan) -> BaseScheme:
        if plan.carrier == "latent":
            trained = self._latent_code()
            code = trained if plan.scheme is Scheme.EDITABLE_DEEPSC else closed_form(trained)
            return LatentScheme(plan, self.editor, code)
        size, with_command = self.editor.image_size, plan.edit == "after"
        if plan.carrier == "deepsc":
            if self._deepsc is None:
                net = Deepsc.from_bundle(self.bundle)
                self._deepsc = net.to(self.editor.transmitter.device)
            carrier = DeepscCarrier(self._deepsc, size, with_command=with_command)
            printed = cbr(self._deepsc.uses(size), size, size).paper
            return PictureScheme(plan, self.editor, carrier, printed)
        assert plan.rate is not None  # every coded carrier has one
        codec: PictureCodec
        in_paper: float | None = None
        if plan.carrier == "jpeg":
            bits_per_pixel = jpeg_bits_per_pixel(size)
            capacity = bytes_at(bits_per_pixel, size)
            codec = Jpeg(size, capacity - with_command)
            in_paper = cbr_as_printed(bits_per_pixel, plan.rate)
        else:
            uses = self._latent_code().config.latent // 2
            capacity = capacity_of(uses, plan.rate)
            codec = Avif(size, capacity - with_command)
        link = CodedLink(capacity, plan.rate)
        coded = CodedCarrier(codec, link, with_command=with_command)
        return PictureScheme(plan, self.editor, coded, in_paper)

    def _latent_code(self) -> Adapters:
        if self._adapters is None:
            self._adapters = Adapters.from_bundle(self.bundle)
        return self._adapters


def closed_form(trained: Adapters) -> Adapters:
    """The linear code that the adapters were trained from, without what training added.

    Principal components, water-filled power, LMMSE; for adapters that were never trained, LMMSE of
    white latents.
    """
    near, far = trained.encoder, trained.decoder
    code = LinearCode(near.mean, near.analysis, far.synthesis, near.spectrum)
    return Adapters(AdapterConfig(trained.config.latent), code)


def _check_uses(reception: Reception, uses: int) -> None:
    if tuple(reception.y.shape) != (1, uses):
        raise InvalidRequest(f"message has shape {list(reception.y.shape)}; expected [1, {uses}]")
