"""The transmitter process's servicer over real gRPC, with a small bundle that was never trained.

Its text encoder always reads "smiling, one degree more"; everything else is random.
"""

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shared.attributes import ATTRIBUTES
from shared.bundle import Bundle, write_net
from shared.errors import (
    DeadlineExceeded,
    EdscError,
    InstructionRefused,
    InvalidRequest,
    NoFaceFound,
    PayloadTooLarge,
    UnsupportedImage,
)
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import Server, open_channel, translated
from shared.settings import MIB, Settings
from shared.stylegan2 import Generator, GeneratorConfig
from shared.wire import frame_from_wire
from transmitter.faces import FaceNetConfig, FaceNets, FinderConfig, bundle_config
from transmitter.fields import Fields, FieldsConfig
from transmitter.inversion import InversionConfig, InversionEncoder
from transmitter.predictor import Predictor, PredictorConfig
from transmitter.service import register
from transmitter.text import TextConfig, TextEncoder

SIZE = 32


def _reader() -> TextEncoder:
    """In scope, smiling, a change, more, by one: whatever the sentence."""
    encoder = TextEncoder(TextConfig(pieces=64, width=8, hidden=8, members=1))
    encoder.get_parameter("members.0.heads.weight").data.zero_()
    chosen = [[9, 0, 0], [0, 0, 0, 9, 0], [9, 0], [9, 0], [9, 0, 0, 0, 0], [0] * 6]
    bias = encoder.get_parameter("members.0.heads.bias")
    bias.data.copy_(torch.tensor([float(v) for head in chosen for v in head]))
    return encoder


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "small-32"
    torch.manual_seed(3)
    generator = GeneratorConfig(image_size=SIZE, channels=(8, 8, 8, 8))
    inversion = InversionConfig(image_size=SIZE, channels=(8, 8, 8))
    predictor = PredictorConfig(resolution=SIZE, widths=(8, 8, 8), depths=(0, 0, 0))
    fields = FieldsConfig(depth=2)
    faces = FaceNetConfig(widths=(4, 4, 4, 4, 4), blocks=(1, 1, 1))
    reader = _reader()
    nets: dict[str, tuple[dict[str, Any], torch.nn.Module]] = {
        "generator": (generator.to_json(), Generator(generator)),
        "inversion": (inversion.to_json(), InversionEncoder(inversion)),
        "predictor": (predictor.to_json(), Predictor(predictor)),
        "fields": (fields.to_json(), Fields(fields)),
        # No score reaches 2: this finder finds nothing.
        "faces": (bundle_config(faces, FinderConfig(threshold=2.0)), FaceNets(faces)),
        "text": (reader.config.to_json(), reader),
    }
    for net, (config, module) in nets.items():
        write_net(folder, net, config=config, tensors=module.state_dict(), provenance={})
    return folder


@pytest.fixture(scope="module")
def served(small_bundle: Path) -> Iterator[tuple[Server, Any]]:
    settings = Settings(transmitter_port=0, weights=small_bundle, max_image_mib=1)
    server = Server(settings, "transmitter")
    load = register(server)
    port = server.start()
    server.worker.submit(None, load).result(60)
    server.ready()
    client = settings.model_copy(update={"transmitter_target": f"127.0.0.1:{port}"})
    with open_channel(client, "transmitter") as channel:
        yield server, edsc_pb2_grpc.TransmitterStub(channel)
    server.drain(0.0)


@pytest.fixture(scope="module")
def stub(served: tuple[Server, Any]) -> Any:
    return served[1]


def _photo(width: int = SIZE, height: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def _request(**fields: Any) -> edsc_pb2.TransmitRequest:
    given = {
        "image": _photo(), "instruction": "smile, please", "snr_db": 6.0, "quality": "fast",
        "align": False, **fields,
    }  # fmt: skip
    return edsc_pb2.TransmitRequest(**given)


def test_an_edit(stub: Any) -> None:
    reply = stub.Transmit(_request(), timeout=20)
    symbols, snr_db = frame_from_wire(reply.frame)  # checks power and finiteness
    assert symbols.shape == (1, 256)
    assert snr_db == 6.0
    assert (reply.edit.attribute, reply.edit.change) == ("smiling", 1)
    assert (reply.edit.direction, reply.edit.description) == ("more", "smiling: 1 degree more")
    assert 0.5 < reply.edit.confidence <= 1.0
    assert [d.attribute for d in reply.degrees] == list(ATTRIBUTES)
    for degrees in reply.degrees:
        assert degrees.HasField("before")
        assert degrees.HasField("expected") == (degrees.attribute == "smiling")
    assert reply.HasField("reached")
    assert reply.faces_found == 0
    for png in (reply.aligned_png, reply.sent_png):
        with Image.open(io.BytesIO(png)) as picture:
            assert (picture.format, picture.size) == ("PNG", (SIZE, SIZE))
    timings = reply.timings_ms
    assert {"queue", "decode", "invert", "edit", "encode", "pictures", "total"} <= set(timings)
    assert sum(ms for stage, ms in timings.items() if stage != "total") <= timings["total"]


def test_no_edit(stub: Any) -> None:
    reply = stub.Transmit(_request(instruction=" - ", omit_pictures=True), timeout=20)
    assert not reply.HasField("edit")
    assert not reply.HasField("reached")
    assert not reply.aligned_png
    assert not reply.sent_png
    for degrees in reply.degrees:
        assert not degrees.HasField("before")
        assert not degrees.HasField("expected")
        assert degrees.HasField("after")


def test_the_stream_ends_with_the_same_reply(stub: Any) -> None:
    *progress, last = stub.TransmitStream(_request(), timeout=20)
    assert last.WhichOneof("event") == "reply"
    assert last.reply.frame == stub.Transmit(_request(), timeout=20).frame
    stages = [event.progress.stage for event in progress]
    assert list(dict.fromkeys(stages)) == [
        "read", "decode", "align", "invert", "edit", "encode", "draw"
    ]  # fmt: skip
    assert all(0.0 <= event.progress.fraction <= 1.0 for event in progress)
    elapsed = [event.progress.elapsed_ms for event in progress]
    assert elapsed == sorted(elapsed)


def test_stream_refuses_like_the_call(stub: Any) -> None:
    with pytest.raises(NoFaceFound), translated("transmitter"):
        list(stub.TransmitStream(_request(align=True), timeout=20))
    with pytest.raises(InvalidRequest, match="image has 0 bytes"), translated("transmitter"):
        list(stub.TransmitStream(_request(image=b""), timeout=20))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"image": b""}, InvalidRequest, "image has 0 bytes"),
        ({"image": b"GIF89a nothing"}, UnsupportedImage, ""),
        ({"image": _photo()[:200]}, InvalidRequest, ""),
        ({"image": bytes(MIB + 1)}, PayloadTooLarge, f"expected at most {MIB}"),
        ({"image": _photo(64, 32)}, InvalidRequest, "64 x 32"),
        ({"align": True}, NoFaceFound, "no face"),
        ({"instruction": ""}, InvalidRequest, "instruction is empty"),
        ({"instruction": " \n"}, InvalidRequest, "instruction is empty"),
        ({"instruction": "x" * 10_000}, InvalidRequest, "10000 characters; expected at most 2000"),
        ({"instruction": "😀😀"}, InstructionRefused, "no words"),
        ({"snr_db": None}, InvalidRequest, "snr_db is missing"),
        ({"snr_db": float("nan")}, InvalidRequest, "snr_db is nan"),
        ({"snr_db": -100.0}, InvalidRequest, "snr_db is -100"),
        ({"snr_db": 1000.0}, InvalidRequest, "snr_db is 1000"),
        ({"quality": "best"}, InvalidRequest, "expected one of fast, balanced, paper"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:24],
)
def test_what_cannot_be_sent_is_refused(
    stub: Any, fields: dict[str, Any], kind: type[EdscError], message: str
) -> None:
    with pytest.raises(EdscError) as refused, translated("transmitter"):
        stub.Transmit(_request(**fields), timeout=20)
    assert isinstance(refused.value, kind)
    assert message in str(refused.value)


def test_align_is_the_default(stub: Any) -> None:
    request = _request()
    request.ClearField("align")
    with pytest.raises(NoFaceFound), translated("transmitter"):
        stub.Transmit(request, timeout=20)


def test_sentences_are_read_while_an_edit_goes_on(served: tuple[Server, Any]) -> None:
    server, stub = served
    free = threading.Event()
    server.worker.submit(None, lambda: free.wait(20))
    try:
        request = edsc_pb2.ReadInstructionRequest(instruction="smile")
        assert stub.ReadInstruction(request, timeout=10).edit.attribute == "smiling"
        nothing = edsc_pb2.ReadInstructionRequest(instruction="-")
        assert not stub.ReadInstruction(nothing, timeout=10).HasField("edit")
        with pytest.raises(DeadlineExceeded), translated("transmitter"):
            stub.Transmit(_request(), timeout=0.2)
    finally:
        free.set()
    assert stub.Transmit(_request(), timeout=20).frame.uses == 256


@pytest.mark.parametrize("instruction", ["", "y" * 2001])
def test_sentences_that_cannot_be_read(stub: Any, instruction: str) -> None:
    request = edsc_pb2.ReadInstructionRequest(instruction=instruction)
    with pytest.raises(InvalidRequest, match="instruction"), translated("transmitter"):
        stub.ReadInstruction(request, timeout=10)


def test_the_transmitter_names_its_weights(stub: Any, small_bundle: Path) -> None:
    told = stub.DescribeModel(edsc_pb2.DescribeModelRequest(), timeout=5)
    assert told.digest == Bundle.open(small_bundle).digest
    assert (told.name, told.uses, told.image_size) == ("small-32", 256, SIZE)
    assert list(told.qualities) == ["fast", "balanced", "paper"]
    assert "generator" in told.networks
