"""Edits, conversations and pictures, kept: the ledger's rows and the files beside them.

::

    EditStore --threads--> Ledger (SQLAlchemy)    rows: what was asked, how far it is, the answer
              --threads--> Files (fsspec)         photo, aligned.png, sent.png, received.png, latent

Files are written before the row that tells of them, and removed before it: a crash in between
leaves a row that says what is missing, or files without a row, which `sweep_orphans` removes.
These are people's faces: an uploaded photo is kept until its edit is done and no longer, and
everything goes after the retention time or when its owner says so.
"""

import asyncio
import hashlib
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, ParamSpec, Self, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gateway.answer import PICTURES, EditAnswer, StoredEdit
from gateway.ledger import Entry, Ledger, NewEdit, State
from shared.errors import InvalidRequest, NotFound, Unavailable
from shared.settings import MIB, Settings

PHOTO: Final = "photo"
LATENT: Final = "latent"
ORPHAN_S: Final = 3600.0  # files without a row are left alone for so long: theirs may be coming

P = ParamSpec("P")
T = TypeVar("T")


def state_folder(settings: Settings) -> Path:
    """Where the gateway keeps its things: as set, the user's state folder, or the temporary one.

    Made if it is not there, for this user alone.
    """
    if settings.state is not None:
        settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        return settings.state
    base = os.environ.get("XDG_STATE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path("~/.local/state").expanduser()
    user = os.getuid() if sys.platform != "win32" else "user"
    for folder in (home / "edsc", Path(tempfile.gettempdir()) / f"edsc-{user}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue  # a read-only home, as containers have
        # In a shared /tmp, somebody else may have made it first, to look at what we put there.
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise Unavailable(f"neither {home} nor {tempfile.gettempdir()} can be written; set EDSC_STATE")


def _filesystem(url: str) -> tuple[Any, str]:
    """An fsspec filesystem and a path in it; the object stores that fsspec has no driver for here
    are obstore's (s3, gs, az)."""
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        fs, root = fsspec.core.url_to_fs(url)
        return fs, str(root)
    except (ImportError, ValueError) as error:
        missing = error
    try:
        from obstore.fsspec import SUPPORTED_PROTOCOLS, register

        if protocol in SUPPORTED_PROTOCOLS:
            register(protocol)
            fs, root = fsspec.core.url_to_fs(url)
            return fs, str(root)
    except (ImportError, ValueError) as error:
        missing = error
    raise InvalidRequest(
        f"pictures cannot be kept at {protocol}://: {missing}; expected a folder, or for S3 and the"
        ' like pip install ".[s3]"'
    )


class Files:
    """Bytes by edit and name, under an fsspec URL: a folder, "s3://bucket/prefix", "memory://".

    Blocking. Raises InvalidRequest for a URL whose filesystem is not installed, Unavailable when it
    does not answer.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = _filesystem(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        if self._local:
            Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, edit_id: str, name: str = "") -> str:
        return f"{self._root}/{edit_id}/{name}".rstrip("/")

    def write(self, edit_id: str, files: Mapping[str, bytes]) -> None:
        """Keep bytes under their names; what was there before is replaced."""
        try:
            if self._local:
                self._fs.makedirs(self._path(edit_id), exist_ok=True)
            for name, data in files.items():
                self._fs.pipe_file(self._path(edit_id, name), data)
        except Exception as error:
            raise Unavailable(f"the picture store took nothing: {error}") from error

    def read(self, edit_id: str, name: str) -> bytes:
        """Bytes of one file. Raises NotFound when there is none."""
        try:
            return bytes(self._fs.cat_file(self._path(edit_id, name)))
        except FileNotFoundError:
            raise NotFound(f"{name} of edit {edit_id!r} is not kept here any more") from None
        except Exception as error:
            raise Unavailable(f"the picture store does not answer: {error}") from error

    def remove(self, edit_id: str, names: Iterable[str]) -> None:
        """Remove files of an edit, those that are there."""
        try:
            for name in names:
                try:
                    self._fs.rm_file(self._path(edit_id, name))
                except FileNotFoundError:
                    continue
            if self._local:
                with suppress(OSError):  # not empty: other files of it stay; or gone already
                    self._fs.rmdir(self._path(edit_id))
        except Exception as error:
            raise Unavailable(f"the picture store removed nothing: {error}") from error

    def edits(self) -> list[str]:
        """Ids of the edits that have files."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise Unavailable(f"the picture store does not answer: {error}") from error
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]


ALL_FILES: Final = (PHOTO, LATENT, *(f"{name}.png" for name in PICTURES))


@dataclass(frozen=True)
class Retention:
    """How long and how much is kept. hours: of age. edits: count. size: bytes of files."""

    hours: float = 24.0
    edits: int = 2000
    size: int = 1024 * MIB


class EditStore:
    """The ledger and the files as one, for an event loop: nothing here blocks it.

    clock: seconds since the epoch.
    """

    def __init__(
        self,
        ledger: Ledger,
        files: Files,
        retention: Retention | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = ledger
        self.files = files
        self.retention = retention or Retention()
        self.clock = clock
        self._threads = ThreadPoolExecutor(8, "store")
        self._unowned: dict[str, float] = {}  # files without a row, and since when we know

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """As the settings say; by default SQLite and a folder in the user's state folder."""
        folder = None
        if not settings.database or not settings.pictures:
            folder = state_folder(settings)
        database = settings.database or f"sqlite:///{folder}/edits.sqlite3"
        return cls(
            Ledger.open(database, secrets.token_hex(16)),
            Files(settings.pictures or f"{folder}/pictures"),
            Retention(
                settings.retention_hours, settings.retention_edits, settings.retention_mib * MIB
            ),
        )

    @classmethod
    def in_memory(cls, retention: Retention | None = None) -> Self:
        """For a process that promises nothing beyond its own life (tests, notebooks)."""
        holder = secrets.token_hex(16)
        return cls(Ledger.open("sqlite://", holder), Files(f"memory://{holder}"), retention)

    async def _do(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work` on a thread. What belongs together is one piece of work: every hand-over between
        threads costs as much as writing a small file."""
        done = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: work(*args, **kwargs)
        )
        # Shielded: a client that hangs up cancels the waiting, never half of a write.
        return await asyncio.shield(done)

    async def close(self) -> None:
        """Finish what is being written and hang up."""
        await asyncio.to_thread(self._threads.shutdown)
        self.ledger.close()

    async def ping(self) -> None:
        """Raise Unavailable when the database does not answer."""
        await self._do(self.ledger.ping)

    # ------------------------------------------------------------------------------ the life of one

    async def accept(self, new: NewEdit, photo: bytes, lease_s: float) -> tuple[Entry, bool]:
        """Keep the photo, then commit the row, as running; gives it, and whether it is new."""
        return await self._do(self._accept, new, photo, lease_s)

    def _accept(self, new: NewEdit, photo: bytes, lease_s: float) -> tuple[Entry, bool]:
        is_new = False
        self.files.write(new.id, {PHOTO: photo})
        try:
            entry, is_new = self.ledger.accept(new, self.clock(), lease_s)
        finally:
            if not is_new:
                self.files.remove(new.id, (PHOTO,))
        return entry, is_new

    async def begin(self, edit_id: str, lease_s: float) -> bool:
        """accepted -> running; False where it is no longer ours."""
        return await self._do(self.ledger.begin, edit_id, self.clock(), lease_s)

    async def finish(self, edit_id: str, done: StoredEdit) -> bool:
        """Keep pictures and latent, then say done, then drop the photo. False: deleted meanwhile,
        or another gateway has it; nothing of ours is kept then."""
        return await self._do(self._finish, edit_id, done)

    def _finish(self, edit_id: str, done: StoredEdit) -> bool:
        files = {f"{name}.png": png for name, png in done.pictures.items()}
        files[LATENT] = done.latent
        size = sum(len(data) for data in files.values())
        self.files.write(edit_id, files)
        if not self.ledger.finish(edit_id, done.json, size, self.clock()):
            self._drop_unowned(edit_id)
            return False
        self.files.remove(edit_id, (PHOTO,))
        return True

    async def fail(self, edit_id: str, problem: str, *, rerunnable: bool, size: int) -> bool:
        """Say that it failed; the photo (of `size` bytes) stays only where it can be run again."""
        return await self._do(self._fail, edit_id, problem, rerunnable, size)

    def _fail(self, edit_id: str, problem: str, rerunnable: bool, size: int) -> bool:
        kept = size if rerunnable else 0
        moved = self.ledger.fail(edit_id, problem, rerunnable, kept, self.clock())
        if not moved:
            self._drop_unowned(edit_id)
        elif not rerunnable:
            self.files.remove(edit_id, (PHOTO,))
        return moved

    def _drop_unowned(self, edit_id: str) -> None:
        """Remove the files of an edit that has been deleted while it was under way."""
        if not self.ledger.existing([edit_id]):
            self.files.remove(edit_id, ALL_FILES)

    async def release(self, edit_id: str) -> bool:
        """Give an edit under way back, for whoever comes first."""
        return await self._do(self.ledger.release, edit_id, self.clock())

    async def renew(self, edit_ids: list[str], lease_s: float) -> None:
        """Hold on to edits under way."""
        await self._do(self.ledger.renew, edit_ids, self.clock(), lease_s)

    async def claim(self, lease_s: float, most: int) -> list[Entry]:
        """Take over edits that nobody holds any more."""
        return await self._do(self.ledger.claim, self.clock(), lease_s, most)

    async def reopen(self, edit_id: str, lease_s: float) -> bool:
        """failed -> accepted; False where it cannot be run again."""
        return await self._do(self.ledger.reopen, edit_id, self.clock(), lease_s)

    async def delete(self, edit_id: str, owner: str | None = None) -> None:
        """Remove pictures, latent, photo and row. Raises NotFound when there is no such edit."""
        await self._do(self._delete, edit_id, owner)

    def _delete(self, edit_id: str, owner: str | None) -> None:
        self.ledger.get(edit_id, owner)
        self._forget(edit_id)

    def _forget(self, edit_id: str) -> None:
        self.files.remove(edit_id, ALL_FILES)
        self.ledger.delete(edit_id)

    # ----------------------------------------------------------------------------------- looking up

    async def entry(self, edit_id: str, owner: str | None = None) -> Entry:
        """The row of an edit. Raises NotFound."""
        return await self._do(self.ledger.get, edit_id, owner)

    async def by_key(self, owner: str, key: str) -> Entry | None:
        """The edit that this owner sent with an idempotency key."""
        return await self._do(self.ledger.by_key, owner, key)

    async def photo(self, edit_id: str) -> bytes:
        """The upload, while it is kept. Raises NotFound."""
        return await self._do(self.files.read, edit_id, PHOTO)

    async def picture(self, edit_id: str, name: str, owner: str | None = None) -> bytes:
        """One picture as PNG. Raises NotFound for an unknown edit or picture."""
        entry = await self.entry(edit_id, owner)
        if name not in PICTURES:
            raise NotFound(f"picture is {name!r}; an edit has {', '.join(PICTURES)}")
        self._check_done(entry)
        return await self._do(self.files.read, edit_id, f"{name}.png")

    async def latent(self, edit_id: str, owner: str | None = None) -> bytes:
        """The edited latent as it was coded: complex64, little-endian. Raises NotFound."""
        self._check_done(await self.entry(edit_id, owner))
        return await self._do(self.files.read, edit_id, LATENT)

    @staticmethod
    def _check_done(entry: Entry) -> None:
        if entry.state is not State.DONE:
            raise NotFound(f"edit {entry.id!r} is {entry.state.value}: it has no pictures")

    async def counts(self) -> dict[State, int]:
        """Number of edits in every state."""
        return await self._do(self.ledger.counts)

    # -------------------------------------------------------------------------------- conversations

    async def converse(self, owner: str) -> tuple[str, float]:
        """Begin a conversation; gives its id and the time."""
        conversation_id, now = secrets.token_hex(16), self.clock()
        await self._do(self.ledger.converse, conversation_id, owner, now)
        return conversation_id, now

    async def conversation(self, conversation_id: str, owner: str) -> tuple[float, list[Entry]]:
        """When it began, and its edits in order. Raises NotFound."""
        return await self._do(self.ledger.conversation, conversation_id, owner)

    async def end_conversation(self, conversation_id: str) -> None:
        """Forget a conversation whose edits are deleted."""
        await self._do(self.ledger.end_conversation, conversation_id)

    # ------------------------------------------------------------------------------------ retention

    async def sweep(self) -> int:
        """Forget what is too old or too much; gives the number of edits."""
        before = self.clock() - self.retention.hours * 3600.0
        old = await self._do(
            self.ledger.outdated, before, self.retention.edits, self.retention.size
        )
        for edit_id in old:
            await self._do(self._forget, edit_id)
        await self._do(self.ledger.end_empty_conversations, before)
        return len(old)

    async def sweep_orphans(self) -> int:
        """Remove files that have belonged to no row for an hour; gives the number of edits."""
        now = self.clock()
        present = await self._do(self.files.edits)
        owned = set()
        for start in range(0, len(present), 500):
            owned |= await self._do(self.ledger.existing, present[start : start + 500])
        self._unowned = {
            name: self._unowned.get(name, now) for name in present if name not in owned
        }
        orphans = [name for name, since in self._unowned.items() if now - since >= ORPHAN_S]
        for edit_id in orphans:
            await self._do(self.files.remove, edit_id, ALL_FILES)
        return len(orphans)


def fingerprint_of(fields: Iterable[tuple[str, str]], photo: bytes) -> str:
    """SHA-256 that two requests share when they ask for the same: fields as sent, and the photo."""
    digest = hashlib.sha256(hashlib.sha256(photo).digest())
    for name, value in sorted(fields):
        for part in (name, value):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def answer_of(entry: Entry) -> EditAnswer:
    """The answer of an edit that is done."""
    if entry.answer is None:
        raise NotFound(f"edit {entry.id!r} is {entry.state.value}: it has no answer")
    return EditAnswer.model_validate_json(entry.answer)
