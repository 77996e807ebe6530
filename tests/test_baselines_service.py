"""Schemes other than Editable-DeepSC over the wire: refused with what to start, or carried.

The process itself loads Sionna, so what needs it is slow; those tests use five real processes, as
`edsc up --baselines` starts them, and the pipelines in this process as their oracle.
"""

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

from edsc.cli import app as cli
from edsc.runner import InProcess, Remote
from edsc.up import Stack
from gateway.answer import ChannelName, Csi, Fading, Order, Quality
from gateway.app import create_app
from gateway.link import Link
from shared.errors import InvalidRequest, RateUnreachable, Unavailable
from shared.images import encode_png
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.schemes import PLANS, Scheme
from shared.settings import Settings
from shared.wire import degrees_to_wire

BASELINES = [scheme.value for scheme in Scheme if PLANS[scheme].is_baseline]


@pytest.fixture(scope="module")
def photo() -> bytes:
    draws = torch.Generator().manual_seed(1)
    small = torch.randn(1, 3, 5, 5, generator=draws) * 0.5
    return encode_png(torch.nn.functional.interpolate(small, 32, mode="bicubic").clamp(-1, 1))


# ------------------------------------------------------------------------ without the fifth process


@pytest.fixture
def client(services: Settings) -> Iterator[TestClient]:
    # Port 1 is nobody's: whatever runs on this machine, no baselines are found.
    alone = services.model_copy(update={"baselines_target": "127.0.0.1:1"})
    with TestClient(create_app(Link(alone)), raise_server_exceptions=False) as client:
        yield client


def test_without_its_process_a_scheme_says_what_to_start(client: TestClient, photo: bytes) -> None:
    answer = client.post(
        "/v1/edits",
        files={"image": ("photo.png", photo)},
        data={"instruction": "-", "align": "false", "scheme": "jpeg-ldpc+edit"},
    )
    assert answer.status_code == 503
    detail = answer.json()["detail"]
    assert "jpeg-ldpc+edit" in detail
    assert "edsc up --baselines" in detail
    assert "python -m baselines" in detail


def test_the_list_of_schemes_needs_no_process(client: TestClient) -> None:
    entries = client.get("/v1/schemes").json()["schemes"]
    assert [entry["name"] for entry in entries] == [scheme.value for scheme in Scheme]
    own, *others = entries
    assert own["available"]
    assert own["cbr"]["uses"] == 256
    assert not any(entry["available"] or entry["cbr"] for entry in others)
    assert all("edsc up --baselines" in entry["missing"] for entry in others)


def test_transmitter_and_receiver_carry_their_own_scheme_alone(
    services: Settings, photo: bytes
) -> None:
    request = edsc_pb2.TransmitRequest(
        image=photo, instruction="-", snr_db=6.0, align=False, scheme="edit+deepsc"
    )
    with grpc.insecure_channel(services.transmitter_target) as channel:
        stub = edsc_pb2_grpc.TransmitterStub(channel)
        with pytest.raises(grpc.RpcError, match="baselines"):
            stub.Transmit(request, timeout=30)
        request.scheme = "editable-deepsc"
        assert stub.Transmit(request, timeout=30).frame.uses == 256
        request.scheme = "pigeon"
        with pytest.raises(grpc.RpcError, match="pigeon"):
            stub.Transmit(request, timeout=30)
        about = stub.DescribeModel(edsc_pb2.DescribeModelRequest(), timeout=30)
        assert [scheme.name for scheme in about.schemes] == ["editable-deepsc"]
    with (
        grpc.insecure_channel(services.receiver_target) as channel,
        pytest.raises(grpc.RpcError, match="baselines"),
    ):
        edsc_pb2_grpc.ReceiverStub(channel).Receive(
            edsc_pb2.ReceiveRequest(scheme="edit+deepsc"), timeout=30
        )


def test_degrees_on_the_wire_are_the_predictors() -> None:
    from shared.attributes import Attribute, Edit

    edit = Edit(Attribute.BEARD, change=1)
    found = degrees_to_wire((0, 1, 2, 3, 4), (0, 1, 1, 3, 4), edit, 2)
    assert [entry.after for entry in found] == [0, 1, 2, 3, 4]
    assert [entry.HasField("expected") for entry in found] == [False, False, True, False, False]
    assert found[2].before == 1
    assert not degrees_to_wire((0, 1, 2, 3, 4))[0].HasField("before")


def test_edit_and_batch_take_a_scheme(photo: bytes, baselines_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    picture.write_bytes(photo)
    run = CliRunner()
    common = ["--weights", str(baselines_bundle)]
    done = run.invoke(
        cli,
        [
            "edit", str(picture), "make the smile bigger", "-o", str(tmp_path / "out.png"),
            "--no-align", "--quality", "fast", "--scheme", "deepsc+edit", "--snr-db", "20",
            "--json", *common,
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["scheme"] == "deepsc+edit"
    assert answer["cbr"]["header_uses"] == 128
    assert answer["degrees"]["before"] is not None
    rows = [
        {"image": "photo.png", "instruction": "-", "align": "false", "scheme": scheme}
        for scheme in ("pca-lmmse", "", "pigeon")
    ]
    jobs = tmp_path / "jobs.csv"
    with jobs.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    done = run.invoke(cli, ["batch", str(jobs), "--out", str(tmp_path / "out"), *common])
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line.get("scheme") for line in found] == ["pca-lmmse", "editable-deepsc", "pigeon"]
    assert "error" not in found[0]
    assert "scheme" in found[2]["error"]


# ---------------------------------------------------------------------------- five real processes


@pytest.fixture(scope="module")
def stack(baselines_bundle: Path) -> Iterator[Stack]:
    settings = Settings(
        weights=baselines_bundle, threads=1, default_deadline_s=60.0, log_level="warning"
    )
    with Stack(settings, free_ports=True, baselines=True) as stack:
        yield stack


@pytest.fixture(scope="module")
def in_process(baselines_bundle: Path) -> InProcess:
    return InProcess(baselines_bundle)


def order_of(scheme: str, sentence: str = "make the smile bigger", **fields: object) -> Order:
    chosen = {"align": False, "seed": 5, "snr_db": 8.0, "quality": Quality.FAST, **fields}
    return Order(sentence, scheme=Scheme(scheme), **chosen)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [name for name in BASELINES if "avif" not in name])
def test_five_processes_give_what_the_pipelines_give(
    stack: Stack, in_process: InProcess, photo: bytes, scheme: str
) -> None:
    what = order_of(scheme)
    here = in_process.edit("here", photo, what)
    with Remote(stack.url) as remote:
        there = remote.edit("", photo, what)
    assert there.pictures == here.pictures
    unlike = {"id", "images", "timings_ms", "hops_ms"}
    assert there.answer.model_dump(exclude=unlike) == here.answer.model_dump(exclude=unlike)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        order_of("jpeg-ldpc+edit", snr_db=-6.0),
        order_of("edit+jpeg-ldpc", channel=ChannelName.RAYLEIGH, csi=Csi.ESTIMATED, snr_db=15.0),
        order_of("deepsc+edit", channel=ChannelName.RICIAN, fading=Fading.FAST, snr_db=0.0),
        order_of("jpeg-ldpc-r12+edit", "-"),
    ],
    ids=["lost", "pilots", "fast", "unedited"],
)
def test_every_channel_treats_a_baseline_alike(
    stack: Stack, in_process: InProcess, photo: bytes, what: Order
) -> None:
    here = in_process.edit("here", photo, what)
    with Remote(stack.url) as remote:
        there = remote.edit("", photo, what)
    assert there.pictures == here.pictures
    assert there.answer.cbr == here.answer.cbr
    assert there.answer.code == here.answer.code
    assert there.answer.notes == here.answer.notes
    if what.snr_db < 0 and here.answer.code is not None:
        assert any("could not be decoded" in note for note in there.answer.notes)
        assert any("lost on the way" in note for note in there.answer.notes)


@pytest.mark.slow
def test_the_list_says_what_each_scheme_costs(stack: Stack) -> None:
    entries = httpx.get(f"{stack.url}/v1/schemes").json()["schemes"]
    by_name = {entry["name"]: entry for entry in entries}
    assert all(entry["available"] for entry in entries)
    jpeg = by_name["edit+jpeg-ldpc"]["cbr"]
    assert jpeg["printed"] == pytest.approx(0.0389, abs=5e-5)
    assert jpeg["complex_uses"] > 0.35
    assert jpeg["paper"] == pytest.approx(2 * jpeg["complex_uses"])
    assert by_name["edit+deepsc"]["cbr"]["paper"] == pytest.approx(1 / 12)
    assert by_name["pca-lmmse"]["cbr"]["uses"] == 256
    assert by_name["pca-lmmse"]["cbr"]["printed"] is None


@pytest.mark.slow
def test_the_fifth_process_is_a_service_like_the_others(stack: Stack) -> None:
    with grpc.insecure_channel(stack.target("baselines")) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its methods exist at run time only
        for name in ("", "edsc.v1.Transmitter", "edsc.v1.Receiver"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc
        stub = reflection.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (listed,) = stub.ServerReflectionInfo(asked, timeout=10)
        names = {service.name for service in listed.list_services_response.service}
        assert {"edsc.v1.Transmitter", "edsc.v1.Receiver", "grpc.health.v1.Health"} <= names
        transmitter = edsc_pb2_grpc.TransmitterStub(channel)
        request = edsc_pb2.ReadInstructionRequest(instruction="-")
        assert not transmitter.ReadInstruction(request, timeout=10).HasField("edit")


@pytest.mark.slow
def test_progress_of_a_baseline_tells_its_own_stages(stack: Stack, photo: bytes) -> None:
    with httpx.stream(
        "POST",
        f"{stack.url}/v1/edits",
        files={"image": ("photo.png", photo)},
        data={"instruction": "-", "align": "false", "scheme": "edit+jpeg-ldpc"},
        headers={"accept": "text/event-stream"},
        timeout=60.0,
    ) as answer:
        text = "".join(answer.iter_text())
    stages = [
        json.loads(line[6:])["stage"]
        for line in text.splitlines()
        if line.startswith("data: ") and '"stage"' in line and '"elapsed_ms"' in line
    ]
    assert stages.index("compress") < stages.index("encode") < stages.index("propagate")
    assert "event: result" in text


@pytest.mark.slow
def test_what_a_scheme_cannot_do_is_said_over_rest(stack: Stack, photo: bytes) -> None:
    with Remote(stack.url) as remote:
        with pytest.raises(RateUnreachable, match=r"AVIF takes \d+ bytes"):
            remote.edit("", photo, order_of("avif-ldpc-r13+edit"))
        with pytest.raises(InvalidRequest, match="snr_db"):
            remote.edit("", photo, order_of("jpeg-ldpc+edit", snr_db=99.0))


@pytest.mark.slow
def test_a_bundle_without_the_codec_offers_the_rest(random_bundle: Path, photo: bytes) -> None:
    settings = Settings(weights=random_bundle, threads=1, log_level="warning")
    with Stack(settings, free_ports=True, baselines=True) as stack:
        entries = httpx.get(f"{stack.url}/v1/schemes").json()["schemes"]
        missing = [entry["name"] for entry in entries if not entry["available"]]
        assert missing == ["deepsc+edit", "edit+deepsc"]
        with Remote(stack.url) as remote:
            with pytest.raises(Unavailable, match="deepsc"):
                remote.edit("", photo, order_of("deepsc+edit"))
            assert remote.edit("", photo, order_of("pca-lmmse")).answer.cbr.uses == 256


@pytest.mark.slow
def test_up_with_baselines_ends_with_them(baselines_bundle: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable, "-u", "-m", "edsc.cli", "up", "--free-ports", "--baselines",
            "--weights", str(baselines_bundle),
        ],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=60)[1]
        url = line.split()[4]
        entries = httpx.get(f"{url}/v1/schemes").json()["schemes"]
        assert all(entry["available"] for entry in entries)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    finally:
        process.kill()
        process.communicate()
