"""Recent edits, kept in memory: the answer and its three pictures.

The store is bounded twice, by number and by bytes, and forgets the least recently used edit first:
a gateway that runs for weeks does not grow.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.answer import EditAnswer
from shared.errors import NotFound


@dataclass(frozen=True)
class StoredEdit:
    """One edit: the answer as sent, and its pictures as PNG by name (aligned, sent, received)."""

    answer: EditAnswer
    pictures: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of the pictures."""
        return sum(len(png) for png in self.pictures.values())


class EditStore:
    """Least-recently-used edits by id, at most `max_edits` of them and `max_bytes` of pictures.

    Not thread-safe: it belongs to the gateway's one event loop.
    """

    def __init__(self, max_edits: int = 256, max_bytes: int = 128 * 2**20) -> None:
        if max_edits < 1 or max_bytes < 1:
            raise ValueError(
                f"max_edits is {max_edits}, max_bytes {max_bytes}; expected at least 1"
            )
        self._edits: OrderedDict[str, StoredEdit] = OrderedDict()
        self._bytes = 0
        self.max_edits = max_edits
        self.max_bytes = max_bytes

    def __len__(self) -> int:
        return len(self._edits)

    @property
    def bytes_held(self) -> int:
        """Bytes of all pictures held."""
        return self._bytes

    def put(self, edit: StoredEdit) -> None:
        """Keep an edit; older ones go until it fits. The newest stays, however large it is."""
        if edit.answer.id in self._edits:
            self.delete(edit.answer.id)
        self._edits[edit.answer.id] = edit
        self._bytes += edit.size
        while len(self._edits) > self.max_edits or (
            self._bytes > self.max_bytes and len(self._edits) > 1
        ):
            _, oldest = self._edits.popitem(last=False)
            self._bytes -= oldest.size

    def get(self, edit_id: str) -> StoredEdit:
        """The edit of this id. Raises NotFound for an unknown, deleted or forgotten one."""
        try:
            edit = self._edits[edit_id]
        except KeyError:
            raise NotFound(
                f"no edit {edit_id!r} is kept here; the last {self.max_edits} are"
            ) from None
        self._edits.move_to_end(edit_id)
        return edit

    def picture(self, edit_id: str, name: str) -> bytes:
        """One picture of an edit as PNG. Raises NotFound for an unknown edit or picture."""
        pictures = self.get(edit_id).pictures
        if name not in pictures:
            raise NotFound(f"picture is {name!r}; an edit has {', '.join(pictures)}")
        return pictures[name]

    def delete(self, edit_id: str) -> None:
        """Forget an edit. Raises NotFound when there is none of this id."""
        self.get(edit_id)
        self._bytes -= self._edits.pop(edit_id).size
