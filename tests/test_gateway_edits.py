"""Edits over REST that outlive their request: later answers, keys, conversations, kill -9."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin

from gateway.answer import EditAnswer
from gateway.app import create_app
from gateway.link import Link
from gateway.marking import texts_of
from gateway.store import EditStore, Files
from shared.rpc import FULL_NAMES, Server
from shared.settings import Settings
from shared.telemetry import configure_logging
from tests.test_gateway_app import png, problem
from tests.test_gateway_link import Stuck

ROOT = Path(__file__).resolve().parent.parent
FORM = {"instruction": "-", "align": "false", "quality": "fast", "seed": "7"}
SENTENCE = "give Uncle Theodor a fuller beard"


@pytest.fixture(scope="module")
def client(services: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(Link(services)), raise_server_exceptions=False) as client:
        yield client


def post(client: Any, url: str = "/v1/edits", **options: Any) -> Any:
    data = {**FORM, **options.pop("data", {})}
    return client.post(url, files={"image": options.pop("photo", png())}, data=data, **options)


def until_done(client: Any, url: str, timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while (answer := client.get(url)).status_code == 202:
        assert answer.json()["state"] in ("accepted", "running")
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    return answer


# -------------------------------------------------------------------------------------------- later


def test_an_answer_later_is_the_same_answer(client: TestClient) -> None:
    accepted = post(client, headers={"prefer": "respond-async, wait=0"})
    assert accepted.status_code == 202
    body = accepted.json()
    assert body["state"] in ("accepted", "running")
    assert accepted.headers["location"] == f"/v1/edits/{body['id']}"
    done = until_done(client, accepted.headers["location"])
    answer = EditAnswer.model_validate(done.json())
    assert (answer.id, answer.state, answer.notes) == (body["id"], "done", [])
    now = post(client).json()
    pictures = [client.get(a["images"]["received"]).content for a in (now, done.json())]
    assert pictures[0] == pictures[1]


def test_a_refusal_later_says_why(client: TestClient) -> None:
    headers = {"prefer": "respond-async"}
    accepted = post(client, photo=b"no picture", headers=headers)
    failed = until_done(client, accepted.headers["location"])
    assert failed.status_code == 200
    body = failed.json()
    assert (body["state"], body["rerunnable"]) == ("failed", False)
    assert body["problem"]["status"] == 415
    again = client.post(f"{accepted.headers['location']}/rerun")
    assert "no longer kept" in problem(again, 409, "conflict")
    detail = problem(client.get(f"/v1/edits/{body['id']}/sent.png"), 404, "not-found")
    assert "failed" in detail


# -------------------------------------------------------------------------------------- idempotency


def test_the_same_key_is_the_same_answer(client: TestClient) -> None:
    headers = {"idempotency-key": "order-4711"}
    first, second = post(client, headers=headers), post(client, headers=headers)
    assert first.json() == second.json()
    picture = post(client, headers={**headers, "accept": "image/png"})
    assert picture.content == client.get(first.json()["images"]["received"]).content
    later = post(client, headers={**headers, "prefer": "respond-async"})
    assert later.json() == first.json()
    other = post(client, headers=headers, data={"snr_db": "3"})
    assert "another request" in problem(other, 422, "invalid-request")
    photo = post(client, headers=headers, photo=png(41, 40))
    assert "another request" in problem(photo, 422, "invalid-request")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\u00e9"])
def test_a_key_that_is_none_is_refused(client: TestClient, key: str) -> None:
    answer = post(client, headers={"idempotency-key": key.encode("latin-1")})
    problem(answer, 422, "invalid-request")


# ------------------------------------------------------------------------- what is kept and removed


def test_the_latent_is_what_crossed_the_air(client: TestClient) -> None:
    edit = post(client).json()
    latent = client.get(f"/v1/edits/{edit['id']}/latent")
    assert latent.headers["content-type"] == "application/octet-stream"
    assert len(latent.content) == 8 * edit["cbr"]["uses"]


def test_deleting_removes_picture_latent_and_row(services: Settings, tmp_path: Path) -> None:
    settings = Settings(state=tmp_path)
    store = EditStore.open(settings)
    with TestClient(create_app(Link(services), store=store)) as client:
        edit = post(client).json()
        folder = tmp_path / "pictures" / edit["id"]
        names = {path.name for path in folder.iterdir()}
        assert names == {"aligned.png", "sent.png", "received.png", "latent"}  # no photo any more
        secret = edit["id"].encode()
        assert client.delete(f"/v1/edits/{edit['id']}").status_code == 204
        assert not folder.exists()
        for path in (*edit["images"].values(), f"/v1/edits/{edit['id']}/latent"):
            problem(client.get(path), 404, "not-found")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret in p.read_bytes()]


def test_a_conversation_keeps_its_edits_together(client: TestClient) -> None:
    begun = client.post("/v1/conversations")
    assert begun.status_code == 201
    conversation = begun.json()["id"]
    edits = [post(client, data={"conversation": conversation}).json() for _ in range(2)]
    assert {edit["conversation"] for edit in edits} == {conversation}
    told = client.get(begun.headers["location"]).json()
    assert [edit["id"] for edit in told["edits"]] == [edit["id"] for edit in edits]
    assert told["edits"][0] == edits[0]
    assert client.delete(begun.headers["location"]).status_code == 204
    problem(client.get(begun.headers["location"]), 404, "not-found")
    problem(client.get(f"/v1/edits/{edits[0]['id']}"), 404, "not-found")
    unknown = post(client, data={"conversation": conversation})
    problem(unknown, 404, "not-found")


def test_returned_pictures_say_what_they_are(client: TestClient) -> None:
    edit = post(client, data={"instruction": "make the smile bigger", "snr_db": "-3"}).json()
    digest = client.get("/v1/model").json()["digest"]
    assert edit["bundle_digest"] == digest
    direct = post(client, headers={"accept": "image/png"}).content
    for data in (client.get(edit["images"]["received"]).content, direct):
        image = Image.open(io.BytesIO(data))
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert "generative model" in image.text["Description"]
        assert digest in image.text["Source"]
    facts = json.loads(texts_of(client.get(edit["images"]["sent"]).content)["edsc"])
    assert (facts["snr_db"], facts["edit"]["attribute"]) == (-3.0, edit["edit"]["attribute"])


# ------------------------------------------------------------------------------------------- limits


def test_a_store_that_is_away_is_503_and_not_ready(services: Settings, tmp_path: Path) -> None:
    store = EditStore.in_memory()
    store.files = Files(str(tmp_path / "pictures"))
    with TestClient(create_app(Link(services), store=store)) as client:
        (tmp_path / "pictures").rmdir()
        (tmp_path / "pictures").write_text("a file where a folder was")
        problem(post(client), 503, "unavailable")
        assert client.get("/readyz").json()["store"] == "SERVING"
        store.ledger.engine.dispose()
        with store.ledger.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE IF EXISTS edits")
        problem(client.get(f"/v1/edits/{'0' * 32}"), 503, "unavailable")


@contextmanager
def gateway(settings: Settings, state: Path, **chosen: str) -> Iterator[tuple[Any, str]]:
    """The gateway as a process of its own; gives it and its address."""
    targets = {f"EDSC_{n.upper()}_TARGET": settings.target(n) for n in FULL_NAMES}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gateway", "--port", "0", "--state", str(state)],
        cwd=ROOT,
        env={**os.environ, **targets, **{f"EDSC_{k}": v for k, v in chosen.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, "http://" + process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_body_that_does_not_arrive_is_given_up(services: Settings, tmp_path: Path) -> None:
    import socket

    with gateway(services, tmp_path, BODY_TIMEOUT_S="0.5") as (_, url):
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/edits HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
                b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            )
            assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]
        assert httpx.get(f"{url}/healthz").status_code == 200


@pytest.mark.slow
def test_an_accepted_edit_survives_kill_9(
    services: Settings, tmp_path: Path, random_bundle: Path
) -> None:
    """202, kill -9 in the middle of the edit, start again: done, and it says so."""
    import shared.pb.edsc_pb2_grpc as grpc_code

    server = Server(Settings(receiver_port=0), "receiver")
    stuck = Stuck(server)
    grpc_code.add_ReceiverServicer_to_server(stuck, server.grpc)
    held = services.model_copy(update={"receiver_target": f"127.0.0.1:{server.start()}"})
    server.ready()
    with gateway(held, tmp_path, LEASE_S="2") as (process, url):
        headers = {"prefer": "respond-async", "idempotency-key": "mine"}
        accepted = post(httpx, f"{url}/v1/edits", headers=headers)
        assert accepted.status_code == 202
        assert stuck.started.wait(30.0)
        process.send_signal(signal.SIGKILL)
        process.wait()
    server.drain(0.0)
    with gateway(services, tmp_path, LEASE_S="2") as (process, url):
        done = until_done(httpx, f"{url}{accepted.headers['location']}")
        assert done.status_code == 200, done.text
        answer = EditAnswer.model_validate(done.json())
        assert any("after the gateway had stopped" in note for note in answer.notes)
        for path in answer.images.model_dump().values():
            assert httpx.get(url + path).content.startswith(b"\x89PNG")
        again = post(httpx, f"{url}/v1/edits", headers={"idempotency-key": "mine"})
        assert again.json() == done.json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30.0) == 0


# ----------------------------------------------------------------------------------------- the logs


@pytest.mark.usefixtures("logging_undone")
def test_logs_have_the_request_and_not_what_was_in_it(
    services: Settings, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of gateway and services, over all that can happen to a request."""
    configure_logging("all", "info")
    photo = png()
    with TestClient(create_app(Link(services)), raise_server_exceptions=False) as client:
        mine = {"x-request-id": "mine-7"}
        for accept in ("application/json", "image/png", "text/event-stream"):
            post(client, photo=photo, data={"instruction": SENTENCE},
                 headers={**mine, "accept": accept})  # fmt: skip
        post(client, photo=photo, data={"instruction": SENTENCE, "snr_db": SENTENCE},
             headers=mine)  # fmt: skip
        post(client, photo=b"Theodor", data={"instruction": SENTENCE}, headers=mine)
        later = post(client, photo=photo, data={"instruction": SENTENCE},
                     headers={**mine, "prefer": "respond-async"})  # fmt: skip
        until_done(client, later.headers["location"])
        client.post("/v1/instructions", json={"text": SENTENCE}, headers=mine)
        client.post("/v1/instructions", json={"text": "Theodor \U0001f600"}, headers=mine)
        client.get("/v1/edits/Theodor", headers=mine)
        client.delete(later.headers["location"], headers=mine)

        async def bug(*_: object, **__: object) -> None:
            raise KeyError(SENTENCE)

        monkeypatch.setattr(Link, "read", bug)
        broken = client.post("/v1/instructions", json={"text": SENTENCE}, headers=mine)
        assert broken.status_code == 500
    text = capfd.readouterr().err
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    assert len(lines) > 20
    for line in lines:
        assert line.get("request_id"), line
        assert line["level"] in ("info", "warning", "error")
    assert "mine-7" in {line["request_id"] for line in lines}
    assert {line["event"] for line in lines} >= {"served", "answered", "refused"}
    for word in ("Theodor", "fuller", "beard", "IHDR", "IDAT", "\\x89", SENTENCE):
        assert word not in text, next(line for line in lines if word in json.dumps(line))
