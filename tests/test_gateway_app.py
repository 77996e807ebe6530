"""The REST interface in front of three real services with random weights."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from gateway.answer import K_MAX_DB, K_MIN_DB, SNR_MAX_DB, SNR_MIN_DB, EditAnswer, Order
from gateway.app import create_app
from gateway.desk import Limits
from gateway.edge import FORM_OVERHEAD
from gateway.link import Link
from shared.settings import Settings

MAX_PHOTO = 2**20  # bytes, for these tests


def png(width: int = 40, height: int = 40, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 20).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def client(services: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    samples = tmp_path_factory.mktemp("samples")
    (samples / "face-1.png").write_bytes(png())
    app = create_app(Link(services), max_photo_bytes=MAX_PHOTO, samples=samples)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def send(client: TestClient, photo: bytes | None = None, /, **fields: Any) -> Any:
    """POST an edit; `accept` becomes the header."""
    headers = {"accept": fields.pop("accept")} if "accept" in fields else {}
    data = {"instruction": "-", "align": "false", **fields}
    files = {"image": ("photo.png", png() if photo is None else photo)}
    return client.post("/v1/edits", files=files, data=data, headers=headers)


def problem(answer: Any, status: int, kind: str) -> str:
    """Check an error answer against RFC 9457; gives its detail."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["type"] == f"urn:edsc:problem:{kind}"
    assert body["status"] == status
    assert body["title"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return str(body["detail"])


# ----------------------------------------------------------------------------------- what it is for


def test_an_edit_has_all_the_fields_and_pictures(client: TestClient) -> None:
    answer = send(client, instruction="make the smile bigger", snr_db=6, seed=7, quality="fast")
    assert answer.status_code == 200, answer.text
    body = EditAnswer.model_validate(answer.json())
    assert answer.headers["location"] == f"/v1/edits/{body.id}"
    assert body.edit is not None
    assert list(body.degrees.expected) == [body.edit.attribute]
    assert body.degrees.before is not None
    assert len(body.degrees.after) == 5
    assert (body.snr_db, body.channel, body.seed) == (6, "awgn", 7)
    assert body.cbr.uses == 256
    assert body.cbr.paper == pytest.approx(512 / (3 * 32 * 32))  # these weights draw 32 px
    assert {"read", "decode", "align", "invert", "edit", "encode"} <= set(body.timings_ms)
    assert {"propagate", "receive", "overhead", "total"} <= set(body.timings_ms)
    assert set(body.hops_ms) == {"transmit", "propagate", "receive"}
    for path in body.images.model_dump().values():
        picture = client.get(path)
        assert picture.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(picture.content)).size == (32, 32)
    assert client.get(f"/v1/edits/{body.id}").json() == answer.json()


def test_the_sentence_dash_edits_nothing(client: TestClient) -> None:
    body = send(client).json()
    assert body["edit"] is None
    assert body["reached"] is None
    assert body["degrees"]["before"] is None
    assert body["degrees"]["expected"] == {}


def test_accept_png_gives_the_received_picture(client: TestClient) -> None:
    answer = send(client, accept="image/png", seed=3)
    assert answer.headers["content-type"] == "image/png"
    stored = client.get(f"{answer.headers['location']}/received.png")
    assert answer.content == stored.content


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "application/json"),
        ("text/html,*/*;q=0.8", "application/json"),
        ("image/*", "image/png"),
        ("application/json;q=0.1, image/png", "image/png"),
        ("image/png;q=0, */*", "application/json"),
    ],
)
def test_accept_is_negotiated(client: TestClient, accept: str, media_type: str) -> None:
    assert send(client, accept=accept).headers["content-type"] == media_type


def test_accept_of_nothing_offered_is_406(client: TestClient) -> None:
    assert "image/jpeg" in problem(send(client, accept="image/jpeg"), 406, "not-acceptable")


def test_progress_comes_as_events_and_ends_with_the_answer(client: TestClient) -> None:
    answer = send(client, instruction="add a beard", accept="text/event-stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: ")))
        for block in answer.text.strip().split("\n\n")
        if not block.startswith(":") and (lines := block.split("\n"))
    ]
    names = [name for name, _ in events]
    assert names == ["progress"] * (len(names) - 1) + ["result"]
    stages = list(dict.fromkeys(data["stage"] for name, data in events if name == "progress"))
    assert stages[-2:] == ["propagate", "receive"]
    assert "invert" in stages
    assert client.get(f"/v1/edits/{EditAnswer.model_validate(events[-1][1]).id}").status_code == 200


def test_an_error_in_a_stream_is_a_problem_event(client: TestClient) -> None:
    answer = send(client, b"no picture", accept="text/event-stream")
    name, data = answer.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: problem"
    assert json.loads(data.removeprefix("data: "))["status"] == 415


def test_same_seed_same_picture(client: TestClient) -> None:
    def received(seed: int) -> bytes:
        fields = {"seed": seed, "snr_db": 0, "channel": "rayleigh"}
        return bytes(send(client, accept="image/png", **fields).content)

    assert received(5) == received(5)
    assert received(5) != received(6)


def test_a_seed_is_drawn_and_given_back(client: TestClient) -> None:
    first, second = (send(client).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = send(client, seed=first["seed"]).json()
    pictures = [client.get(body["images"]["received"]).content for body in (first, again)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("channel", ["awgn", "rayleigh", "rician"])
@pytest.mark.parametrize(("fading", "csi"), [("block", "estimated"), ("fast", "perfect")])
def test_every_channel_crosses(client: TestClient, channel: str, fading: str, csi: str) -> None:
    answer = send(client, channel=channel, fading=fading, csi=csi, k_factor_db=3)
    body = answer.json()
    assert answer.status_code == 200, body
    assert body["cbr"]["pilot_uses"] == (8 if csi == "estimated" else 0)
    assert body["cbr"]["uses"] == 256 + body["cbr"]["pilot_uses"]
    assert body["k_factor_db"] == (3 if channel == "rician" else None)
    assert (body["fading_db"] is None) == (csi == "estimated")


def test_instructions_are_read(client: TestClient) -> None:
    body = client.post("/v1/instructions", json={"text": "make the smile bigger"}).json()
    fields = ["attribute", "mode", "direction", "value", "target", "confidence", "description"]
    assert list(body) == fields
    assert client.post("/v1/instructions", json={"text": "-"}).json() is None


def test_the_facts(client: TestClient) -> None:
    attributes = client.get("/v1/attributes").json()
    assert attributes["attributes"][0]["name"] == "bangs"
    assert all(len(a["degrees"]) == attributes["max_degree"] + 1 for a in attributes["attributes"])
    channels = client.get("/v1/channels").json()
    assert [c["name"] for c in channels["channels"]] == ["awgn", "rayleigh", "rician"]
    schemes = client.get("/v1/schemes").json()["schemes"]
    assert schemes[0]["name"] == "editable-deepsc"
    assert schemes[0]["available"]
    model = client.get("/v1/model").json()
    assert model["uses"] == 256
    assert len(model["digest"]) == 64
    assert "generator" in model["networks"]


def test_limits_at_the_edge_are_the_channels_own(client: TestClient) -> None:
    """Said twice, since the gateway refuses before an edit is made; never two different things."""
    from channel_sim.fading import K_FACTOR_MAX_DB
    from channel_sim.service import K_FACTOR_MIN_DB

    channels = client.get("/v1/channels").json()
    assert channels["snr_db"] == {"minimum": SNR_MIN_DB, "maximum": SNR_MAX_DB}
    assert channels["k_factor_db"]["default"] == Order("-").k_factor_db
    assert (K_MIN_DB, K_MAX_DB) == (K_FACTOR_MIN_DB, K_FACTOR_MAX_DB)


def test_health_readiness_metrics(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert set(ready.json()["services"].values()) == {"SERVING"}
    send(client)
    metrics = client.get("/metrics").text
    assert 'edsc_requests_total{code="200",method="POST /v1/edits",service="gateway"}' in metrics
    assert 'edsc_stage_seconds_count{service="gateway",stage="invert"}' in metrics


def test_the_pages_need_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
    for file in (Path(__file__).parent.parent / "gateway" / "static").iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        text = text.replace("http://127.0.0.1:8000", "")
        assert "http://" not in text, file.name
        assert "https://" not in text, file.name
        assert client.get(f"/static/{file.name}").status_code == 200
    assert client.get("/openapi.json").json()["paths"]["/v1/edits"]["post"]["requestBody"]


def test_samples_are_listed_and_served(client: TestClient) -> None:
    (sample,) = client.get("/v1/samples").json()["samples"]
    assert client.get(sample["image"]).content == png()


def test_request_ids_go_in_and_out(client: TestClient) -> None:
    mine = client.get("/v1/model", headers={"x-request-id": "mine-42"})
    assert mine.headers["x-request-id"] == "mine-42"
    broken = client.get("/healthz", headers={"x-request-id": "a b\tc" * 60})
    assert len(broken.headers["x-request-id"]) == 32


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("snr_db", "nan", "finite"),
        ("snr_db", "inf", "finite"),
        ("snr_db", "-inf", "finite"),
        ("snr_db", "-100", "-20"),
        ("snr_db", "1000", "40"),
        ("snr_db", "loud", "number"),
        ("channel", "nakagami", "'awgn', 'rayleigh' or 'rician'"),
        ("k_factor_db", "-3", "0"),
        ("k_factor_db", "nan", "finite"),
        ("fading", "slow", "'block' or 'fast'"),
        ("csi", "none", "'perfect' or 'estimated'"),
        ("seed", "-1", "0"),
        ("seed", str(2**64), str(2**53 - 1)),
        ("seed", "1.5", "integer"),
        ("quality", "best", "'fast', 'balanced' or 'paper'"),
        ("scheme", "jpeg", "editable-deepsc"),
        ("align", "perhaps", "bool"),
        ("instruction", "", "missing or empty"),
        ("instruction", "   ", "empty"),
        ("instruction", "smile " * 2000, "2000"),
    ],
)
def test_a_field_out_of_range_is_named(
    client: TestClient, field: str, value: str, said: str
) -> None:
    detail = problem(send(client, **{field: value}), 422, "invalid-request")
    assert field in detail
    assert said in detail


def test_two_wrong_fields_are_both_named(client: TestClient) -> None:
    answer = send(client, snr_db="nan", channel="foo")
    assert {e["field"] for e in answer.json()["errors"]} == {"snr_db", "channel"}


def test_fast_fading_cannot_be_estimated(client: TestClient) -> None:
    answer = send(client, channel="rayleigh", fading="fast", csi="estimated")
    assert "pilots" in problem(answer, 422, "invalid-request")


def test_a_sentence_without_words_is_refused(client: TestClient) -> None:
    problem(send(client, instruction="😀😀😀"), 422, "instruction-refused")
    problem(client.post("/v1/instructions", json={"text": "😀"}), 422, "instruction-refused")


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"text": "a" * 2001}, {"text": 5}, []])
def test_a_wrong_instruction_body_is_refused(client: TestClient, body: Any) -> None:
    problem(client.post("/v1/instructions", json=body), 422, "invalid-request")


def test_broken_json_is_refused(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/instructions", content=b'{"text": ', headers=headers)
    problem(answer, 422, "invalid-request")


@pytest.mark.parametrize(
    ("photo", "status", "kind"),
    [
        (b"", 422, "invalid-request"),
        (b"not a picture at all", 415, "unsupported-image"),
        (png()[:200], 415, "unsupported-image"),
        (png(1, 1), 422, "invalid-request"),
    ],
    ids=["empty", "text", "truncated", "1x1"],
)
def test_a_bad_photo_is_refused(client: TestClient, photo: bytes, status: int, kind: str) -> None:
    problem(send(client, photo), status, kind)


def test_a_photo_without_a_face_is_refused(client: TestClient) -> None:
    assert "face" in problem(send(client, align="true"), 422, "no-face-found")


def test_a_form_without_a_photo_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/edits", data={"instruction": "-"}, files={"other": b"x"})
    assert "image" in problem(answer, 422, "invalid-request")
    text = client.post("/v1/edits", files={"image": (None, "a string"), "instruction": (None, "-")})
    problem(text, 422, "invalid-request")


def test_another_media_type_is_415(client: TestClient) -> None:
    answer = client.post("/v1/edits", json={"instruction": "-"})
    assert "multipart/form-data" in problem(answer, 415, "unsupported-media-type")


def test_a_broken_form_is_refused(client: TestClient) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    problem(client.post("/v1/edits", content=b"--y\r\n\r\n", headers=headers), 400, "bad-request")
    headers = {"content-type": "multipart/form-data"}
    problem(client.post("/v1/edits", content=b"--y\r\n\r\n", headers=headers), 400, "bad-request")


def test_a_photo_over_the_limit_is_413(client: TestClient) -> None:
    problem(send(client, bytes(MAX_PHOTO + 1)), 413, "payload-too-large")


def test_a_body_over_the_limit_is_413_before_it_is_read(client: TestClient) -> None:
    answer = send(client, bytes(MAX_PHOTO + FORM_OVERHEAD + 1))
    assert "1 MiB" in problem(answer, 413, "payload-too-large")


def test_a_body_of_unknown_length_is_stopped_at_the_limit(client: TestClient) -> None:
    def body() -> Iterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="image"; filename="p"\r\n\r\n'
        for _ in range(64):
            yield bytes(2**16)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/edits", content=body(), headers=headers)
    problem(answer, 413, "payload-too-large")


def test_what_is_not_there_is_404(client: TestClient) -> None:
    edit = send(client).json()["id"]
    for path in ("/v2", "/v1/edits/none", "/v1/edits/none/sent.png", f"/v1/edits/{edit}/no.png"):
        problem(client.get(path), 404, "not-found")
    problem(client.get("/static/../app.py"), 404, "not-found")
    problem(client.get("/samples/none.png"), 404, "not-found")
    problem(client.delete("/v1/edits/none"), 404, "not-found")


def test_another_method_is_405(client: TestClient) -> None:
    answer = client.put("/v1/edits")
    problem(answer, 405, "method-not-allowed")
    assert "POST" in answer.headers["allow"]


def test_an_edit_can_be_deleted(client: TestClient) -> None:
    body = send(client).json()
    assert client.delete(f"/v1/edits/{body['id']}").status_code == 204
    problem(client.get(f"/v1/edits/{body['id']}"), 404, "not-found")
    problem(client.get(body["images"]["sent"]), 404, "not-found")


# -------------------------------------------------------------------------------------- under load


def test_too_many_edits_at_once_are_429(services: Settings) -> None:
    app = create_app(Link(services), limits=Limits(max_in_flight=1))
    with TestClient(app) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: send(client), range(8)))
    assert {a.status_code for a in answers} == {200, 429}
    turned_away = next(a for a in answers if a.status_code == 429)
    problem(turned_away, 429, "busy")
    assert int(turned_away.headers["retry-after"]) >= 1


def test_services_that_are_down_are_503_in_time() -> None:
    nowhere = {f"{name}_target": "127.0.0.1:9" for name in ("transmitter", "channel", "receiver")}
    with TestClient(create_app(Link(Settings(**nowhere)))) as client:  # type: ignore[arg-type]
        start = time.monotonic()
        answer = send(client)
        assert time.monotonic() - start < 5
        assert "transmitter" in problem(answer, 503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["services"]["receiver"] == "NOT_SERVING"
        assert client.get("/healthz").status_code == 200
        assert client.get("/").status_code == 200


def test_the_gateway_process_loads_no_torch() -> None:
    code = (
        "import sys; from gateway.app import create_app; from gateway.link import Link;"
        "from shared.settings import Settings; create_app(Link(Settings()));"
        "print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
