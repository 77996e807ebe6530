"""Where edits are taken in, run, resumed and kept: nothing is promised that is not written first.

::

    POST --> busy? --> accept (photo and row are kept) --> run: link, mark, keep --> done
                          |                                     |
                          |  same Idempotency-Key: join it      '-- failed; run again on request
                          |-- Prefer: respond-async: 202 here
                          '-- one that is told of nothing before its answer is sent meanwhile
    every third of a lease: renew what runs, claim what a dead gateway left, run it again

An edit belongs to the clients that wait for it. When the last of them hangs up, it is dropped, to
the last hop; unless one of them asked for an answer later (detached). Whoever asks later finds out
what became of it: done, failed and why, or running.
"""

import asyncio
import json
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Final

from gateway.answer import EditAnswer, Order, Quality, StoredEdit, order_of, request_of
from gateway.edge import problem_of
from gateway.ledger import Entry, NewEdit, State
from gateway.link import Caller, Link, Progress
from gateway.marking import marked
from gateway.store import EditStore, answer_of
from shared.errors import (
    Busy,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    EdscError,
    InvalidRequest,
    NotFound,
    Unavailable,
    by_kind,
)
from shared.schemes import Scheme
from shared.telemetry import Metrics, logger

SWEEP_S: Final = 60.0
ORPHANS_S: Final = 600.0
POLL_S: Final = 0.25  # how often an edit that another gateway runs is looked at
# A thread that writes rows would hold up the one that sends the photo; and while nobody has been
# told of an edit, one that is turned away need not be written at all.
PHOTO_FIRST_S: Final = 0.05
# An order like one that was just turned away would be too, until an edit ends: here, where we see
# it, or at another gateway.
FULL_S: Final = 0.25
RETRY_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)  # between tries of an edit that nobody waits for


@dataclass(frozen=True)
class Limits:
    """max_in_flight: edits under way before Busy (each holds its photo in memory). lease_s: see
    `gateway/ledger.py`. max_attempts: starts of one edit by gateways that then died. patience_s:
    how long a detached edit is tried while services are busy or away."""

    max_in_flight: int = 64
    lease_s: float = 15.0
    max_attempts: int = 3
    patience_s: float = 300.0


@dataclass(frozen=True)
class Asked:
    """One request for an edit. owner: name of its API key, "" without. key: Idempotency-Key, None
    without. fingerprint: SHA-256 of the request. detached: answer later."""

    photo: bytes
    order: Order
    caller: Caller
    fingerprint: str = ""
    owner: str = ""
    key: str | None = None
    conversation: str | None = None
    detached: bool = False


@dataclass(frozen=True)
class _Taking:
    """A new edit on its way into the ledger. write: whether it gets there; nobody having said, it
    does after PHOTO_FIRST_S. row: what the ledger makes of it; Busy where it does not get there."""

    write: asyncio.Future[bool]
    row: asyncio.Future[tuple[Entry, bool]]

    def decide(self, write: bool) -> None:
        """Say so, where that is still open."""
        if not self.write.done():
            self.write.set_result(write)


@dataclass
class _Job:
    """One edit under way in this process. taking: of a new one, which the ledger takes in as
    running; None: one that has been kept before, and is still to be begun there."""

    entry: Entry
    caller: Caller
    detached: bool
    progress: Progress | None
    taking: _Taking | None = None
    waiting: int = 0
    deleted: bool = False
    task: asyncio.Task[StoredEdit] = field(init=False)


class Desk:
    """Takes edits in. `start` inside the event loop, `close` before it ends."""

    def __init__(
        self, link: Link, store: EditStore, metrics: Metrics, limits: Limits | None = None
    ) -> None:
        self.link = link
        self.store = store
        self.metrics = metrics
        self.limits = limits or Limits()
        self._jobs: dict[str, _Job] = {}
        self._reserved = 0  # taken in, and not yet a job
        self._full: dict[tuple[Scheme, Quality], tuple[float, str]] = {}  # until when, and why
        self._closing = False
        self._upkeep: list[asyncio.Task[None]] = []

    @property
    def in_flight(self) -> int:
        """Edits under way here."""
        return len(self._jobs) + self._reserved

    # ------------------------------------------------------------------------------ the desk's life

    async def start(self) -> None:
        """Take up what was left by whoever is gone, then keep house in the background."""
        every = self.limits.lease_s / 3.0
        self._upkeep = [
            asyncio.create_task(self._forever(every, self._hold)),
            asyncio.create_task(self._forever(SWEEP_S, self._sweep)),
            asyncio.create_task(self._forever(ORPHANS_S, self._orphans)),
        ]

    async def close(self) -> None:
        """Give back what is under way, for the next gateway, and end."""
        self._closing = True
        for task in self._upkeep:
            task.cancel()
        jobs = [job.task for job in self._jobs.values()]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*self._upkeep, *jobs, return_exceptions=True)
        await self.store.close()

    async def _forever(self, seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await work()
            except EdscError as error:
                logger().warning("upkeep failed", work=work.__name__, reason=str(error))
            except Exception:
                logger().exception("upkeep failed", work=work.__name__)
            await asyncio.sleep(seconds)

    async def _hold(self) -> None:
        """Renew the leases of what runs here; take over and run what nobody holds."""
        if self._jobs:
            await self.store.renew(list(self._jobs), self.limits.lease_s)
        room = self.limits.max_in_flight // 2 - self.in_flight
        if room > 0:
            for entry in await self.store.claim(self.limits.lease_s, room):
                await self._resume(entry)
        for state, count in (await self.store.counts()).items():
            self.metrics.kept(state.value, count)

    async def _sweep(self) -> None:
        if forgotten := await self.store.sweep():
            logger().info("forgotten", edits=forgotten)

    async def _orphans(self) -> None:
        if removed := await self.store.sweep_orphans():
            logger().warning("removed files that belonged to no edit", edits=removed)

    async def _resume(self, entry: Entry) -> None:
        caller = Caller(f"resumed-{entry.id}")
        log = {"edit": entry.id, "attempt": entry.attempts + 1, "request_id": caller.request_id}
        try:
            photo = await self.store.photo(entry.id)
        except NotFound as error:
            await self._fail(entry, error, caller, rerunnable=False, size=0)
            return
        if entry.attempts >= self.limits.max_attempts:
            stopped = Unavailable(
                f"the gateway stopped {entry.attempts} times while this edit was under way"
            )
            await self._fail(entry, stopped, caller, rerunnable=True, size=len(photo))
            logger().warning("given up", **log)
            return
        logger().info("resumed", **log)
        order = order_of(entry.request)
        self._begin(entry, Asked(photo, order, caller, detached=True), None)

    # ------------------------------------------------------------------------------------ taking in

    async def edit(self, asked: Asked, progress: Progress | None = None) -> StoredEdit:
        """Take an edit in and wait for it. When the caller is cancelled, so is the edit, unless
        others wait for it.

        Raises Busy when too many are under way, what the link raises, and for an idempotency key:
        InvalidRequest when it came with another request before, or the error of that edit.
        """
        taken = await self._take(asked, progress)
        if isinstance(taken, StoredEdit):
            return taken
        if isinstance(taken, _Job):
            return await self._wait(taken)
        return await self._elsewhere(taken)

    async def submit(self, asked: Asked) -> Entry:
        """Take an edit in; when this returns, it is kept and will be run."""
        taken = await self._take(asked, None)
        if isinstance(taken, StoredEdit):
            return await self.store.entry(taken.answer.id)
        if isinstance(taken, _Job):
            taken.detached = True
            return taken.entry
        return taken

    async def rerun(self, edit_id: str, owner: str, caller: Caller) -> Entry:
        """Run a failed edit again, in the background. Raises Conflict where that cannot be."""
        entry = await self.store.entry(edit_id, owner)
        self._check_room()
        if not await self.store.reopen(edit_id, self.limits.lease_s):
            why = "its photo is no longer kept" if entry.state is State.FAILED else "it is not"
            raise Conflict(
                f"edit {edit_id} is {entry.state.value}; expected one that failed and can be run"
                f" again: {why}"
            )
        photo = await self.store.photo(edit_id)
        order = order_of(entry.request)
        self._begin(entry, Asked(photo, order, caller, detached=True), None)
        return await self.store.entry(edit_id)

    async def delete(self, edit_id: str, owner: str) -> None:
        """Stop an edit if it is under way here, and remove all there is of it. Raises NotFound."""
        await self.store.entry(edit_id, owner)
        if (job := self._jobs.get(edit_id)) is not None:
            job.deleted = True
            job.task.cancel()
            await asyncio.gather(job.task, return_exceptions=True)
        await self.store.delete(edit_id, owner)

    def _check_room(self, order: Order | None = None) -> None:
        """Raise Busy where no edit is taken in, or none like `order` that will not wait."""
        if self.in_flight >= self.limits.max_in_flight:
            raise Busy(
                f"{self.in_flight} edits are under way; at most {self.limits.max_in_flight} may be"
            )
        if order is not None and (full := self._full.get((order.scheme, order.quality))):
            until, why = full
            if asyncio.get_running_loop().time() < until:
                raise Busy(why)

    async def _take(self, asked: Asked, progress: Progress | None) -> StoredEdit | _Job | Entry:
        """What there is to wait for: an edit done before, a job here, or a row elsewhere."""
        if asked.key is not None and (there := await self.store.by_key(asked.owner, asked.key)):
            return await self._again(there, asked, progress)
        self._check_room(None if asked.detached else asked.order)
        new = NewEdit(
            id=secrets.token_hex(16),
            request=request_of(asked.order),
            fingerprint=asked.fingerprint,
            owner=asked.owner,
            conversation=asked.conversation,
            idempotency_key=asked.key,
            bytes=len(asked.photo),
        )
        told_early = asked.detached or asked.key is not None or asked.conversation is not None
        write: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        taking = _Taking(write, asyncio.ensure_future(self._accept(new, asked.photo, write)))
        if not told_early:
            return self._begin(new.begun(self.store.clock()), asked, progress, taking)
        taking.decide(True)
        self._reserved += 1
        try:
            entry, is_new = await asyncio.shield(taking.row)
        except asyncio.CancelledError:
            # The client left while we wrote: take back what nobody has been told of.
            await asyncio.gather(taking.row, return_exceptions=True)
            if not taking.row.exception() and taking.row.result()[1]:
                await self.store.delete(new.id)
            raise
        finally:
            self._reserved -= 1
        if not is_new:
            return await self._again(entry, asked, progress)
        return self._begin(entry, asked, progress, taking)

    async def _accept(
        self, new: NewEdit, photo: bytes, write: asyncio.Future[bool]
    ) -> tuple[Entry, bool]:
        """Take an edit in when `write` says so, or has not said anything in time."""
        await asyncio.wait({write}, timeout=PHOTO_FIRST_S)
        if not write.done():
            write.set_result(True)
        if not write.result():
            raise Busy("turned away before it was taken in")
        return await self.store.accept(new, photo, self.limits.lease_s)

    async def _again(
        self, entry: Entry, asked: Asked, progress: Progress | None
    ) -> StoredEdit | _Job | Entry:
        """The idempotency key has been seen: the same edit again, in whatever state it is."""
        if entry.fingerprint != asked.fingerprint:
            raise InvalidRequest(
                "this Idempotency-Key came with another request before; expected the same photo"
                " and fields, or a new key"
            )
        if (job := self._jobs.get(entry.id)) is not None:
            return job
        if entry.state is State.DONE:
            return await self._kept(entry)
        if entry.state is State.FAILED:
            if not entry.rerunnable:
                raise error_of(entry)
            self._check_room()
            if await self.store.reopen(entry.id, self.limits.lease_s):
                if (job := self._jobs.get(entry.id)) is not None:
                    return job
                return self._begin(entry, replace(asked, order=order_of(entry.request)), progress)
        return await self.store.entry(entry.id)

    async def _kept(self, entry: Entry) -> StoredEdit:
        received = await self.store.picture(entry.id, "received")
        return StoredEdit(answer_of(entry), {"received": received})

    # ---------------------------------------------------------------------------------- running one

    def _begin(
        self,
        entry: Entry,
        asked: Asked,
        progress: Progress | None,
        taking: _Taking | None = None,
    ) -> _Job:
        job = _Job(entry, asked.caller, asked.detached, progress, taking)
        self._jobs[entry.id] = job
        job.task = asyncio.create_task(self._run(job, asked.photo, asked.order))
        job.task.add_done_callback(lambda task: self._ended(entry.id, task))
        return job

    def _ended(self, edit_id: str, task: asyncio.Task[StoredEdit]) -> None:
        self._jobs.pop(edit_id, None)
        # Looked at: whoever waits has it, and a detached one has its row.
        if task.cancelled() or not isinstance(task.exception(), Busy):
            self._full.clear()

    async def _wait(self, job: _Job) -> StoredEdit:
        job.waiting += 1
        try:
            return await asyncio.shield(job.task)
        except asyncio.CancelledError:
            if job.task.cancelled():  # not we: it was deleted, or the gateway is closing
                raise Unavailable("the edit was dropped before it was done") from None
            raise
        finally:
            job.waiting -= 1
            if job.waiting == 0 and not job.detached and not job.task.done():
                job.task.cancel()
                await asyncio.gather(job.task, return_exceptions=True)

    async def _elsewhere(self, entry: Entry) -> StoredEdit:
        """Wait for an edit that another gateway runs."""
        deadline = asyncio.get_running_loop().time() + self.link.deadline_s
        while entry.state not in (State.DONE, State.FAILED):
            if asyncio.get_running_loop().time() > deadline:
                raise DeadlineExceeded(
                    f"edit {entry.id} is still {entry.state.value} after {self.link.deadline_s:g} s"
                )
            await asyncio.sleep(POLL_S)
            entry = await self.store.entry(entry.id)
        if entry.state is State.FAILED:
            raise error_of(entry)
        return await self._kept(entry)

    async def _run(self, job: _Job, photo: bytes, order: Order) -> StoredEdit:
        entry = job.entry
        try:
            if job.taking is None and not await self.store.begin(entry.id, self.limits.lease_s):
                raise NotFound(f"edit {entry.id} was deleted before it began")
            done = self._finished(job, await self._through(job, photo, order))
            if job.taking is not None:
                job.taking.decide(True)
                await asyncio.shield(job.taking.row)
        except asyncio.CancelledError:
            await self._taken_in(job)
            if self._closing:
                await asyncio.shield(self.store.release(entry.id))
            elif not job.deleted:
                left = Cancelled("the client closed the connection before the answer was ready")
                await asyncio.shield(self._failed(job, left, len(photo)))
            raise
        except EdscError as error:
            if isinstance(error, Busy):
                until = asyncio.get_running_loop().time() + FULL_S
                # Its words alone: the error holds on to the photo.
                self._full[order.scheme, order.quality] = (until, str(error))
            await asyncio.shield(self._failed(job, error, len(photo)))
            raise
        except Exception:
            bug = EdscError(f"internal error of the gateway, request {job.caller.request_id}")
            await asyncio.shield(self._failed(job, bug, len(photo)))
            raise
        keeping = asyncio.ensure_future(self.store.finish(entry.id, done))
        try:
            await asyncio.shield(keeping)
        except asyncio.CancelledError:
            await asyncio.gather(keeping, return_exceptions=True)
            raise
        except EdscError as error:
            await self._failed(job, error, len(photo))
            raise
        self.metrics.edited("done")
        self.metrics.stages(done.answer.timings_ms)
        return done

    async def _through(self, job: _Job, photo: bytes, order: Order) -> StoredEdit:
        """The link; one that nobody waits for comes back when services are busy or away."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.limits.patience_s
        tries = 0
        while True:
            try:
                return await self.link.edit(
                    job.entry.id, photo, order, caller=job.caller, progress=job.progress
                )
            except (Busy, Unavailable):
                wait = RETRY_S[min(tries, len(RETRY_S) - 1)]
                if not job.detached or loop.time() + wait > until:
                    raise
                tries += 1
                await asyncio.sleep(wait)

    def _finished(self, job: _Job, done: StoredEdit) -> StoredEdit:
        """The answer with what only the gateway knows, the pictures with what they have to say."""
        changes: dict[str, Any] = {"conversation": job.entry.conversation}
        starts = job.entry.attempts + (job.taking is None)
        if starts > 1:
            note = f"run again after the gateway had stopped (start {starts})"
            changes["notes"] = [*done.answer.notes, note]
        answer: EditAnswer = done.answer.model_copy(update=changes)
        return StoredEdit(answer, marked(answer, done.pictures), done.latent)

    @staticmethod
    async def _taken_in(job: _Job, *, write: bool = True) -> None:
        """Wait until the ledger has the edit or has refused it: what comes next is told it too."""
        if job.taking is not None:
            job.taking.decide(write)
            await asyncio.shield(asyncio.gather(job.taking.row, return_exceptions=True))

    async def _failed(self, job: _Job, error: EdscError, size: int) -> None:
        entry = job.entry
        if isinstance(error, Busy) and not job.detached and entry.idempotency_key is None:
            # Turned away, and nobody can come back for it: as if it had never been taken in.
            self.metrics.edited("rejected")
            await self._taken_in(job, write=False)
            if job.taking is None or job.taking.write.result():
                await self.store.delete(entry.id)
            return
        await self._taken_in(job)
        rerunnable = not isinstance(error, InvalidRequest | NotFound)
        await self._fail(entry, error, job.caller, rerunnable=rerunnable, size=size)

    async def _fail(
        self, entry: Entry, error: EdscError, caller: Caller, *, rerunnable: bool, size: int
    ) -> None:
        told = json.dumps(problem_of(error, caller.request_id))
        self.metrics.edited("failed")
        try:
            await self.store.fail(entry.id, told, rerunnable=rerunnable, size=size)
        except EdscError as second:
            # The row says "running" until its lease is over; then it is run again.
            logger().error("cannot be written", edit=entry.id, reason=str(second))


def error_of(entry: Entry) -> EdscError:
    """The error that an edit failed with, as it was raised."""
    told = json.loads(entry.problem or "{}")
    slug = str(told.get("type", "")).rpartition(":")[2]
    kind = by_kind.get("".join(part.capitalize() for part in slug.split("-")), EdscError)
    return kind(str(told.get("detail", "the edit failed")))
