"""Carriers: a picture onto the air and off it again, with the one byte that an M1 sender adds.

::

    picture --JPEG or AVIF--> bytes --CRC, LDPC, 4-QAM--> symbols      CodedCarrier
    picture --learned codec--> symbols                                 DeepscCarrier

An M1 receiver edits what it got, so it is told the edit and the quality: one byte of 243 values
(`pack_command`). It is the first byte of a digital message, and 128 symbols of their own before an
analogue one. Both are counted.
"""

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from baselines.classic import CodedLink
from baselines.coherent import HEADER_USES, equalise, header_symbols, part, read_header
from baselines.deepsc import Deepsc
from baselines.editor import Watch
from baselines.pictures import PictureCodec
from shared.attributes import ATTRIBUTES, MAX_DEGREE, Edit
from shared.errors import InvalidRequest
from shared.symbols import Reception, noise_variance_to_snr_db
from transmitter.editing import Quality
from transmitter.pipeline import INVERSION_STEPS

_QUALITIES: Final[tuple[Quality, ...]] = tuple(INVERSION_STEPS)
_PER_ATTRIBUTE: Final = 3 * MAX_DEGREE + 1  # changes up, changes down, targets
_EDITS: Final = 1 + len(ATTRIBUTES) * _PER_ATTRIBUTE  # the first is none
COMMANDS: Final = _EDITS * len(_QUALITIES)


@dataclass(frozen=True)
class Cargo:
    """What a carrier put on the air.

    symbols: [1, n] complex64, unit power. picture: [1, 3, S, S] as a perfect channel would deliver
    it. data: the bytes that were coded, None for an analogue carrier.
    """

    symbols: Tensor
    picture: Tensor
    data: bytes | None = None


@dataclass(frozen=True)
class Arrival:
    """What a carrier got off the air.

    command: the byte of an M1 sender, None where none was sent or it is lost. data: every byte as
    decoded, None for an analogue carrier. blocks, block_errors: code blocks, and how many are lost.
    """

    picture: Tensor
    command: int | None = None
    data: bytes | None = None
    blocks: int = 0
    block_errors: int = 0


class Carrier(Protocol):
    """Carries a picture, and an M1 sender's command where it was made for one.

    uses: channel uses of a message. header_uses: those among them that carry the command alone.
    """

    @property
    def uses(self) -> int: ...

    @property
    def header_uses(self) -> int: ...

    def send(self, picture: Tensor, command: int | None, snr_db: float, watch: Watch) -> Cargo:
        """picture [1, 3, S, S] in [-1, 1] onto the air."""
        ...

    def receive(self, reception: Reception, watch: Watch) -> Arrival:
        """And off it again."""
        ...


class CodedCarrier:
    """A picture codec, and a channel code of fixed length for what it gives."""

    header_uses = 0  # the command is a byte of the message

    def __init__(self, codec: PictureCodec, link: CodedLink, *, with_command: bool) -> None:
        self.codec, self.link, self.with_command = codec, link, with_command
        if codec.capacity + with_command != link.capacity:
            raise InvalidRequest(
                f"codec fills {codec.capacity} bytes, command {int(with_command)}; expected"
                f" {link.capacity} together"
            )

    @property
    def uses(self) -> int:
        return self.link.uses

    def send(self, picture: Tensor, command: int | None, snr_db: float, watch: Watch) -> Cargo:
        """Digital: the SNR changes nothing. Raises RateUnreachable where the codec cannot."""
        del snr_db
        with watch("compress"):
            stream = self.codec.encode(picture)
            clean = self.codec.decode(stream, True)
        data = (b"" if command is None else bytes([command])) + stream
        with watch("encode"):
            symbols = self.link.encode(data)
        return Cargo(symbols, clean, data)

    def receive(self, reception: Reception, watch: Watch) -> Arrival:
        with watch("decode"):
            found = self.link.decode(reception)
        head, command = found.head, None
        if self.with_command and head:
            command, head = head[0], head[1:]
        with watch("expand"):
            picture = self.codec.decode(head, found.whole)
        return Arrival(picture, command, found.data, len(found.ok), found.errors)


class DeepscCarrier:
    """The learned codec; an M1 sender's command goes before it as a header of 128 symbols."""

    def __init__(self, net: Deepsc, size: int, *, with_command: bool) -> None:
        self.net, self.size = net, size
        self.header_uses = HEADER_USES if with_command else 0
        self.device = net.mean.device

    @property
    def uses(self) -> int:
        return self.header_uses + self.net.uses(self.size)

    @torch.no_grad()
    def send(self, picture: Tensor, command: int | None, snr_db: float, watch: Watch) -> Cargo:
        with watch("encode"):
            symbols = self.net.encode(picture.to(self.device), snr_db)  # [1, n]
        clean = self.net.decode(symbols, 60.0, snr_db, self.size).clamp(-1, 1).cpu()
        symbols = symbols.cpu()
        if command is not None:
            symbols = torch.cat((header_symbols(command), symbols), dim=1)
        return Cargo(symbols, clean)

    @torch.no_grad()
    def receive(self, reception: Reception, watch: Watch) -> Arrival:
        command = None
        with watch("decode"):
            if self.header_uses:
                command = read_header(part(reception, 0, self.header_uses))
            x_hat, snr_db = equalise(part(reception, self.header_uses, self.uses))
            sent_snr_db = noise_variance_to_snr_db(reception.noise_variance)
            picture = self.net.decode(
                x_hat.to(self.device),
                snr_db.to(self.device),
                sent_snr_db.to(self.device),
                self.size,
            )
        return Arrival(picture.clamp(-1, 1).cpu(), command)


def pack_command(edit: Edit | None, quality: Quality) -> int:
    """An edit and a quality as one byte, 0..242: quality x 81 + edit."""
    number = 0
    if edit is not None:
        if edit.target is not None:
            kind = 2 * MAX_DEGREE + edit.target
        else:
            assert edit.change is not None  # an Edit has one of the two
            kind = abs(edit.change) - 1 + (MAX_DEGREE if edit.change < 0 else 0)
        number = 1 + edit.attribute.index * _PER_ATTRIBUTE + kind
    return _QUALITIES.index(quality) * _EDITS + number


def unpack_command(command: int) -> tuple[Edit | None, Quality]:
    """The inverse of `pack_command`. Raises InvalidRequest outside of 0..242."""
    if not 0 <= command < COMMANDS:
        raise InvalidRequest(f"command is {command}; expected 0..{COMMANDS - 1}")
    level, number = divmod(command, _EDITS)
    if number == 0:
        return None, _QUALITIES[level]
    index, kind = divmod(number - 1, _PER_ATTRIBUTE)
    attribute = ATTRIBUTES[index]
    if kind >= 2 * MAX_DEGREE:
        return Edit(attribute, target=kind - 2 * MAX_DEGREE), _QUALITIES[level]
    size, down = kind % MAX_DEGREE + 1, kind >= MAX_DEGREE
    return Edit(attribute, change=-size if down else size), _QUALITIES[level]
