"""The database behind a URL: SQLite with what durability and forgetting need, or PostgreSQL."""

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from shared.errors import InvalidRequest


def open_engine(url: str) -> Engine:
    """An engine for a SQLAlchemy URL; "postgresql://..." takes the driver that comes with us.

    Raises InvalidRequest for a URL that is none, or whose driver is not installed.
    """
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+pg8000")
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True, pool_size=8, max_overflow=0)
        options: dict[str, Any] = {"connect_args": {"check_same_thread": False, "timeout": 10.0}}
        if parsed.database in (None, "", ":memory:"):
            options["poolclass"] = StaticPool  # one connection, or every one would see its own
        else:
            Path(str(parsed.database)).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = create_engine(parsed, **options)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        # The URL itself may hold a password: it is not repeated here.
        raise InvalidRequest(
            f"the database URL cannot be used ({type(error).__name__}: {error}); expected for"
            ' instance "sqlite:///edits.sqlite3", or "postgresql://user:secret@host/name" after'
            ' pip install ".[postgres]"'
        ) from None

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # pysqlite would begin transactions too late by itself
        for pragma in (
            "journal_mode=WAL",
            # What is committed survives the process. A power cut takes the last moments, as it does
            # of the pictures beside the rows: nothing waits for those to be on the disk either.
            "synchronous=NORMAL",
            "foreign_keys=ON",
            "secure_delete=ON",  # what is deleted is overwritten, not just unlinked
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # two writers wait instead of failing

    return engine
