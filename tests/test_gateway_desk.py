"""What is promised of an edit: one per key, dropped when nobody waits, kept when the gateway dies.

The link is a stand-in that a test holds back and lets go; the ledger and the files are real.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.answer import Order, Quality, StoredEdit
from gateway.desk import PHOTO_FIRST_S, Asked, Desk, Limits
from gateway.edits import status_of
from gateway.ledger import Ledger, State
from gateway.link import Caller, Link
from gateway.store import EditStore, Files
from shared.errors import (
    Busy,
    Conflict,
    EdscError,
    InstructionRefused,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from shared.settings import Settings
from shared.telemetry import Metrics
from tests.test_gateway_store import PHOTO, answer

FAST = Order("-", quality=Quality.FAST)


class HeldLink(Link):
    """Counts the edits that come through, and holds them until `free` is set."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.free = asyncio.Event()
        self.begun = asyncio.Event()
        self.seen: list[str] = []
        self.dropped: list[str] = []
        self.errors: list[EdscError] = []

    async def edit(self, edit_id: str, photo: bytes, order: Order, **_: Any) -> StoredEdit:
        assert photo == PHOTO
        self.seen.append(edit_id)
        self.begun.set()
        if self.errors:
            raise self.errors.pop(0)
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.dropped.append(edit_id)
            raise
        done = answer(edit_id)
        return StoredEdit(done.answer, dict.fromkeys(done.pictures, _png()), done.latent)


def _png() -> bytes:
    import io

    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()


def asked(**fields: Any) -> Asked:
    return Asked(**{"photo": PHOTO, "order": Order("-"), "caller": Caller("test"), **fields})


class World:
    """A database and a folder, and the desks around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1_000_000.0
        self.desks: list[Desk] = []

    def desk(self, link: Link, **limits: Any) -> Desk:
        ledger = Ledger.open(f"sqlite:///{self.folder}/e.sqlite3", secrets.token_hex(16))
        store = EditStore(ledger, Files(str(self.folder / "files")), clock=lambda: self.now)
        made = Desk(link, store, Metrics("gateway"), Limits(lease_s=30.0, **limits))
        self.desks.append(made)
        return made

    def kill(self, desk: Desk) -> None:
        """What a kill -9 does: nothing that it had begun goes on, nothing is written any more."""
        for job in desk._jobs.values():
            job.deleted = True  # so that the cancellation below writes nothing
            job.task.cancel()
        self.desks.remove(desk)


@pytest.fixture
async def world(tmp_path: Path) -> Any:
    made = World(tmp_path)
    yield made
    for desk in made.desks:
        await desk.close()


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")


async def state(desk: Desk, edit_id: str) -> State:
    return (await desk.store.entry(edit_id)).state


# ------------------------------------------------------------------------------------- idempotency


async def test_duplicates_at_once_are_one_edit(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)
    calls = [asyncio.create_task(desk.edit(asked(key="k", fingerprint="1"))) for _ in range(8)]
    await link.begun.wait()
    await asyncio.sleep(0.05)
    link.free.set()
    answers = {done.answer.model_dump_json() for done in await asyncio.gather(*calls)}
    assert len(answers) == 1
    assert len(link.seen) == 1
    again = await desk.edit(asked(key="k", fingerprint="1"))  # and an hour later
    assert again.answer.model_dump_json() in answers
    assert again.pictures["received"].startswith(b"\x89PNG")
    assert len(link.seen) == 1


async def test_duplicates_at_two_gateways_are_one_edit(world: World) -> None:
    first_link, second_link = HeldLink(), HeldLink()
    first, second = world.desk(first_link), world.desk(second_link)
    one = asyncio.create_task(first.edit(asked(key="k")))
    await first_link.begun.wait()
    two = asyncio.create_task(second.edit(asked(key="k")))
    await asyncio.sleep(0.1)
    first_link.free.set()
    done = await asyncio.gather(one, two)
    assert done[0].answer == done[1].answer
    assert (len(first_link.seen), len(second_link.seen)) == (1, 0)


async def test_a_key_with_another_request_is_refused(world: World) -> None:
    link = HeldLink()
    link.free.set()
    desk = world.desk(link)
    await desk.edit(asked(key="k", fingerprint="1"))
    with pytest.raises(InvalidRequest, match="another request"):
        await desk.edit(asked(key="k", fingerprint="2"))
    await desk.edit(asked(key="k", fingerprint="2", owner="somebody else"))
    assert len(link.seen) == 2


async def test_a_refusal_is_the_same_again_a_failure_is_tried_again(world: World) -> None:
    link = HeldLink()
    link.free.set()
    desk = world.desk(link)
    link.errors = [InstructionRefused("asks for nothing")]
    for _ in range(2):
        with pytest.raises(InstructionRefused, match="asks for nothing"):
            await desk.edit(asked(key="refused"))
    assert len(link.seen) == 1
    for error in (Unavailable("down"), Busy("full")):
        link.seen.clear()
        link.errors = [error]
        with pytest.raises(type(error)):
            await desk.edit(asked(key=error.kind))
        done = await desk.edit(asked(key=error.kind))
        assert link.seen == [done.answer.id] * 2


# ------------------------------------------------------------------------------------ hanging up


async def test_an_edit_that_nobody_waits_for_is_dropped(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)
    call = asyncio.create_task(desk.edit(asked()))
    await link.begun.wait()
    call.cancel()
    await until(lambda: link.dropped)
    (edit_id,) = link.seen
    await until(lambda: desk.in_flight == 0)
    entry = await desk.store.entry(edit_id)
    assert (entry.state, entry.rerunnable) == (State.FAILED, True)
    assert "rerun" in status_of(entry)["detail"]


async def test_an_edit_that_others_wait_for_goes_on(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)
    leaving = asyncio.create_task(desk.edit(asked(key="k")))
    await link.begun.wait()
    staying = asyncio.create_task(desk.edit(asked(key="k")))
    await asyncio.sleep(0.05)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert not link.dropped
    link.free.set()
    assert (await staying).answer.id == link.seen[0]


async def test_leaving_while_it_is_written_takes_it_back(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)
    call = asyncio.create_task(desk.edit(asked(key="once")))
    while not desk.in_flight:
        await asyncio.sleep(0)  # until the photo is being written
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await until(lambda: desk.in_flight == 0)
    await until(lambda: not desk.store.files.edits())
    assert sum((await desk.store.counts()).values()) == 0
    assert not link.seen


async def test_leaving_before_it_is_written_leaves_a_failed_one(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)
    call = asyncio.create_task(desk.edit(asked()))
    await link.begun.wait()  # sent, and not yet in the ledger
    assert sum((await desk.store.counts()).values()) == 0
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert desk.in_flight == 0
    assert (await desk.store.counts())[State.FAILED] == 1


async def test_what_cannot_be_kept_is_not_answered(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)

    def full(edit_id: str, files: Mapping[str, bytes]) -> None:
        raise Unavailable("the picture store took nothing: disk full")

    desk.store.files.write = full  # type: ignore[method-assign]
    call = asyncio.create_task(desk.edit(asked()))
    await link.begun.wait()
    link.free.set()
    with pytest.raises(Unavailable, match="disk full"):
        await call
    assert sum((await desk.store.counts()).values()) == 0


async def test_an_edit_for_later_needs_nobody(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)
    entry = await desk.submit(asked(detached=True))
    assert entry.state is State.RUNNING
    link.free.set()
    await until(lambda: desk.in_flight == 0)
    assert await state(desk, entry.id) is State.DONE


async def test_an_edit_for_later_is_patient(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.desk.RETRY_S", (0.01,))
    link = HeldLink()
    link.free.set()
    link.errors = [Busy("full"), Unavailable("restarting"), Busy("full")]
    desk = world.desk(link)
    entry = await desk.submit(asked(detached=True))
    await until(lambda: desk.in_flight == 0)
    assert await state(desk, entry.id) is State.DONE
    assert len(link.seen) == 4


class FullLink(HeldLink):
    """Turns everything away after `wait_s` seconds."""

    wait_s = 0.0

    async def edit(self, edit_id: str, photo: bytes, order: Order, **_: Any) -> StoredEdit:
        await asyncio.sleep(self.wait_s)
        raise Busy("full")


@pytest.mark.parametrize(("wait_s", "written"), [(0.0, 0), (2 * PHOTO_FIRST_S, 1)])
async def test_what_is_turned_away_at_once_is_never_written(
    world: World, wait_s: float, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = FullLink()
    link.wait_s = wait_s
    desk = world.desk(link)
    rows: list[bool] = []
    accept = desk.store.accept

    async def counted(*given: Any) -> Any:
        entry, is_new = await accept(*given)
        rows.append(is_new)
        return entry, is_new

    monkeypatch.setattr(desk.store, "accept", counted)
    with pytest.raises(Busy, match="full"):
        await desk.edit(asked())
    assert len(rows) == written
    assert sum((await desk.store.counts()).values()) == 0
    assert desk.store.files.edits() == []


async def test_an_edit_turned_away_leaves_nothing(world: World) -> None:
    link = HeldLink()
    link.errors = [Busy("full")]
    desk = world.desk(link, max_in_flight=1)
    with pytest.raises(Busy):
        await desk.edit(asked())
    assert sum((await desk.store.counts()).values()) == 0
    assert desk.store.files.edits() == []
    call = asyncio.create_task(desk.edit(asked(order=FAST)))
    await until(lambda: desk.in_flight)
    with pytest.raises(Busy, match="1 edits are under way; at most 1"):
        await desk.edit(asked())
    call.cancel()


async def test_one_like_it_is_turned_away_at_the_door_until_an_edit_ends(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)
    under_way = asyncio.create_task(desk.edit(asked(order=FAST)))
    await until(lambda: len(link.seen) == 1)
    link.errors = [Busy("full")]
    for _ in range(3):
        with pytest.raises(Busy, match="full"):
            await desk.edit(asked())
    assert len(link.seen) == 2  # the services were asked once
    other = asyncio.create_task(desk.edit(asked(order=FAST)))  # its queue is another one
    entry = await desk.submit(asked(detached=True))  # this one waits its turn
    await until(lambda: len(link.seen) == 4)
    link.free.set()
    await asyncio.gather(under_way, other)
    await until(lambda: desk.in_flight == 0)
    assert await state(desk, entry.id) is State.DONE
    assert (await desk.edit(asked())).answer.id == link.seen[-1]


async def test_the_door_does_not_stay_shut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.desk.FULL_S", 0.05)
    link = HeldLink()
    link.free.set()
    link.errors = [Busy("full")]
    desk = world.desk(link)
    with pytest.raises(Busy, match="full"):
        await desk.edit(asked())
    await asyncio.sleep(0.06)
    assert (await desk.edit(asked())).answer.id == link.seen[-1]


# -------------------------------------------------------------------------- the end of a gateway


async def test_an_accepted_edit_survives_the_gateway(world: World) -> None:
    dead_link, link = HeldLink(), HeldLink()
    dead = world.desk(dead_link)
    entry = await dead.submit(asked(detached=True))
    await dead_link.begun.wait()
    world.kill(dead)
    link.free.set()
    desk = world.desk(link)
    await desk._hold()
    assert await state(desk, entry.id) is State.RUNNING  # its lease is not over yet
    world.now += 31.0
    await desk._hold()
    await until(lambda: desk.in_flight == 0)
    kept = await desk.store.entry(entry.id)
    assert (kept.state, kept.attempts) == (State.DONE, 2)
    assert "after the gateway had stopped" in (kept.answer or "")


async def test_a_gateway_that_leaves_gives_back_what_it_has(world: World) -> None:
    leaving_link, link = HeldLink(), HeldLink()
    leaving = world.desk(leaving_link)
    entry = await leaving.submit(asked(detached=True))
    await leaving_link.begun.wait()
    await leaving.close()
    world.desks.remove(leaving)
    link.free.set()
    desk = world.desk(link)
    await desk._hold()
    await until(lambda: desk.in_flight == 0)
    kept = await desk.store.entry(entry.id)
    assert (kept.state, kept.attempts) == (State.DONE, 1)
    assert "stopped" not in (kept.answer or "")


async def test_an_edit_that_kills_gateways_is_given_up_and_can_be_run_again(world: World) -> None:
    entry = None
    for _ in range(2):
        link = HeldLink()
        desk = world.desk(link, max_attempts=2)
        if entry is None:
            entry = await desk.submit(asked(detached=True))
        else:
            await desk._hold()
        await link.begun.wait()
        world.kill(desk)
        world.now += 31.0
    assert entry is not None
    link = HeldLink()
    desk = world.desk(link, max_attempts=2)
    await desk._hold()
    kept = await desk.store.entry(entry.id)
    assert (kept.state, kept.rerunnable, link.seen) == (State.FAILED, True, [])
    told = status_of(kept)
    assert "stopped 2 times" in told["problem"]["detail"]
    assert "rerun" in told["detail"]
    link.free.set()
    await desk.rerun(entry.id, "", Caller("again"))
    await until(lambda: desk.in_flight == 0)
    assert await state(desk, entry.id) is State.DONE
    with pytest.raises(Conflict, match="done"):
        await desk.rerun(entry.id, "", Caller("again"))


async def test_a_refused_edit_cannot_be_run_again(world: World) -> None:
    link = HeldLink()
    link.errors = [InstructionRefused("asks for nothing")]
    desk = world.desk(link)
    entry = await desk.submit(asked(detached=True))
    await until(lambda: desk.in_flight == 0)
    with pytest.raises(Conflict, match="photo is no longer kept"):
        await desk.rerun(entry.id, "", Caller("again"))
    assert desk.store.files.edits() == []


async def test_deleting_stops_an_edit_under_way(world: World) -> None:
    link = HeldLink()
    desk = world.desk(link)
    entry = await desk.submit(asked(detached=True))
    await link.begun.wait()
    await desk.delete(entry.id, "")
    assert link.dropped == [entry.id]
    with pytest.raises(NotFound):
        await desk.store.entry(entry.id)
    assert desk.store.files.edits() == []


async def test_a_bug_is_a_failed_edit_not_a_lost_one(world: World) -> None:
    class Broken(HeldLink):
        async def edit(self, edit_id: str, photo: bytes, order: Order, **_: Any) -> StoredEdit:
            raise KeyError("secret")

    desk = world.desk(Broken())
    entry = await desk.submit(asked(detached=True))
    await until(lambda: desk.in_flight == 0)
    kept = await desk.store.entry(entry.id)
    assert (kept.state, kept.rerunnable) == (State.FAILED, True)
    assert "secret" not in (kept.problem or "")
