"""Two ways to make an edit, one answer: the pipelines in this process, or a gateway by URL.

::

    InProcess   photo --> Transmitter --> Channel --> Receiver --> answer + 3 PNGs   (no network)
    Remote      photo --> POST /v1/edits                       --> answer + 3 PNGs
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import httpx

from gateway.answer import (
    PICTURES,
    Bandwidth,
    ChannelCode,
    ChannelName,
    Degrees,
    EditAnswer,
    EditRead,
    Order,
    StoredEdit,
    images_at,
    notes_on,
)
from gateway.marking import marked
from shared.attributes import ATTRIBUTES
from shared.errors import DeadlineExceeded, EdscError, Unavailable, by_kind
from shared.schemes import PLANS, Scheme

if TYPE_CHECKING:  # torch takes seconds to import: `edsc --help` and Remote do without
    from baselines.editor import Degrees as SeenDegrees
    from baselines.schemes import BaseScheme, Schemes
    from shared.attributes import Edit
    from transmitter.pipeline import Transmission

PROBLEM_PREFIX: Final = "urn:edsc:problem:"


class Runner(Protocol):
    """Makes edits."""

    def edit(self, edit_id: str, photo: bytes, order: Order) -> StoredEdit:
        """One edit; raises EdscError."""
        ...


class InProcess:
    """The pipelines of a bundle, in this process.

    bundle: its folder, None for the shipped one. device: a torch device, or "auto". It multiplies
    in the precision that the services would take (EDSC_PRECISION).
    """

    def __init__(self, bundle: Path | None = None, device: str = "cpu") -> None:
        from receiver.pipeline import Receiver
        from shared.bundle import Bundle
        from shared.compute import precision_of, prepare
        from shared.settings import Settings
        from transmitter.pipeline import Transmitter

        opened = Bundle.open(bundle)
        self._digest = opened.digest
        place = prepare(device, 0)
        precision = precision_of(Settings().precision, place)
        self._transmitter = Transmitter.from_bundle(opened, place, precision)
        self._receiver = Receiver.from_bundle(opened, place, precision=precision)
        self._bundle = opened
        self._schemes: Schemes | None = None  # made when a baseline is first asked for

    def edit(self, edit_id: str, photo: bytes, order: Order) -> StoredEdit:
        """One edit. Same order and seed: the samples and pictures of the four processes (of as many
        threads each: bfloat16 shows how a sum was split, by a grey level)."""
        import torch

        from channel_sim.channel import Channel, ChannelConfig
        from shared.images import encode_png
        from shared.symbols import average_power, cbr

        start = perf_counter()
        baseline, stream_bits, header_uses = self._baseline(order.scheme), 0, 0
        if baseline is None:
            sent = self._transmitter.transmit(
                photo,
                order.instruction,
                snr_db=order.snr_db,
                quality=order.quality.value,
                align=order.align,
            )
        else:
            from baselines.pipeline import transmit

            sent, cargo = transmit(
                baseline,
                self._transmitter,
                photo,
                order.instruction,
                snr_db=order.snr_db,
                quality=order.quality.value,
                align=order.align,
            )
            header_uses = baseline.header_uses
            stream_bits = 0 if cargo.data is None else 8 * len(cargo.data)
        config = ChannelConfig(
            order.channel.value, order.fading.value, order.k_factor_db, order.csi.value
        )
        generator = torch.Generator().manual_seed(order.seed)
        with _timed() as propagating:
            reception = Channel(config)(sent.symbols.cpu(), order.snr_db, generator)
        with _timed() as receiving:
            got = None if baseline is None else baseline.receive(reception)
            image = self._receiver(reception) if got is None else got.image
        code = None
        if got is not None and got.blocks:
            code = ChannelCode(
                stream_bits=stream_bits, blocks=got.blocks, block_errors=got.block_errors
            )
        # Whoever edited knows the degrees: the sender, or with M1 the receiver.
        seen: Transmission | SeenDegrees = sent
        edit = sent.edit
        if got is not None and got.degrees is not None:
            seen, edit = got.degrees, got.edit
        height, width = image.shape[-2:]
        spent = cbr(sent.symbols.shape[1], height, width, pilots=config.pilot_uses)
        with _timed() as drawing:
            pngs = [encode_png(picture) for picture in (sent.aligned, sent.sent, image)]
        h = reception.h
        answer = EditAnswer(
            id=edit_id,
            instruction=order.instruction,
            edit=None if sent.edit is None else edit_read(sent.edit, sent.confidence or 0.0),
            degrees=_degrees(edit, seen),
            reached=seen.reached,
            match_steps=seen.match_steps,
            faces_found=sent.faces_found,
            notes=notes_on(
                edited=edit.attribute.value if edit else None,
                expected=seen.expected,
                after=seen.after[edit.attribute.index] if edit else None,
                reached=seen.reached,
                faces_found=sent.faces_found,
                code=code,
                edit_lost=(
                    sent.edit is not None
                    and got is not None
                    and PLANS[order.scheme].edit == "after"
                    and got.edit is None
                ),
            ),
            cbr=Bandwidth(
                paper=spent.paper,
                complex_uses=spent.complex_uses,
                uses=spent.uses,
                pilot_uses=config.pilot_uses,
                header_uses=header_uses,
            ),
            code=code,
            snr_db=order.snr_db,
            channel=order.channel,
            fading=order.fading,
            k_factor_db=order.k_factor_db if order.channel is ChannelName.RICIAN else None,
            csi=order.csi,
            fading_db=None if h is None else round(10.0 * float(average_power(h).log10()), 3),
            seed=order.seed,
            quality=order.quality,
            scheme=order.scheme,
            timings_ms=_timings(
                sent.timings_ms,
                pictures=drawing.ms,
                propagate=propagating.ms,
                receive=receiving.ms,
                total=(perf_counter() - start) * 1000.0,
            ),
            hops_ms={},
            images=images_at(edit_id),
            bundle_digest=self._digest,
        )
        pictures = marked(answer, dict(zip(PICTURES, pngs, strict=True)))
        return StoredEdit(answer, pictures)

    def _baseline(self, scheme: Scheme) -> "BaseScheme | None":
        """The scheme of a baseline, around the nets that are loaded; None for Editable-DeepSC."""
        if not PLANS[scheme].is_baseline:
            return None
        if self._schemes is None:
            from baselines.editor import Editor
            from baselines.schemes import Schemes

            self._schemes = Schemes(Editor(self._transmitter), self._bundle)
        return self._schemes[scheme]


class Remote:
    """A gateway at `url`. Use as a context manager, or close it."""

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        self._client = httpx.Client(base_url=url, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def edit(self, edit_id: str, photo: bytes, order: Order) -> StoredEdit:
        """One edit over REST. The gateway gives it an id of its own."""
        del edit_id
        fields = {name: _form_value(value) for name, value in vars(order).items()}
        done = self._ask("POST", "/v1/edits", files={"image": ("photo", photo)}, data=fields)
        answer = EditAnswer.model_validate_json(done.content)
        pictures = {}
        for name in PICTURES:
            pictures[name] = self._ask("GET", getattr(answer.images, name)).content
        return StoredEdit(answer, pictures)

    def _ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        try:
            response = self._client.request(method, path, **body)
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"{self._client.base_url} did not answer in time") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{self._client.base_url} does not answer: {error}") from error
        if response.is_success:
            return response
        raise error_of(response)


def error_of(response: httpx.Response) -> EdscError:
    """The exception behind a problem+json answer, as it left the service that raised it."""
    try:
        body = response.json()
        slug = str(body["type"]).removeprefix(PROBLEM_PREFIX)
        kind = "".join(part.capitalize() for part in slug.split("-"))
        return by_kind.get(kind, EdscError)(str(body["detail"]))
    except (ValueError, KeyError, TypeError):
        return EdscError(f"{response.request.url} answered {response.status_code}")


def edit_read(edit: "Edit", confidence: float) -> EditRead:
    """An Edit as the answer has it."""
    return EditRead(
        attribute=edit.attribute.value,
        mode=edit.mode,
        direction=edit.direction,
        value=edit.value,
        target=edit.target,
        confidence=round(confidence, 4),
        description=edit.describe(),
    )


class _timed:
    """Milliseconds that a block took."""

    ms = 0.0

    def __enter__(self) -> "_timed":
        self._start = perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.ms = (perf_counter() - self._start) * 1000.0


def _timings(transmit: Mapping[str, float], **others: float) -> dict[str, float]:
    """The transmitter's stages and ours; no queue and no overhead, there is no network."""
    stages = {name: ms for name, ms in transmit.items() if name != "total"}
    return {name: round(ms, 3) for name, ms in {**stages, **others}.items()}


def _degrees(edit: "Edit | None", seen: "Transmission | SeenDegrees") -> Degrees:
    names = [attribute.value for attribute in ATTRIBUTES]
    return Degrees(
        before=None if seen.before is None else dict(zip(names, seen.before, strict=True)),
        expected=(
            {edit.attribute.value: seen.expected}
            if edit is not None and seen.expected is not None
            else {}
        ),
        after=dict(zip(names, seen.after, strict=True)),
    )


def _form_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def runner(url: str | None, bundle: Path | None = None, device: str = "cpu") -> Iterator[Runner]:
    """Remote for a `url`, InProcess otherwise; closed on the way out."""
    if url is None:
        yield InProcess(bundle, device)
        return
    with Remote(url) as remote:
        yield remote
