"""The channel code: its CRC and layout by arithmetic, its waterfall against Sionna's own chain.

Whatever needs Sionna itself is slow: importing it takes six seconds.
"""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from baselines.classic import (
    BLOCK_BITS,
    RATES,
    CodedLink,
    _remainder,
    capacity_of,
    cbr_as_printed,
    layout,
)
from channel_sim.channel import Channel, ChannelConfig
from shared.errors import InvalidRequest
from shared.symbols import Reception, average_power, cbr, snr_db_to_noise_variance

CRC24B, CRC16 = (24, 0x800063), (16, 0x1021)


def long_division(data: bytes, length: int, polynomial: int) -> int:
    """The remainder bit by bit, as in 3GPP 38.212 5.1: the oracle of the table-driven one."""
    value, bits = int.from_bytes(data, "big"), 8 * len(data)
    divisor = polynomial | 1 << length
    for shift in range(bits - length - 1, -1, -1):
        if value >> (shift + length) & 1:
            value ^= divisor << shift
    return value


@pytest.mark.parametrize("crc", [CRC24B, CRC16])
def test_crc_is_the_remainder_of_the_long_division(
    crc: tuple[int, int], generator: torch.Generator
) -> None:
    for count in (1, 2, 3, 40, 123):
        message = bytes(torch.randint(0, 256, (count,), generator=generator).tolist())
        padded = message + bytes(crc[0] // 8)
        check = _remainder(padded, crc)
        assert check == long_division(padded, *crc)
        assert _remainder(message + check.to_bytes(crc[0] // 8, "big"), crc) == 0


def test_crc16_of_the_textbook_message() -> None:
    """CRC-16/XMODEM has this polynomial, start and order: its check value is public."""
    assert _remainder(b"123456789" + bytes(2), CRC16) == 0x31C3


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("capacity", [1, 46, 126, 127, 1433, 26_214])
def test_layout_carries_the_bytes_and_no_block_is_too_long(capacity: int, rate: Fraction) -> None:
    plan = layout(capacity, rate)
    assert plan.blocks * plan.block_data >= capacity
    assert plan.block_bits == 8 * plan.block_data + plan.crc[0] <= BLOCK_BITS
    assert plan.crc == (CRC16 if plan.blocks == 1 else CRC24B)
    assert plan.coded_bits % 2 == 0
    assert 0 <= plan.coded_bits - plan.block_bits / rate < 2
    assert plan.uses == plan.blocks * plan.coded_bits // 2


@pytest.mark.parametrize("rate", RATES)
def test_256_uses_carry_so_many_bytes_and_not_one_more(rate: Fraction) -> None:
    most = capacity_of(256, rate)
    assert most == {3: 19, 2: 30}.get(rate.denominator, 0) or most in (40, 46)
    assert layout(most, rate).uses <= 256 < layout(most + 1, rate).uses
    assert capacity_of(10, rate) == 0


def test_the_papers_cbr_and_what_it_takes() -> None:
    """0.7 bpp, rate 1/3, 4-QAM: 0.0389 is the rate multiplied; dividing by it gives 0.35."""
    rate = Fraction(1, 3)
    assert cbr_as_printed(0.7, rate) == pytest.approx(0.0389, abs=5e-5)
    bare = 0.7 * 128 * 128 / float(rate) / 2
    assert cbr(round(bare), 128, 128).complex_uses == pytest.approx(0.35, abs=1e-4)
    honest = cbr(layout(1433, rate).uses, 128, 128)
    # CRC and the rounding to bytes and blocks cost 3 %.
    assert honest.complex_uses == pytest.approx(0.35 * 1.03, rel=5e-3)
    assert honest.paper == pytest.approx(2 * honest.complex_uses)


def test_codes_that_the_standard_has_not_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="1/10"):
        CodedLink(100, Fraction(1, 10))
    with pytest.raises(InvalidRequest, match="0 bytes"):
        CodedLink(0, Fraction(1, 2))


# ------------------------------------------------------------------------------------- with Sionna


def message(count: int, seed: int) -> bytes:
    draws = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(0, 256, (count,), generator=draws).tolist())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "crc"), [("CRC24B", CRC24B), ("CRC16", CRC16)])
def test_crc_is_sionnas(name: str, crc: tuple[int, int]) -> None:
    from sionna.phy.fec.crc import CRCEncoder

    data = message(73, 1)
    bits = torch.tensor([[byte >> (7 - i) & 1 for byte in data for i in range(8)]]).float()
    check = CRCEncoder(name, device="cpu")(bits)[0, -crc[0] :]
    value = int("".join(str(int(bit)) for bit in check), 2)
    assert _remainder(data + bytes(crc[0] // 8), crc) == value


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "config",
    [
        ChannelConfig("awgn"),
        ChannelConfig("rician"),
        ChannelConfig("rayleigh", "fast"),
        ChannelConfig("rician", csi="estimated"),
    ],
    ids=["awgn", "rician", "rayleigh-fast", "estimated"],
)
def test_bytes_come_through_a_good_channel(rate: Fraction, config: ChannelConfig) -> None:
    link, data = CodedLink(300, rate), message(300, 2)
    symbols = link.encode(data)
    assert symbols.shape == (1, link.uses)
    assert average_power(symbols) == pytest.approx(1.0)
    reception = Channel(config)(symbols, 20.0, torch.Generator().manual_seed(0))
    found = link.decode(reception)
    assert (found.whole, found.errors, found.data, found.head) == (True, 0, data, data)
    assert link.bit_errors(data, found.data) == 0.0


@pytest.mark.slow
def test_what_comes_before_the_first_lost_block_is_kept() -> None:
    """Blocks travel one after the other; noise on the fourth alone loses that one."""
    link, data = CodedLink(1000, Fraction(1, 2)), message(1000, 3)
    symbols = link.encode(data)
    per_block = link.uses // link.layout.blocks
    spoilt = symbols.clone()
    lost = slice(3 * per_block, 4 * per_block)
    spoilt[:, lost] = spoilt[:, lost].roll(7)
    one = torch.ones(1, 1, dtype=torch.complex64)
    found = link.decode(Reception(spoilt, one, None, torch.tensor([0.01])))
    assert [i for i, ok in enumerate(found.ok) if not ok] == [3]
    assert found.head == data[: 3 * link.layout.block_data]
    assert found.data[4 * link.layout.block_data :] == data[4 * link.layout.block_data :]
    assert 0 < link.bit_errors(data, found.data) < link.layout.block_data / 1000
    with pytest.raises(InvalidRequest, match="shape"):
        link.decode(Reception(spoilt[:, 1:], one, None, torch.tensor([0.01])))
    with pytest.raises(InvalidRequest, match="1001"):
        link.encode(bytes(1001))


@pytest.mark.slow
def test_the_same_seed_loses_the_same_blocks() -> None:
    link = CodedLink(1000, Fraction(1, 2))
    symbols = link.encode(message(1000, 4))
    found = [
        link.decode(Channel(ChannelConfig("awgn"))(symbols, 0.75, torch.Generator().manual_seed(s)))
        for s in (5, 5, 6)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
def test_the_waterfall_is_sionnas_within_half_a_db(rate: Fraction) -> None:
    """Blocks lost by our link against those of Sionna's mapper, channel and demapper.

    Both go from losing most blocks to losing few within half a decibel of each other.
    """
    from sionna.phy.channel import AWGN
    from sionna.phy.fec.ldpc import LDPC5GDecoder, LDPC5GEncoder
    from sionna.phy.mapping import Demapper, Mapper

    link = CodedLink(1433, rate)
    plan = link.layout
    encoder = LDPC5GEncoder(plan.block_bits, plan.coded_bits, num_bits_per_symbol=2, device="cpu")
    decoder = LDPC5GDecoder(encoder, hard_out=True, num_iter=20, device="cpu")
    mapper = Mapper("qam", 2, device="cpu")
    demapper = Demapper("app", "qam", 2, device="cpu")
    awgn = AWGN(device="cpu")
    channel = Channel(ChannelConfig("awgn"))
    draws = torch.Generator().manual_seed(11)

    def ours(snr_db: float, round_: int) -> float:
        found = link.decode(channel(link.encode(message(1433, round_)), snr_db, draws))
        return found.errors / plan.blocks

    def theirs(snr_db: float, _round: int) -> float:
        bits = torch.randint(0, 2, (plan.blocks, plan.block_bits), generator=draws).float()
        noise = torch.tensor(snr_db_to_noise_variance(snr_db))
        received: Tensor = awgn(mapper(encoder(bits)), noise)
        decided: Tensor = decoder(demapper(received, noise))
        return float((decided != bits).any(dim=1).float().mean())

    cliffs = []
    for lost in (ours, theirs):
        low, high = -3.0, 8.0  # most blocks are lost at `low`, few at `high`
        while high - low > 0.13:
            middle = (low + high) / 2
            share = sum(lost(middle, round_) for round_ in range(3)) / 3
            low, high = (middle, high) if share > 0.5 else (low, middle)
        cliffs.append((low + high) / 2)
    assert abs(cliffs[0] - cliffs[1]) <= 0.5
    # And where the literature has it: capacity of 4-QAM plus about a decibel.
    expected = {Fraction(1, 3): -1, Fraction(1, 2): 1, Fraction(2, 3): 3.2, Fraction(3, 4): 4.2}
    assert cliffs[0] == pytest.approx(expected[rate], abs=1.0)
