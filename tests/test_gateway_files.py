"""Bytes in a folder, in memory, and in an object store that speaks S3."""

import http.server
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from gateway.store import ALL_FILES, Files
from shared.errors import InvalidRequest, NotFound, Unavailable
from tests.test_gateway_store import PHOTO


class S3(http.server.BaseHTTPRequestHandler):
    """As much of S3's protocol as keeping a file needs: PUT, GET, HEAD, DELETE, ListObjectsV2."""

    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        length = headers.pop("length", str(len(body)))
        for name, value in {**headers, "content-length": length}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def do_PUT(self) -> None:
        self.objects[self._key] = self.rfile.read(int(self.headers["content-length"]))
        self._answer(200, etag='"1"')

    def do_DELETE(self) -> None:
        self.objects.pop(self._key, None)
        self._answer(204)

    def do_POST(self) -> None:  # DeleteObjects
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        bucket = self._key.split("/")[0]
        keys = [part.split("</Key>")[0] for part in body.split("<Key>")[1:]]
        for key in keys:
            self.objects.pop(f"{bucket}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(query)
        elif (data := self.objects.get(self._key)) is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            date = "Thu, 01 Jan 2026 00:00:00 GMT"
            self._answer(200, data, etag='"1"', last_modified=date)

    do_HEAD = do_GET

    def _list(self, query: dict[str, list[str]]) -> None:
        bucket = self._key.rstrip("/")
        prefix = query.get("prefix", [""])[0]
        entries, folders = "", set()
        for key, data in sorted(self.objects.items()):
            name = key.removeprefix(f"{bucket}/")
            if not name.startswith(prefix):
                continue
            if "/" in (rest := name[len(prefix) :]):
                folders.add(prefix + rest.split("/")[0] + "/")
            else:
                entries += (
                    f"<Contents><Key>{name}</Key><Size>{len(data)}</Size><ETag>1</ETag>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        for folder in sorted(folders):
            entries += f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>"
        xml = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        self._answer(200, xml.encode(), content_type="application/xml")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    pytest.importorskip("obstore", reason="the extra s3 is not installed")
    objects: dict[str, bytes] = {}
    handler = type("Handler", (S3,), {"objects": objects})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_REGION": "eu-central-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield objects
    threading.Thread(target=server.shutdown).start()  # kept connections may make it wait
    server.socket.close()


def check_files(files: Files) -> None:
    files.write("a" * 32, {"photo": PHOTO, "sent.png": b"1"})
    files.write("a" * 32, {"sent.png": b"2"})
    files.write("b" * 32, {"photo": b""})
    assert files.read("a" * 32, "photo") == PHOTO
    assert files.read("a" * 32, "sent.png") == b"2"
    assert sorted(files.edits()) == ["a" * 32, "b" * 32]
    with pytest.raises(NotFound):
        files.read("a" * 32, "latent")
    files.remove("a" * 32, ALL_FILES)
    with pytest.raises(NotFound):
        files.read("a" * 32, "photo")
    assert files.edits() == ["b" * 32]
    files.remove("b" * 32, ALL_FILES)
    assert files.edits() == []


def test_files_in_a_folder(tmp_path: Path) -> None:
    check_files(Files(str(tmp_path / "pictures")))
    check_files(Files(f"file://{tmp_path}/others"))


def test_files_in_memory() -> None:
    check_files(Files(f"memory://{secrets.token_hex(4)}"))


def test_files_in_s3(s3: dict[str, bytes]) -> None:
    files = Files("s3://bucket/edits")
    files.write("c" * 32, {"photo": PHOTO})
    assert s3 == {f"bucket/edits/{'c' * 32}/photo": PHOTO}
    files.remove("c" * 32, ALL_FILES)
    check_files(files)
    assert s3 == {}


def test_a_store_that_is_away_is_unavailable(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    files = Files(str(folder))
    shutil.rmtree(folder)
    folder.write_text("a file where a folder was")
    with pytest.raises(Unavailable, match="picture store"):
        files.write("a" * 32, {"photo": PHOTO})


def test_pictures_at_an_unknown_place_are_told() -> None:
    with pytest.raises(InvalidRequest, match="pictures"):
        Files("carrier-pigeon://roof")
