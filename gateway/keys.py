"""Who may ask, and how often: API keys and rate limits, before anything of a request is read.

::

    request --> open path? --> key known? --> share left? --> app (scope["state"]["owner"])
                                401             429 + Retry-After

The file of `EDSC_API_KEYS` has one key a line; `#` begins a comment::

    # name     the key, or sha256: and its SHA-256                     POSTs a minute, if wanted
    phone-app  sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    batch      sha256:60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752  600

A caller shows its key as `Authorization: Bearer KEY` or `X-API-Key: KEY`. Edits belong to the name
of the key that made them; to every other key they do not exist.
"""

import hashlib
import hmac
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.edge import problem_of, problem_response
from shared.errors import EdscError, InvalidRequest, RateLimited, Unauthorized

# Paths that need no key: the page and its files, the interface's description, and what asks a
# process how it is. /metrics is not among them.
OPEN_PATHS: Final = frozenset(
    {"/", "/docs", "/openapi.json", "/favicon.ico", "/healthz", "/readyz", "/v1/samples"}
)
OPEN_FOLDERS: Final = ("/static/", "/samples/")
MOST_CALLERS: Final = 10_000  # buckets remembered; the longest unused is forgotten first

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_COMMENT: Final = re.compile(r"(^|\s)#.*")
_SHORTEST: Final = 16  # characters of a key that is written down as it is


@dataclass(frozen=True)
class Key:
    """One API key. digest: SHA-256 of it. per_minute: POSTs a minute; None: the default."""

    name: str
    digest: bytes
    per_minute: float | None = None


class Keyring:
    """The keys that are known. An empty one asks nobody for a key."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def read(cls, path: Path) -> "Keyring":
        """The keys of a file. Raises InvalidRequest, which names the line and never the key."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the API keys in {path} cannot be read: {error}") from None
        keys: list[Key] = []
        for number, line in enumerate(lines, 1):
            words = _COMMENT.sub("", line).split()
            if words:
                keys.append(_key_of(words, f"{path}:{number}"))
        names = [key.name for key in keys]
        digests = [key.digest for key in keys]
        if len(set(names)) < len(names) or len(set(digests)) < len(digests):
            raise InvalidRequest(f"{path} has a name or a key twice; expected every one once")
        if not keys:
            # An empty file would open the door to everybody.
            raise InvalidRequest(f"{path} has 0 keys; expected at least 1")
        return cls(keys)

    def find(self, shown: str) -> Key | None:
        """The key that was shown, None for an unknown one.

        Takes the same time whichever it is: digests of equal length are compared whole, and all of
        them, so that time says nothing about how much of a guess was right.
        """
        digest = hashlib.sha256(shown.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def _key_of(words: Sequence[str], where: str) -> Key:
    if not 2 <= len(words) <= 3:
        raise InvalidRequest(f"{where} has {len(words)} words; expected NAME KEY [PER_MINUTE]")
    name, secret = words[:2]
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{where}: the name is {name!r}; expected {_NAME.pattern}")
    if secret.startswith("sha256:"):
        try:
            digest = bytes.fromhex(secret.removeprefix("sha256:"))
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise InvalidRequest(f"{where}: expected sha256: and 64 hexadecimal digits")
    elif len(secret) < _SHORTEST:
        raise InvalidRequest(
            f"{where}: the key has {len(secret)} characters; expected at least {_SHORTEST}"
        )
    else:
        digest = hashlib.sha256(secret.encode()).digest()
    try:
        per_minute = float(words[2]) if len(words) == 3 else None
    except ValueError:
        per_minute = math.nan
    if per_minute is not None and not 0.0 < per_minute < math.inf:
        raise InvalidRequest(f"{where}: the rate is {words[2]!r}; expected POSTs a minute, over 0")
    return Key(name, digest, per_minute)


class RateLimit:
    """A token bucket for every caller: `burst` at once, refilled by `per_minute`.

    Counted in this process: behind a balancer, N gateways let N times as much through. clock:
    seconds, monotonic.
    """

    def __init__(
        self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_minute = per_minute
        self.burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, when

    def take(self, caller: str, per_minute: float | None = None) -> float:
        """Take a token of `caller`'s; gives 0, or the seconds until there is one."""
        rate = (self.per_minute if per_minute is None else per_minute) / 60.0
        if rate <= 0.0:
            return 0.0
        now = self._clock()
        tokens, since = self._buckets.pop(caller, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - since) * rate)
        wait_s = 0.0 if tokens >= 1.0 else (1.0 - tokens) / rate
        self._buckets[caller] = (tokens - 1.0 if wait_s == 0.0 else tokens, now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        return wait_s


class Guard:
    """ASGI middleware inside Edge: lets in who has a key and has not asked too often."""

    def __init__(self, app: ASGIApp, *, keyring: Keyring, limit: RateLimit) -> None:
        self.app = app
        self.keyring = keyring
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["owner"] = ""
        refusal, headers = self._refuse(scope)
        if refusal is None:
            await self.app(scope, receive, send)
            return
        state["reason"] = refusal.kind
        answer = problem_response(problem_of(refusal, state.get("request_id", "")), headers)
        await state["drain"](receive)
        await answer(scope, receive, send)

    def _refuse(self, scope: Scope) -> tuple[EdscError | None, dict[str, str]]:
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return None, {}
        key = None
        if self.keyring:
            shown = _shown(Headers(scope=scope))
            key = self.keyring.find(shown) if shown else None
            if key is None:
                got = "an API key that is not known here" if shown else "no API key"
                return (
                    Unauthorized(
                        f"got {got}; expected one as Authorization: Bearer KEY or X-API-Key: KEY"
                    ),
                    {"www-authenticate": "Bearer"},
                )
            scope["state"]["owner"] = key.name
        if scope["method"] != "POST":
            return None, {}
        client = scope.get("client") or ("unknown", 0)
        caller = f"key {key.name}" if key else f"address {client[0]}"
        wait_s = self.limit.take(caller, key.per_minute if key else None)
        if wait_s == 0.0:
            return None, {}
        rate = key.per_minute if key and key.per_minute else self.limit.per_minute
        return (
            RateLimited(
                f"{caller} asks more than {rate:g} times a minute; expected to wait {wait_s:.1f} s"
            ),
            {"retry-after": str(math.ceil(wait_s))},
        )


def _shown(headers: Headers) -> str:
    """The key that a request shows; "" for none."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key", "").strip()
