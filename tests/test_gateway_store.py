"""Rows and files: what survives, what is forgotten, who gets an edit; on every kind of store."""

import os
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from gateway.answer import (
    Bandwidth,
    ChannelName,
    Csi,
    Degrees,
    EditAnswer,
    Fading,
    Quality,
    StoredEdit,
    images_at,
)
from gateway.ledger import SCHEMA, Ledger, NewEdit, State
from gateway.store import EditStore, Files, Retention, fingerprint_of, state_folder
from shared.errors import Conflict, InvalidRequest, NotFound, Unavailable
from shared.schemes import Scheme
from shared.settings import Settings

PHOTO = b"a face"
LEASE_S = 10.0


def new(**fields: Any) -> NewEdit:
    return NewEdit(**{"id": secrets.token_hex(16), "request": "{}", "fingerprint": "f", **fields})


def answer(edit_id: str, size: int = 4) -> StoredEdit:
    done = EditAnswer(
        id=edit_id,
        instruction="-",
        edit=None,
        degrees=Degrees(before=None, expected={}, after={"beard": 2}),
        reached=None,
        match_steps=0,
        faces_found=0,
        notes=[],
        cbr=Bandwidth(paper=0.0104, complex_uses=0.0052, uses=256, pilot_uses=0),
        snr_db=6.0,
        channel=ChannelName.AWGN,
        fading=Fading.BLOCK,
        k_factor_db=None,
        csi=Csi.PERFECT,
        fading_db=0.0,
        seed=1,
        quality=Quality.FAST,
        scheme=Scheme.EDITABLE_DEEPSC,
        timings_ms={"total": 1.0},
        hops_ms={},
        images=images_at(f"/v1/edits/{edit_id}"),
    )
    pictures = {name: name.encode() + bytes(size) for name in ("aligned", "sent", "received")}
    return StoredEdit(done, pictures, latent=b"latent")


# ----------------------------------------------------------------------------------- kinds of store


@contextmanager
def postgres() -> Iterator[str]:
    """A real PostgreSQL server of Debian's packages, on a free port; gives its URL."""
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if (initdb is None or server is None) and found:
        initdb, server = (str(found[-1] / name) for name in ("initdb", "postgres"))
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    # It refuses to run as root.
    user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="edsc-pg-"))
    if user:
        try:
            shutil.chown(folder, "postgres", "postgres")
        except LookupError:
            pytest.skip("running as root, and there is no user postgres to run the server as")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "log"
    process = None
    try:
        subprocess.run(
            [initdb, "-D", str(folder / "db"), "-U", "edsc", "-A", "trust", "-N"],
            check=True, capture_output=True, cwd=folder, timeout=120, **user,
        )  # fmt: skip
        with log.open("w") as out:
            process = subprocess.Popen(
                [server, "-D", str(folder / "db"), "-p", str(port), "-k", str(folder), "-F"],
                stdout=out, stderr=out, cwd=folder, **user,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while "ready to accept connections" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield f"postgresql://edsc@127.0.0.1:{port}/postgres"
    finally:
        if process is not None:
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/edits.sqlite3"
        return
    url = request.getfixturevalue("postgres_url")
    Ledger.open(url, "x").close()
    yield url
    ledger = Ledger.open(url, "x")
    with ledger.engine.begin() as connection:
        connection.execute(text("DELETE FROM edits"))
        connection.execute(text("DELETE FROM conversations"))
    ledger.close()


class Clock:
    """Time that a test turns forward."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def store_at(
    database: str, folder: Path, clock: Clock | None = None, **retention: Any
) -> EditStore:
    ledger = Ledger.open(database, secrets.token_hex(16))
    files = Files(str(folder / "pictures"))
    return EditStore(ledger, files, Retention(**retention), clock or Clock())


# ------------------------------------------------------------------------------ the life of an edit


async def test_what_was_accepted_is_there_for_the_next_process(
    database: str, tmp_path: Path
) -> None:
    first = store_at(database, tmp_path)
    entry, is_new = await first.accept(new(request='{"seed": 7}'), PHOTO, LEASE_S)
    assert (is_new, entry.state) == (True, State.RUNNING)
    # No goodbye: what follows has only what is on the disk.
    second = store_at(database, tmp_path)
    again = await second.entry(entry.id)
    assert again == entry
    assert await second.photo(entry.id) == PHOTO
    await first.close()
    await second.close()


async def test_an_edit_goes_from_accepted_to_done(database: str, tmp_path: Path) -> None:
    store = store_at(database, tmp_path)
    entry, _ = await store.accept(new(), PHOTO, LEASE_S)
    with pytest.raises(NotFound, match="running"):
        await store.picture(entry.id, "sent")
    assert (await store.entry(entry.id)).attempts == 1
    assert await store.finish(entry.id, answer(entry.id))
    kept = await store.entry(entry.id)
    assert kept.state is State.DONE
    assert EditAnswer.model_validate_json(kept.answer or "").id == entry.id
    assert (await store.picture(entry.id, "sent")).startswith(b"sent")
    assert await store.latent(entry.id) == b"latent"
    with pytest.raises(NotFound, match="photo"):  # no longer needed, so no longer kept
        await store.photo(entry.id)
    with pytest.raises(NotFound, match="aligned, sent, received"):
        await store.picture(entry.id, "../photo")
    assert (await store.counts())[State.DONE] == 1
    await store.close()


async def test_a_failed_edit_keeps_its_photo_only_to_run_again(
    database: str, tmp_path: Path
) -> None:
    store = store_at(database, tmp_path)
    for rerunnable in (True, False):
        entry, _ = await store.accept(new(), PHOTO, LEASE_S)
        await store.begin(entry.id, LEASE_S)
        assert await store.fail(entry.id, "{}", rerunnable=rerunnable, size=len(PHOTO))
        assert await store.reopen(entry.id, LEASE_S) is rerunnable
        if rerunnable:
            assert await store.photo(entry.id) == PHOTO
            assert (await store.entry(entry.id)).state is State.ACCEPTED
        else:
            with pytest.raises(NotFound):
                await store.photo(entry.id)
    await store.close()


async def test_ids_that_are_none_are_not_found(database: str, tmp_path: Path) -> None:
    store = store_at(database, tmp_path)
    for name in ("", "none", "../../etc/passwd", "a" * 33, "\0" * 32, "A" * 32, "é" * 32, "0" * 32):
        with pytest.raises(NotFound):
            await store.entry(name)
        with pytest.raises(NotFound):
            await store.conversation(name, "")
    await store.close()


# ------------------------------------------------------------------------------ idempotency, owners


async def test_a_key_is_one_edit(database: str, tmp_path: Path) -> None:
    store, other = store_at(database, tmp_path), store_at(database, tmp_path)
    first, is_new = await store.accept(new(idempotency_key="k", fingerprint="1"), PHOTO, LEASE_S)
    assert is_new
    second, is_new = await other.accept(new(idempotency_key="k", fingerprint="2"), b"x", LEASE_S)
    assert (second.id, second.fingerprint, is_new) == (first.id, "1", False)
    assert await store.photo(first.id) == PHOTO
    assert store.files.edits() == [first.id]  # the second's photo did not stay
    elsewhere, is_new = await store.accept(
        new(idempotency_key="k", owner="another"), PHOTO, LEASE_S
    )
    assert is_new
    assert elsewhere.id != first.id
    await store.close()
    await other.close()


async def test_an_edit_is_its_owners(database: str, tmp_path: Path) -> None:
    store = store_at(database, tmp_path)
    entry, _ = await store.accept(new(owner="alice"), PHOTO, LEASE_S)
    assert (await store.entry(entry.id, "alice")).id == entry.id
    for ask in (store.entry, store.delete):
        with pytest.raises(NotFound):
            await ask(entry.id, "bob")
    assert await store.photo(entry.id) == PHOTO
    await store.close()


def test_fingerprints_tell_requests_apart() -> None:
    base = fingerprint_of([("a", "1"), ("b", "2")], PHOTO)
    assert base == fingerprint_of([("b", "2"), ("a", "1")], PHOTO)
    others = [
        fingerprint_of([("a", "1"), ("b", "3")], PHOTO),
        fingerprint_of([("a", "1b"), ("", "2")], PHOTO),
        fingerprint_of([("a", "1"), ("b", "2")], PHOTO + b"!"),
        fingerprint_of([("a", "1")], PHOTO),
    ]
    assert len({base, *others}) == 5


# ------------------------------------------------------------------------------------------- leases


async def test_a_dead_gateways_edit_goes_to_one_other(database: str, tmp_path: Path) -> None:
    clock = Clock()
    dead, one, two = (store_at(database, tmp_path, clock) for _ in range(3))
    entry, _ = await dead.accept(new(), PHOTO, LEASE_S)
    assert await one.claim(LEASE_S, 10) == []
    clock.now += 0.6 * LEASE_S
    await dead.renew([entry.id], LEASE_S)
    clock.now += 0.6 * LEASE_S
    assert await one.claim(LEASE_S, 10) == []  # renewed in time
    clock.now += LEASE_S
    (taken,) = await one.claim(LEASE_S, 10)
    assert (taken.id, taken.attempts) == (entry.id, 1)
    assert await two.claim(LEASE_S, 10) == []
    # Whoever was taken for dead and is not has lost it, and leaves nothing of its own.
    assert not await dead.begin(entry.id, LEASE_S)
    assert not await dead.fail(entry.id, "{}", rerunnable=True, size=1)
    assert await one.begin(entry.id, LEASE_S)
    assert await one.finish(entry.id, answer(entry.id))
    for store in (dead, one, two):
        await store.close()


async def test_what_is_given_back_is_taken_at_once(database: str, tmp_path: Path) -> None:
    leaving, next_one = store_at(database, tmp_path), store_at(database, tmp_path)
    entry, _ = await leaving.accept(new(), PHOTO, LEASE_S)
    assert await leaving.release(entry.id)
    (taken,) = await next_one.claim(LEASE_S, 10)
    assert (taken.id, taken.state, taken.attempts) == (entry.id, State.ACCEPTED, 0)
    assert await next_one.begin(taken.id, LEASE_S)
    begun = await next_one.entry(taken.id)
    assert (begun.state, begun.attempts) == (State.RUNNING, 1)
    await leaving.close()
    await next_one.close()


# --------------------------------------------------------------------------- deletion and retention


async def test_deleting_leaves_nothing(database: str, tmp_path: Path) -> None:
    store = store_at(database, tmp_path)
    entry, _ = await store.accept(new(), PHOTO, LEASE_S)
    await store.begin(entry.id, LEASE_S)
    await store.finish(entry.id, answer(entry.id))
    await store.delete(entry.id)
    with pytest.raises(NotFound):
        await store.entry(entry.id)
    assert list((tmp_path / "pictures").iterdir()) == []
    await store.close()


async def test_an_edit_deleted_under_way_does_not_come_back(database: str, tmp_path: Path) -> None:
    running, deleting = store_at(database, tmp_path), store_at(database, tmp_path)
    entry, _ = await running.accept(new(), PHOTO, LEASE_S)
    await running.begin(entry.id, LEASE_S)
    await deleting.delete(entry.id)
    assert not await running.finish(entry.id, answer(entry.id))
    assert list((tmp_path / "pictures").iterdir()) == []
    with pytest.raises(NotFound):
        await running.entry(entry.id)
    await running.close()
    await deleting.close()


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        ({"hours": 1.5}, [2, 3]),
        ({"edits": 3}, [1, 2, 3]),
        ({"size": 200}, [3]),
        ({"size": 1}, [3]),  # the newest stays, however large
    ],
)
async def test_retention_forgets_the_oldest(
    database: str, tmp_path: Path, retention: dict[str, Any], left: list[int]
) -> None:
    clock = Clock()
    store = store_at(database, tmp_path, clock, **retention)
    ids = []
    for _ in range(4):
        entry, _ = await store.accept(new(), PHOTO, LEASE_S)
        await store.begin(entry.id, LEASE_S)
        await store.finish(entry.id, answer(entry.id, size=40))
        ids.append(entry.id)
        clock.now += 3600.0 * 0.6
    open_one, _ = await store.accept(new(), PHOTO, LEASE_S)
    clock.now += 0.1
    assert await store.sweep() == 4 - len(left)
    assert set(store.files.edits()) == {*(ids[n] for n in left), open_one.id}
    assert store.ledger.existing(ids) == {ids[n] for n in left}
    assert await store.sweep() == 0
    await store.close()


async def test_files_of_no_edit_are_removed_after_an_hour(tmp_path: Path) -> None:
    clock = Clock()
    store = store_at("sqlite://", tmp_path, clock)
    entry, _ = await store.accept(new(), PHOTO, LEASE_S)
    store.files.write("f" * 32, {"photo": b"left by a crash between file and row"})
    assert await store.sweep_orphans() == 0
    clock.now += 3599.0
    assert await store.sweep_orphans() == 0
    clock.now += 1.0
    assert await store.sweep_orphans() == 1
    assert store.files.edits() == [entry.id]
    await store.close()


async def test_conversations_hold_their_edits_in_order(database: str, tmp_path: Path) -> None:
    clock = Clock()
    store = store_at(database, tmp_path, clock)
    conversation, _ = await store.converse("alice")
    ids = []
    for _ in range(3):
        entry, _ = await store.accept(new(owner="alice", conversation=conversation), PHOTO, LEASE_S)
        ids.append(entry.id)
        clock.now += 1.0
    _, entries = await store.conversation(conversation, "alice")
    assert [entry.id for entry in entries] == ids
    with pytest.raises(NotFound):
        await store.conversation(conversation, "bob")
    with pytest.raises(NotFound, match="conversation"):
        await store.accept(new(owner="bob", conversation=conversation), PHOTO, LEASE_S)
    for edit_id in ids:
        await store.delete(edit_id)
    clock.now += 25 * 3600.0
    await store.sweep()
    with pytest.raises(NotFound):
        await store.conversation(conversation, "alice")
    await store.close()


# ---------------------------------------------------------------------------------- where it all is


def test_only_the_user_can_look_into_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDSC_STATE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = state_folder(Settings())
    assert folder == tmp_path / "state" / "edsc"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")  # as in a container without a home
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert state_folder(Settings()).parent == tmp_path
    assert state_folder(Settings(state=tmp_path / "chosen")) == tmp_path / "chosen"


def test_settings_choose_database_and_pictures(tmp_path: Path) -> None:
    store = EditStore.open(Settings(state=tmp_path))
    assert (tmp_path / "edits.sqlite3").is_file()
    assert (tmp_path / "pictures").is_dir()
    store.ledger.close()
    elsewhere = Settings(database=f"sqlite:///{tmp_path}/x/y.db", pictures="memory://p")
    EditStore.open(elsewhere).ledger.close()
    assert (tmp_path / "x" / "y.db").is_file()


@pytest.mark.parametrize(
    "url", ["nonsense", "oracle://u:hush-hush@h/d", "mysql+no://u:hush-hush@h"]
)
def test_a_database_that_cannot_be_had_is_told_without_its_password(url: str) -> None:
    with pytest.raises(InvalidRequest, match="database URL") as raised:
        Ledger.open(url, "x")
    assert "hush-hush" not in str(raised.value)


def test_a_database_that_is_away_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        Ledger.open("postgresql://edsc@127.0.0.1:9/edsc", "x")


def test_tables_of_another_version_are_told(database: str) -> None:
    ledger = Ledger.open(database, "x")
    with ledger.engine.begin() as connection:
        connection.execute(text(f"UPDATE edsc_schema SET version = {SCHEMA + 1}"))
    with pytest.raises(Conflict, match=f"schema {SCHEMA + 1}; expected {SCHEMA}"):
        Ledger.open(database, "x")
    with ledger.engine.begin() as connection:
        connection.execute(text(f"UPDATE edsc_schema SET version = {SCHEMA}"))
    ledger.close()
