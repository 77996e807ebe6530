"""What the gateway has promised: one row per edit and per conversation, in SQLite or PostgreSQL.

::

                    accept --.
                             v
    accepted --begin--> running --finish--> done
       ^                   |-----fail-----> failed --reopen--> accepted
       '------release------'
               claim: accepted or running rows whose holder has not renewed its lease in time

A row is committed before anybody is told of it, so what has been promised survives the process. A
gateway holds the edits it works on by a lease that it keeps renewing; once the lease is over, the
gateway is taken for dead and another one, or the same one started again, takes the edit over. Every
change of state is one UPDATE that names the state and the holder it starts from: of two gateways
that reach for the same edit, one gets it.

Blocking; `gateway/store.py` calls it from threads. Times are seconds since the epoch.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from threading import Lock
from typing import Any, Final, Self

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    Update,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError

from gateway.database import open_engine
from shared.errors import Conflict, NotFound, Unavailable

SCHEMA: Final = 1  # goes up with every change of the tables


class State(StrEnum):
    """How far an edit is."""

    ACCEPTED = "accepted"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


_ID: Final = re.compile(r"[0-9a-f]{32}")
OPEN: Final = (State.ACCEPTED.value, State.RUNNING.value)

_TABLES: Final = MetaData()
_VERSION: Final = Table("edsc_schema", _TABLES, Column("version", Integer, primary_key=True))
_CONVERSATIONS: Final = Table(
    "conversations",
    _TABLES,
    Column("id", String(32), primary_key=True),
    Column("owner", String(64), nullable=False, index=True),
    Column("created_at", Float(53), nullable=False),
)
_EDITS: Final = Table(
    "edits",
    _TABLES,
    Column("id", String(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("conversation", String(32), ForeignKey("conversations.id"), index=True),
    Column("state", String(8), nullable=False),
    Column("request", Text, nullable=False),  # the order as JSON
    Column("answer", Text),  # the answer as JSON, once done
    Column("problem", Text),  # the problem as JSON, once failed
    Column("rerunnable", Integer, nullable=False, default=0),  # failed, and the photo is kept
    Column("attempts", Integer, nullable=False, default=0),
    Column("holder", String(32)),
    Column("lease_until", Float(53)),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64), nullable=False),  # SHA-256 of the request
    Column("bytes", BigInteger, nullable=False, default=0),
    Column("created_at", Float(53), nullable=False, index=True),
    Column("updated_at", Float(53), nullable=False),
    UniqueConstraint("owner", "idempotency_key"),
    CheckConstraint("state IN ('accepted', 'running', 'done', 'failed')"),
)


# Put together once: that costs as much as running them.
_TAKEN_IN: Final = insert(_EDITS)
_HELD: Final = update(_EDITS).where(
    _EDITS.c.id == bindparam("of"), _EDITS.c.holder == bindparam("by")
)
_RUNNING_HERE: Final = _HELD.where(_EDITS.c.state == State.RUNNING.value)
_OPEN_HERE: Final = _HELD.where(or_(*(_EDITS.c.state == state for state in OPEN)))


@dataclass(frozen=True)
class Entry:
    """One edit as the ledger has it.

    request, answer, problem: JSON. attempts: how often it was begun. rerunnable: failed, and can be
    run again. bytes: of its stored files.
    """

    id: str
    owner: str
    conversation: str | None
    state: State
    request: str
    answer: str | None
    problem: str | None
    rerunnable: bool
    attempts: int
    idempotency_key: str | None
    fingerprint: str
    bytes: int
    created_at: float
    updated_at: float


@dataclass(frozen=True)
class NewEdit:
    """What is known of an edit when it is accepted."""

    id: str
    request: str
    fingerprint: str
    owner: str = ""
    conversation: str | None = None
    idempotency_key: str | None = None
    bytes: int = 0

    def begun(self, now: float) -> Entry:
        """The row that `Ledger.accept` makes of it."""
        return Entry(
            **vars(self), state=State.RUNNING, answer=None, problem=None, rerunnable=False,
            attempts=1, created_at=now, updated_at=now,
        )  # fmt: skip


_FIELDS: Final = tuple(Entry.__dataclass_fields__)


def _entry(row: Row[Any]) -> Entry:
    values = {name: row._mapping[name] for name in _FIELDS}
    changes = {"state": State(values["state"]), "rerunnable": bool(values["rerunnable"])}
    return Entry(**{**values, **changes})


def _entries() -> Select[Any]:
    return select(*(_EDITS.c[name] for name in _FIELDS))


class Ledger:
    """The rows. holder: this gateway's name on the leases that it takes."""

    def __init__(self, engine: Engine, holder: str) -> None:
        self.engine = engine
        self.holder = holder
        # SQLite has one writer: threads that wait for each other here need not poll inside it, nor
        # fetch a connection each time; that takes as long as some of what they ask.
        self._turn = Lock()
        self._only: Connection | None = None

    @classmethod
    def open(cls, url: str, holder: str) -> Self:
        """Connect, and make the tables where there are none.

        Raises Unavailable when nobody answers, Conflict for tables of another version.
        """
        ledger = cls(open_engine(url), holder)
        try:
            ledger._prepare()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _prepare(self) -> None:
        """Make the tables where there are none, and check their version."""
        with self._transaction() as connection:
            if self.engine.dialect.name == "postgresql":
                # Two gateways that start at once: one makes the tables, the other waits.
                connection.execute(text("SELECT pg_advisory_xact_lock(5511702)"))
            _TABLES.create_all(connection)
            version = connection.scalar(select(_VERSION.c.version))
            if version is None:
                connection.execute(insert(_VERSION).values(version=SCHEMA))
            elif version != SCHEMA:
                raise Conflict(f"the database has schema {version}; expected {SCHEMA}")

    def close(self) -> None:
        """Hang up."""
        if self._only is not None:
            self._only.close()
        self.engine.dispose()

    @property
    def is_sqlite(self) -> bool:
        """One writer at a time."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            if self.is_sqlite:
                with self._turn:
                    self._only = self._only or self.engine.connect()
                    with self._only.begin():
                        yield self._only
            else:
                with self.engine.begin() as connection:
                    yield connection
        except IntegrityError:
            raise
        except DBAPIError as error:
            # The statement's parameters may be the user's words: only the cause is named.
            raise Unavailable(f"the database does not answer: {error.orig}") from None

    def ping(self) -> None:
        """Raise Unavailable when the database does not answer."""
        with self._transaction() as connection:
            connection.execute(select(1))

    # ------------------------------------------------------------------------------ the life of one

    def accept(self, new: NewEdit, now: float, lease_s: float) -> tuple[Entry, bool]:
        """Commit a new edit, held and begun by this gateway; gives it, and whether it is new.

        It is not where this owner has one with the same idempotency key: then that one is given.
        Raises NotFound for a conversation that this owner does not have.
        """
        entry = new.begun(now)
        values = dict(vars(entry), state=entry.state.value, rerunnable=0)
        values |= {"holder": self.holder, "lease_until": now + lease_s}
        if new.conversation is not None:
            self.conversation(new.conversation, new.owner)
        try:
            with self._transaction() as connection:
                connection.execute(_TAKEN_IN, values)
        except IntegrityError as error:
            if new.idempotency_key is not None and (
                there := self.by_key(new.owner, new.idempotency_key)
            ):
                return there, False
            # The conversation, or the edit that had this key, went in this very moment.
            raise Conflict(f"edit {new.id} could not be accepted: {error.orig}") from None
        return entry, True

    def _move(self, edit_id: str, held: Update, **values: Any) -> bool:
        """Change a row that this gateway holds, as `held` says; whether there was one."""
        computed = {name: values.pop(name) for name in ("attempts",) if name in values}
        with self._transaction() as connection:
            moved = connection.execute(
                held.values(**computed) if computed else held,
                {**values, "of": edit_id, "by": self.holder},
            )
        return moved.rowcount == 1

    def begin(self, edit_id: str, now: float, lease_s: float) -> bool:
        """accepted -> running, one attempt more. False: it is no longer ours, or deleted."""
        return self._move(
            edit_id,
            _OPEN_HERE,
            state=State.RUNNING.value,
            attempts=_EDITS.c.attempts + 1,
            updated_at=now,
            lease_until=now + lease_s,
        )

    def finish(self, edit_id: str, answer: str, size: int, now: float) -> bool:
        """running -> done. False: it is no longer ours, or deleted."""
        return self._move(
            edit_id,
            _RUNNING_HERE,
            state=State.DONE.value,
            answer=answer,
            problem=None,
            bytes=size,
            updated_at=now,
            holder=None,
            lease_until=None,
        )

    def fail(self, edit_id: str, problem: str, rerunnable: bool, size: int, now: float) -> bool:
        """-> failed. False: it is no longer ours, or deleted."""
        return self._move(
            edit_id,
            _OPEN_HERE,
            state=State.FAILED.value,
            problem=problem,
            rerunnable=int(rerunnable),
            bytes=size,
            updated_at=now,
            holder=None,
            lease_until=None,
        )

    def release(self, edit_id: str, now: float) -> bool:
        """Back to accepted, for whoever comes first; this gateway is leaving."""
        return self._move(
            edit_id,
            _OPEN_HERE,
            state=State.ACCEPTED.value,
            attempts=_EDITS.c.attempts - (_EDITS.c.state == State.RUNNING.value).cast(Integer),
            holder=None,
            lease_until=0.0,
            updated_at=now,
        )

    def renew(self, edit_ids: Sequence[str], now: float, lease_s: float) -> None:
        """Hold on to edits under way."""
        with self._transaction() as connection:
            connection.execute(
                update(_EDITS)
                .where(_EDITS.c.id.in_(edit_ids), _EDITS.c.holder == self.holder)
                .values(lease_until=now + lease_s)
            )

    def claim(self, now: float, lease_s: float, most: int) -> list[Entry]:
        """Take over edits whose lease is over, at most `most` of them, oldest first."""
        over = or_(_EDITS.c.lease_until.is_(None), _EDITS.c.lease_until < now)
        claimed = []
        with self._transaction() as connection:
            found = connection.execute(
                _entries()
                .where(_EDITS.c.state.in_(OPEN), over)
                .order_by(_EDITS.c.created_at)
                .limit(most)
            ).all()
            for row in found:
                taken = connection.execute(
                    update(_EDITS)
                    .where(_EDITS.c.id == row.id, _EDITS.c.state.in_(OPEN), over)
                    .values(holder=self.holder, lease_until=now + lease_s, updated_at=now)
                )
                if taken.rowcount == 1:
                    claimed.append(_entry(row))
        return claimed

    def reopen(self, edit_id: str, now: float, lease_s: float) -> bool:
        """failed -> accepted, held by this gateway. False: it is not there, or cannot be re-run."""
        with self._transaction() as connection:
            moved = connection.execute(
                update(_EDITS)
                .where(
                    _EDITS.c.id == edit_id,
                    _EDITS.c.state == State.FAILED.value,
                    _EDITS.c.rerunnable == 1,
                )
                .values(
                    state=State.ACCEPTED.value,
                    attempts=0,
                    holder=self.holder,
                    lease_until=now + lease_s,
                    updated_at=now,
                )
            )
        return moved.rowcount == 1

    def delete(self, edit_id: str) -> bool:
        """Forget a row; whether there was one."""
        with self._transaction() as connection:
            return connection.execute(delete(_EDITS).where(_EDITS.c.id == edit_id)).rowcount == 1

    # ---------------------------------------------------------------------------------- looking up

    def _one(self, query: Select[Any]) -> Entry | None:
        with self._transaction() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _entry(row)

    def get(self, edit_id: str, owner: str | None = None) -> Entry:
        """One edit. Raises NotFound, also for one of another owner; None: whosever it is."""
        query = _entries().where(_EDITS.c.id == edit_id)
        if owner is not None:
            query = query.where(_EDITS.c.owner == owner)
        found = self._one(query) if _ID.fullmatch(edit_id) else None
        if found is None:
            raise NotFound(f"no edit {edit_id!r} is kept here")
        return found

    def by_key(self, owner: str, key: str) -> Entry | None:
        """The edit that this owner sent with an idempotency key."""
        return self._one(_entries().where(_EDITS.c.owner == owner, _EDITS.c.idempotency_key == key))

    def existing(self, edit_ids: Sequence[str]) -> set[str]:
        """Those of `edit_ids` that have a row."""
        with self._transaction() as connection:
            rows = connection.execute(select(_EDITS.c.id).where(_EDITS.c.id.in_(edit_ids)))
            return {row.id for row in rows}

    def counts(self) -> dict[State, int]:
        """Number of edits in every state."""
        with self._transaction() as connection:
            rows = connection.execute(
                select(_EDITS.c.state, func.count()).group_by(_EDITS.c.state)
            ).all()
        found = {state: count for state, count in rows}
        return {state: int(found.get(state.value, 0)) for state in State}

    def outdated(self, before: float, most: int, most_bytes: int) -> list[str]:
        """Ids of closed edits to forget: from before `before`, or beyond what may be kept."""
        with self._transaction() as connection:
            rows = connection.execute(
                select(_EDITS.c.id, _EDITS.c.bytes, _EDITS.c.created_at)
                .where(_EDITS.c.state.not_in(OPEN))
                .order_by(_EDITS.c.created_at.desc(), _EDITS.c.id)
            ).all()
        old, held = [], 0
        for number, row in enumerate(rows):
            held += row.bytes
            # The newest stays, however large it is: somebody has just been told of it.
            if row.created_at < before or number >= most or (held > most_bytes and number > 0):
                old.append(str(row.id))
        return old

    # -------------------------------------------------------------------------------- conversations

    def converse(self, conversation_id: str, owner: str, now: float) -> None:
        """Begin a conversation."""
        with self._transaction() as connection:
            connection.execute(
                insert(_CONVERSATIONS).values(id=conversation_id, owner=owner, created_at=now)
            )

    def conversation(self, conversation_id: str, owner: str) -> tuple[float, list[Entry]]:
        """When a conversation began, and its edits in order. Raises NotFound."""
        missing = NotFound(f"no conversation {conversation_id!r} is kept here")
        if not _ID.fullmatch(conversation_id):
            raise missing
        with self._transaction() as connection:
            created_at = connection.scalar(
                select(_CONVERSATIONS.c.created_at).where(
                    _CONVERSATIONS.c.id == conversation_id, _CONVERSATIONS.c.owner == owner
                )
            )
            if created_at is None:
                raise missing
            rows = connection.execute(
                _entries()
                .where(_EDITS.c.conversation == conversation_id)
                .order_by(_EDITS.c.created_at, _EDITS.c.id)
            ).all()
        return float(created_at), [_entry(row) for row in rows]

    def end_conversation(self, conversation_id: str) -> None:
        """Forget a conversation that has no edits left."""
        with self._transaction() as connection:
            connection.execute(delete(_CONVERSATIONS).where(_CONVERSATIONS.c.id == conversation_id))

    def end_empty_conversations(self, before: float) -> None:
        """Forget the conversations begun before `before` that have no edits."""
        with self._transaction() as connection:
            connection.execute(
                delete(_CONVERSATIONS).where(
                    _CONVERSATIONS.c.created_at < before,
                    ~select(_EDITS.c.id)
                    .where(_EDITS.c.conversation == _CONVERSATIONS.c.id)
                    .exists(),
                )
            )
