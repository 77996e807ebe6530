"""The receiver process's servicer over real gRPC, with a small untrained bundle."""

import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from receiver.pipeline import Receiver
from receiver.service import MAX_MESSAGES, register
from shared.bundle import Bundle, write_net
from shared.errors import EdscError, InvalidRequest, PayloadTooLarge, Unavailable
from shared.images import encode_png
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import Server, open_channel, serve, translated
from shared.settings import Settings
from shared.stylegan2 import Generator, GeneratorConfig
from shared.symbols import Reception
from shared.wire import reception_to_wire


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of 32 px that was never trained; adapters come untrained without a net."""
    folder = tmp_path_factory.mktemp("bundles") / "small-32"
    torch.manual_seed(3)
    config = GeneratorConfig(image_size=32, channels=(8, 8, 8, 8))
    tensors = Generator(config).state_dict()
    write_net(folder, "generator", config=config.to_json(), tensors=tensors, provenance={})
    return folder


@pytest.fixture(scope="module")
def stub(small_bundle: Path) -> Iterator[Any]:
    settings = Settings(receiver_port=0, weights=small_bundle, precision="float32")
    server = Server(settings, "receiver")
    load = register(server)
    port = server.start()
    client = settings.model_copy(update={"receiver_target": f"127.0.0.1:{port}"})
    with open_channel(client, "receiver") as channel:
        server.ready()  # ahead of time, to see what an early call gets
        early = edsc_pb2_grpc.ReceiverStub(channel)
        with pytest.raises(Unavailable, match="still loading"), translated("receiver"):
            early.Receive(_request(), timeout=5)
        server.worker.submit(None, load).result(30)
        yield early
    server.drain(0.0)


def _reception(messages: int = 1, uses: int = 256, csi: str = "block") -> Reception:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(messages, n, dtype=torch.complex64, generator=generator)  # [B, n]

    return Reception(
        y=draw(uses),
        h=None if csi == "pilots" else draw(uses if csi == "fast" else 1),
        pilots=draw(8) if csi == "pilots" else None,
        noise_variance=torch.full((messages,), 0.25),
    )


def _request(messages: int = 1, uses: int = 256, csi: str = "block") -> edsc_pb2.ReceiveRequest:
    return edsc_pb2.ReceiveRequest(frame=reception_to_wire(_reception(messages, uses, csi)))


@pytest.mark.parametrize("csi", ["block", "fast", "pilots"])
def test_the_service_is_the_receiver(stub: Any, small_bundle: Path, csi: str) -> None:
    reply = stub.Receive(_request(2, csi=csi), timeout=10)
    here = Receiver.from_bundle(Bundle.open(small_bundle))(_reception(2, csi=csi))
    assert list(reply.png) == [encode_png(here[:1]), encode_png(here[1:])]
    assert reply.image_size == 32
    with Image.open(io.BytesIO(reply.png[0])) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (32, 32), "RGB")
    assert {"queue", "decode", "receive", "pictures", "total"} <= set(reply.timings_ms)


def test_the_receiver_names_its_weights(stub: Any, small_bundle: Path) -> None:
    told = stub.Describe(edsc_pb2.DescribeModelRequest(), timeout=5)
    assert told.digest == Bundle.open(small_bundle).digest
    assert (told.name, told.uses, told.image_size) == ("small-32", 256, 32)
    assert list(told.attributes) == ["bangs", "eyeglasses", "beard", "smiling", "age"]


def _broken(how: str) -> edsc_pb2.ReceiveRequest:
    request = _request()
    frame = request.frame
    if how == "nan":
        frame.samples = b"\0\0\xc0\x7f" + frame.samples[4:]
    elif how == "short":
        frame.samples = frame.samples[:-8]
    elif how == "length":
        return _request(uses=255)
    elif how == "silent noise":
        frame.noise_variance[0] = 0.0
    elif how == "no csi":
        frame.csi, frame.csi_uses = b"", 0
    elif how == "many":
        return _request(MAX_MESSAGES + 1)
    elif how == "empty":
        return edsc_pb2.ReceiveRequest()
    return request


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("nan", InvalidRequest, "samples[0] is nan; expected every sample to be finite"),
        ("short", InvalidRequest, "samples is 2040 bytes; expected 2048"),
        ("length", InvalidRequest, "frame has 255 uses per message; expected 256"),
        ("silent noise", InvalidRequest, "noise_variance is 0; expected"),
        ("no csi", InvalidRequest, "either h or pilots; got neither"),
        ("many", PayloadTooLarge, "frame has 65 messages; expected at most 64"),
        ("empty", InvalidRequest, "frame has 0 uses per message; expected 256"),
    ],
)
def test_the_receiver_refuses_broken_frames(
    stub: Any, how: str, kind: type[EdscError], message: str
) -> None:
    with pytest.raises(EdscError) as refused, translated("receiver"):
        stub.Receive(_broken(how), timeout=5)
    assert type(refused.value) is kind
    assert message in str(refused.value)
    assert len(stub.Receive(_request(), timeout=5).png) == 1  # the next call is served


@pytest.mark.usefixtures("logging_undone")
@pytest.mark.parametrize("broken", ["missing", "changed"])
def test_a_broken_bundle_stops_the_process_with_a_message(
    broken: str,
    small_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only the main thread of a process of its own may install handlers.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    if broken == "changed":
        for path in small_bundle.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "generator.safetensors").write_bytes(b"something else")
    status = serve(Settings(receiver_port=0, weights=tmp_path), "receiver", register)
    told = capfd.readouterr().err.splitlines()[-1]
    assert status == 1
    assert told.startswith("the receiver cannot start: ")
    assert str(tmp_path) in told
