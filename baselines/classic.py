"""Channel coding of a byte string: CRC, 5G NR LDPC, 4-QAM, and what to do with lost blocks.

::

    bytes --cut--> blocks --CRC--> + 24 bits --LDPC--> k / r bits --4-QAM--> symbols [1, n]
                                                                                |
    bytes, ok per block <--check-- <--sum-product, 20 rounds-- soft bits <-- Reception

The layout is fixed by the number of bytes and the code rate, so nothing about it has to cross the
air: equal blocks of at most 1024 bits, CRC included (CRC24B where a message has several blocks,
CRC16 where it has one, as 3GPP 38.212 5.1, 5.2.2, 7.2.1), LDPC with rate matching and bit
interleaving (38.212 5.3.2, 5.4.2) by Sionna, each block on its own channel uses in turn.

A block whose CRC fails is lost: `Received.head` is what came before the first of them, which is the
part of a stream that a picture decoder can use. There is no retransmission.

Sionna takes six seconds to import, so that happens when the first link is made.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from baselines.coherent import BITS_PER_USE, qam4, soft_bits
from shared.errors import InvalidRequest, Unavailable
from shared.symbols import Reception

RATES: Final = (Fraction(1, 3), Fraction(1, 2), Fraction(2, 3), Fraction(3, 4))
BLOCK_BITS: Final = 1024  # of information, CRC included
ITERATIONS: Final = 20
_CRC16: Final = (16, 0x1021)  # 3GPP 38.212 5.1: D^16 + D^12 + D^5 + 1
_CRC24B: Final = (24, 0x800063)  # D^24 + D^23 + D^6 + D^5 + D + 1
_SMALLEST_INFORMATION: Final = 12  # bits, below which 38.212 codes otherwise


@dataclass(frozen=True)
class Received:
    """What the channel decoder found.

    data: every byte as decoded, wrong ones in lost blocks. ok: for each block, whether its CRC
    holds. head: the bytes before the first lost block. whole: no block is lost.
    """

    data: bytes
    ok: tuple[bool, ...]
    head: bytes

    @property
    def whole(self) -> bool:
        return all(self.ok)

    @property
    def errors(self) -> int:
        """Blocks lost (count)."""
        return sum(not ok for ok in self.ok)


class CodedLink:
    """Carries `capacity` bytes in a fixed number of channel uses, `uses`.

    capacity: bytes of one message. rate: information bits per coded bit, 1/5..0.95; the paper's are
    `RATES`. Raises InvalidRequest where 38.212 has no such code, Unavailable without Sionna.
    """

    def __init__(self, capacity: int, rate: Fraction) -> None:
        if capacity < 1 or not Fraction(1, 5) <= rate <= Fraction(19, 20):
            raise InvalidRequest(
                f"got {capacity} bytes at rate {rate}; expected at least 1 byte, rate 1/5..19/20"
            )
        self.capacity, self.rate = capacity, rate
        self.layout = layout(capacity, rate)
        self._encoder, self._decoder = _ldpc(self.layout.block_bits, self.layout.coded_bits)

    @property
    def uses(self) -> int:
        """Channel uses of one message (count)."""
        return self.layout.uses

    @torch.no_grad()
    def encode(self, data: bytes) -> Tensor:
        """Up to `capacity` bytes, padded with zeros -> symbols [1, uses] complex64, |x| = 1."""
        if len(data) > self.capacity:
            raise InvalidRequest(f"got {len(data)} bytes; expected at most {self.capacity}")
        coded: Tensor = self._encoder(self._blocks(data))  # [blocks, coded bits]
        return qam4(coded.reshape(1, -1))

    @torch.no_grad()
    def decode(self, reception: Reception) -> Received:
        """A Reception of one message -> its bytes, as far as they can be had.

        Raises InvalidRequest for another number of uses.
        """
        if tuple(reception.y.shape) != (1, self.uses):
            raise InvalidRequest(
                f"message has shape {list(reception.y.shape)}; expected [1, {self.uses}]"
            )
        soft = soft_bits(reception).reshape(self.layout.blocks, -1)  # [blocks, coded bits]
        # Sionna's ratios are ln p(1) / p(0).
        bits: Tensor = self._decoder(-soft)  # [blocks, block bits]
        packed = np.packbits(bits.to(torch.uint8).numpy(), axis=1)  # [blocks, block bytes]
        ok = tuple(_remainder(row.tobytes(), self.layout.crc) == 0 for row in packed)
        parts = [row.tobytes()[: self.layout.block_data] for row in packed]
        first_lost = ok.index(False) if False in ok else len(ok)
        return Received(
            data=b"".join(parts)[: self.capacity],
            ok=ok,
            head=b"".join(parts[:first_lost])[: self.capacity],
        )

    def bit_errors(self, sent: bytes, received: bytes) -> float:
        """Share of the message's bits that differ: what a tester knows, not a receiver."""
        padded = sent.ljust(self.capacity, b"\0")
        if len(received) != self.capacity:
            raise InvalidRequest(f"got {len(received)} bytes; expected {self.capacity}")
        differ = int.from_bytes(padded, "big") ^ int.from_bytes(received, "big")
        return differ.bit_count() / (8 * self.capacity)

    def _blocks(self, data: bytes) -> Tensor:
        """Bytes -> information bits with CRC [blocks, block bits] float32 of 0 and 1."""
        plan = self.layout
        padded = data.ljust(plan.blocks * plan.block_data, b"\0")
        rows = []
        for start in range(0, len(padded), plan.block_data):
            piece = padded[start : start + plan.block_data]
            check = _remainder(piece + bytes(plan.crc[0] // 8), plan.crc)
            rows.append(piece + check.to_bytes(plan.crc[0] // 8, "big"))
        packed = np.frombuffer(b"".join(rows), np.uint8).reshape(plan.blocks, -1)
        return torch.from_numpy(np.unpackbits(packed, axis=1)).float()


@dataclass(frozen=True)
class Layout:
    """How a message of some bytes is cut up.

    blocks: code blocks. block_data: bytes of the message in each. block_bits: information bits of a
    block with its CRC. coded_bits: bits of a block on the air. crc: (length, polynomial).
    """

    blocks: int
    block_data: int
    block_bits: int
    coded_bits: int
    crc: tuple[int, int]

    @property
    def uses(self) -> int:
        return self.blocks * self.coded_bits // BITS_PER_USE


def layout(capacity: int, rate: Fraction) -> Layout:
    """The layout of `capacity` bytes at `rate`: known at both ends, never sent.

    One block with CRC16 where that fits in `BLOCK_BITS`, else as few equal ones with CRC24B as do.
    """
    crc = _CRC16
    blocks = 1
    if 8 * capacity + crc[0] > BLOCK_BITS:
        crc = _CRC24B
        blocks = -(-8 * capacity // (BLOCK_BITS - crc[0]))
    block_data = -(-capacity // blocks)
    block_bits = 8 * block_data + crc[0]
    assert block_bits >= _SMALLEST_INFORMATION  # one byte and CRC16 are 24
    coded_bits = BITS_PER_USE * -(-block_bits * rate.denominator // (2 * rate.numerator))
    return Layout(blocks, block_data, block_bits, coded_bits, crc)


def capacity_of(uses: int, rate: Fraction) -> int:
    """Most bytes that one block with CRC16 carries in `uses` channel uses; 0 where none fits."""
    information = BITS_PER_USE * uses * rate.numerator // rate.denominator
    return max(0, (min(information, BLOCK_BITS) - _CRC16[0]) // 8)


def cbr_as_printed(bits_per_pixel: float, rate: Fraction) -> float:
    """The paper's figure for JPEG + LDPC + 4-QAM: bpp x rate / (2 x 3), 0.0389 for 0.7 and 1/3.

    A code of rate r takes 1 / r coded bits per bit, so the channel uses per value that are really
    needed are bpp / (2 r x 3), 0.35 in the same case: `shared.symbols.cbr` counts those.
    """
    return bits_per_pixel * float(rate) / (BITS_PER_USE * 3)


@lru_cache(maxsize=32)
def _ldpc(information: int, coded: int) -> tuple[Any, Any]:
    """Sionna's encoder and decoder for one block; on the CPU, where the bytes are."""
    try:
        from sionna.phy.fec.ldpc import LDPC5GDecoder, LDPC5GEncoder
    except ImportError as error:
        raise Unavailable(
            f"coded baselines need Sionna ({error}): pip install 'editable-deepsc[eval]'"
        ) from error
    encoder = LDPC5GEncoder(information, coded, num_bits_per_symbol=BITS_PER_USE, device="cpu")
    decoder = LDPC5GDecoder(encoder, hard_out=True, num_iter=ITERATIONS, device="cpu")
    return encoder, decoder


def _remainder(data: bytes, crc: tuple[int, int]) -> int:
    """Remainder of `data` by the CRC's polynomial: 0 for data that ends in its own check bits.

    3GPP 38.212 5.1: most significant bit first, register zero at the start, nothing inverted.
    """
    length, polynomial = crc
    table = _table(length, polynomial)
    mask, register = (1 << length) - 1, 0
    for byte in data:
        # The next byte enters from the right; what leaves on the left is folded back in.
        register = (register << 8) | byte
        register = (register & mask) ^ table[register >> length]
    return register


@lru_cache(maxsize=4)
def _table(length: int, polynomial: int) -> tuple[int, ...]:
    """x^length times every byte, modulo the polynomial."""
    rows = []
    for byte in range(256):
        value = byte
        for _ in range(length):
            value = (value << 1) ^ (polynomial | (1 << length) if value >> (length - 1) & 1 else 0)
        rows.append(value)
    return tuple(rows)
