"""Large passes are shared out among the cores: same results, one thread a share."""

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from shared.batching import Operation
from shared.compute import (
    SMALLEST_SHARE,
    in_precision,
    in_shares,
    lone_threads,
    most_in_a_pass,
    precision_of,
)

CPU = torch.device("cpu")


class Seen:
    """An operation that notes how it was run."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, int, str]] = []
        self._lock = threading.Lock()

    def __call__(self, items: Sequence[int]) -> list[int]:
        with self._lock:
            self.passes.append(
                (len(items), torch.get_num_threads(), threading.current_thread().name)
            )
        if 13 in items:
            raise ValueError("13 is not wanted")
        return [item * item for item in items]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", range(1, 12))
def test_every_item_comes_back_in_its_place(count: int) -> None:
    seen = Seen()
    operation = in_shares(Operation("square", seen, most=8), CPU)
    assert operation(list(range(20, 20 + count))) == [n * n for n in range(20, 20 + count)]
    assert sum(size for size, _, _ in seen.passes) == count


@pytest.mark.usefixtures("two_threads")
def test_a_share_has_a_thread_of_its_own() -> None:
    seen = Seen()
    in_shares(Operation("square", seen, most=8), CPU)([1, 2, 3, 4, 5])
    assert sorted((size, threads) for size, threads, _ in seen.passes) == [(2, 1), (3, 1)]
    assert torch.get_num_threads() == 2  # whoever asked computes on with all of them


@pytest.mark.usefixtures("two_threads")
def test_a_share_stays_alone_when_others_are_told_more() -> None:
    lone_threads.cache_clear()
    pool = lone_threads(1)
    pool.submit(lambda: None).result()  # it has started, and not yet computed
    torch.set_num_threads(2)
    assert pool.submit(torch.get_num_threads).result() == 1


@pytest.mark.usefixtures("two_threads")
def test_a_small_pass_is_not_torn_apart() -> None:
    seen = Seen()
    in_shares(Operation("square", seen, most=8), CPU)(list(range(2 * SMALLEST_SHARE - 1)))
    assert [(size, threads) for size, threads, _ in seen.passes] == [(2 * SMALLEST_SHARE - 1, 2)]


@pytest.mark.usefixtures("two_threads")
def test_an_error_is_raised_where_it_was_asked_for() -> None:
    operation = in_shares(Operation("square", Seen(), most=8), CPU)
    with pytest.raises(ValueError, match="13 is not wanted"):
        operation([10, 11, 12, 13])
    assert operation([1, 2, 3, 4]) == [1, 4, 9, 16]


def test_an_accelerator_takes_a_pass_whole() -> None:
    operation = Operation("square", Seen(), most=8)
    assert in_shares(operation, torch.device("cuda")) is operation


@pytest.mark.usefixtures("two_threads")
def test_pictures_are_the_same_beyond_rounding() -> None:
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 16, 3)
    pictures = [torch.randn(1, 3, 32, 32) for _ in range(8)]

    @torch.no_grad()
    def run(items: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(net(torch.cat(list(items))).split(1))

    plain = Operation("conv", run)
    for one, other in zip(in_shares(plain, CPU)(pictures), plain(pictures), strict=True):
        torch.testing.assert_close(one, other)


def test_a_precision_is_taken_as_chosen_or_as_the_device_multiplies_natively() -> None:
    assert precision_of("float32", CPU) == torch.float32
    assert precision_of("bfloat16", CPU) == torch.bfloat16
    able = torch.cpu.get_capabilities()
    native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    assert precision_of("auto", CPU) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.usefixtures("two_threads")
def test_only_the_operation_is_of_the_lower_precision_in_every_share() -> None:
    def product(items: Sequence[Tensor]) -> list[Tensor]:
        together = torch.stack(list(items)) @ torch.eye(2)
        return list(together)

    items = [torch.full((2,), 1 + 2**-12) for _ in range(5)]  # bfloat16 has 8 bits: 1
    plain = Operation("product", product)
    lower = in_shares(in_precision(plain, torch.bfloat16, CPU), CPU)
    assert all(row.dtype == torch.bfloat16 and row.tolist() == [1.0, 1.0] for row in lower(items))
    assert all(row.tolist() == items[0].tolist() for row in plain(items))
    same = in_precision(plain, torch.float32, CPU)
    assert all(row.dtype == torch.float32 and torch.equal(row, items[0]) for row in same(items))


@pytest.mark.usefixtures("two_threads")
def test_a_single_item_can_be_left_to_one_thread() -> None:
    seen = Seen()
    operation = in_shares(Operation("square", seen), CPU, 1)
    assert operation([4]) == [16]
    assert operation([2, 3]) == [4, 9]
    assert [(size, threads) for size, threads, _ in seen.passes] == [(1, 1)] * 3


@pytest.mark.usefixtures("two_threads")
def test_a_pass_has_eight_pictures_for_every_thread() -> None:
    assert most_in_a_pass(CPU) == 16
    assert most_in_a_pass(torch.device("cuda")) == 64
