"""The services on a real Ray Serve of this machine, behind the front and the gateway."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from PIL import Image

from edsc.ray_up import Gateway
from edsc.runner import InProcess, Remote
from edsc.service import ray_services
from gateway.answer import ChannelName, Order, Quality
from shared.errors import InstructionRefused, InvalidRequest, UnsupportedImage
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import FULL_NAMES, open_channel
from shared.settings import Settings

# Ray leaves files, sockets and processes to their finalisers.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("ray", reason="Ray is not installed: pip install '.[scale]'")


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(file, "PNG")
    return file.getvalue()


SQUARE = picture()


@pytest.fixture(scope="module")
def settings(random_bundle: Path) -> Iterator[Settings]:
    """Two replicas of the transmitter on a Ray of this machine; where to find them."""
    here = Settings(weights=random_bundle, threads=1, queue_size=8, log_level="warning")
    with ray_services(here, {"transmitter": 2}) as there:
        yield there


@pytest.fixture(scope="module")
def gateway(settings: Settings) -> Iterator[Gateway]:
    with Gateway(settings, free_port=True) as gateway:
        yield gateway


def test_ray_gives_what_the_pipelines_give(
    gateway: Gateway, settings: Settings, random_bundle: Path
) -> None:
    in_process = InProcess(random_bundle)
    orders = [
        Order("-", align=False, seed=1, snr_db=6.0, quality=Quality.FAST),
        Order("make the smile bigger", align=False, seed=2, snr_db=-6.0),
        Order("-", align=False, seed=3, channel=ChannelName.RAYLEIGH),
    ]
    with Remote(gateway.url) as remote:
        for order in orders:
            there, here = remote.edit("", SQUARE, order), in_process.edit("here", SQUARE, order)
            unlike = {"id", "images", "timings_ms", "hops_ms"}
            assert there.answer.model_dump(exclude=unlike) == here.answer.model_dump(exclude=unlike)
            for name in here.pictures:
                with (
                    Image.open(io.BytesIO(here.pictures[name])) as a,
                    Image.open(io.BytesIO(there.pictures[name])) as b,
                ):
                    assert a.tobytes() == b.tobytes()


def test_errors_cross_ray_as_they_are(gateway: Gateway) -> None:
    with Remote(gateway.url) as remote:
        with pytest.raises(UnsupportedImage):
            remote.edit("", b"%PDF-1.7", Order("-", align=False))
        with pytest.raises(InvalidRequest, match="face"):
            remote.edit("", SQUARE, Order("-"))
        with pytest.raises(InstructionRefused):
            remote.edit("", SQUARE, Order("😀", align=False))
    with httpx.Client(base_url=gateway.url, timeout=30.0) as http:
        answer = http.post("/v1/instructions", json={"text": "😀"}, headers={"x-request-id": "abc"})
    assert (answer.status_code, answer.json()["request_id"]) == (422, "abc")


def test_progress_and_facts_cross_ray(gateway: Gateway, settings: Settings) -> None:
    with httpx.Client(base_url=gateway.url, timeout=60.0) as http:
        assert http.get("/readyz").json()["services"] == dict.fromkeys(FULL_NAMES, "SERVING")
        assert http.get("/v1/model").json()["image_size"] == 32
        assert {c["name"] for c in http.get("/v1/channels").json()["channels"]} >= {"awgn"}
        events = http.post(
            "/v1/edits",
            files={"image": ("a.png", SQUARE)},
            data={"instruction": "-", "align": "false"},
            headers={"accept": "text/event-stream"},
        ).text
    assert "event: progress" in events
    assert events.count("event: result") == 1


def test_work_past_its_deadline_is_dropped_on_the_cluster(settings: Settings) -> None:
    """Six long edits, given up at once, would keep both replicas busy for three times as long."""
    long, short = (
        edsc_pb2.TransmitRequest(
            image=SQUARE, instruction="-", snr_db=6.0, quality=quality, align=False
        )
        for quality in ("paper", "fast")
    )
    with open_channel(settings, "transmitter") as channel:
        stub = edsc_pb2_grpc.TransmitterStub(channel)
        start = time.perf_counter()
        stub.Transmit(long, timeout=120.0)
        one_s = time.perf_counter() - start
        given_up = [stub.Transmit.future(long, timeout=0.1 * one_s) for _ in range(6)]
        for call in given_up:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        start = time.perf_counter()
        stub.Transmit(short, timeout=120.0)
        assert time.perf_counter() - start < 1.5 * one_s


def test_a_replica_that_dies_is_made_again(gateway: Gateway) -> None:
    import ray

    def names() -> set[str]:
        found = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in found if "edsc-transmitter" in actor["name"]}

    before = names()
    assert len(before) == 2
    victim = sorted(before)[0]
    ray.kill(ray.get_actor(victim, namespace="serve"))
    failures, deadline = [], time.monotonic() + 120.0
    with httpx.Client(base_url=gateway.url, timeout=60.0) as http:
        while time.monotonic() < deadline:
            answer = http.post(
                "/v1/edits",
                files={"image": ("a.png", SQUARE)},
                data={"instruction": "-", "align": "false", "quality": "fast"},
            )
            failures += [answer.status_code] if answer.status_code != 200 else []
            if len(names()) == 2 and victim not in names() and answer.status_code == 200:
                break
        assert victim not in names()
        assert len(names()) == 2
    # Retried at the other replica: at most the calls that were under way may end as 503.
    assert set(failures) <= {503}
