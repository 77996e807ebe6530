"""The whole link through four real processes, and the pipelines without a network as its oracle.

With the shipped bundle where it is complete, with small random nets otherwise: then everything but
faces is tested all the same.
"""

import io
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from edsc.demo import first_sample
from edsc.runner import InProcess, Remote
from edsc.up import Stack
from gateway.answer import ChannelName, Csi, Fading, Order, Quality
from shared.bundle import Bundle
from shared.errors import BundleError, InvalidRequest, NotFound, Unavailable, UnsupportedImage
from shared.settings import ServiceName, Settings

ROOT = Path(__file__).parent.parent
NEEDED = {"generator", "inversion", "predictor", "faces", "text", "fields"}


@pytest.fixture(scope="session")
def weights(random_bundle: Path) -> Path:
    """The shipped bundle when it has every net, else the random one."""
    try:
        shipped = Bundle.open()
    except BundleError:
        return random_bundle
    return shipped.folder if set(shipped.nets) >= NEEDED else random_bundle


@pytest.fixture(scope="session")
def stack(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """With edits of its own: one that another test left would be taken over, and run in company."""
    settings = Settings(
        weights=weights,
        threads=1,
        default_deadline_s=30.0,
        log_level="warning",
        state=tmp_path_factory.mktemp("link"),
    )
    with Stack(settings, free_ports=True) as stack:
        yield stack


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="session")
def face(weights: Path, random_bundle: Path) -> bytes:
    """A sample face; skips where there is none, or no face finder that would know one."""
    if weights == random_bundle:
        pytest.skip("the shipped bundle is not complete: no face can be found")
    try:
        return first_sample().read_bytes()
    except NotFound as error:
        pytest.skip(str(error))


def picture(width: int = 48, height: int = 48) -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 20).convert("RGB")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


SQUARE = encoded(picture())


def send(http: httpx.Client, photo: bytes, /, **fields: Any) -> httpx.Response:
    data = {"instruction": "-", "align": "false", "quality": "fast", **fields}
    return http.post("/v1/edits", files={"image": ("photo", photo)}, data=data)


def problem(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return str(answer.json()["detail"])


# -------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize(
    "order",
    [
        Order("-", align=False, seed=1, snr_db=6.0, quality=Quality.FAST),
        Order("make the smile bigger", align=False, seed=2, snr_db=-6.0),
        Order("-", align=False, seed=3, channel=ChannelName.RAYLEIGH, csi=Csi.ESTIMATED),
        Order("-", align=False, seed=4, channel=ChannelName.RICIAN, fading=Fading.FAST),
    ],
    ids=["awgn", "edited", "rayleigh-estimated", "rician-fast"],
)
def test_four_processes_give_what_the_pipelines_give(
    stack: Stack, in_process: InProcess, order: Order
) -> None:
    here = in_process.edit("here", SQUARE, order)
    with Remote(stack.url) as remote:
        there = remote.edit("", SQUARE, order)
    assert there.pictures == here.pictures
    unlike = {"id", "images", "timings_ms", "hops_ms"}
    assert there.answer.model_dump(exclude=unlike) == here.answer.model_dump(exclude=unlike)


@pytest.fixture(scope="module")
def in_process(weights: Path) -> Iterator[InProcess]:
    """On one thread as the stack: threads split sums, and bfloat16 would show where."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield InProcess(weights)
    torch.set_num_threads(before)


def test_a_face_is_edited_through_the_air(stack: Stack, in_process: InProcess, face: bytes) -> None:
    order = Order("make the smile bigger", snr_db=6.0, seed=7)
    with Remote(stack.url) as remote:
        there = remote.edit("", face, order)
    assert there.answer.edit is not None
    assert (there.answer.edit.attribute, there.answer.edit.direction) == ("smiling", "more")
    assert there.answer.faces_found >= 1
    assert there.pictures == in_process.edit("here", face, order).pictures


# ---------------------------------------------------------------------------------------- bad input


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 white pixels in 200 kB."""
    width = height = 40_000
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + width // 8)) for _ in range(height)) + rows.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("photo", "status"),
    [
        (lambda: b"", 422),
        (lambda: SQUARE[: len(SQUARE) // 2], 415),
        (lambda: encoded(picture(), "JPEG")[:300], 415),
        (lambda: b"%PDF-1.7 not a picture", 415),
        (lambda: bytes(20_000_000), 415),
        (lambda: bytes(21 * 2**20), 413),
        (bomb, 413),
        (lambda: encoded(picture(1, 1)), 422),
        (lambda: encoded(picture(48, 40)), 422),
    ],
    ids=["empty", "half-png", "half-jpeg", "pdf", "20MB", "21MiB", "bomb", "1x1", "not-square"],
)
def test_a_bad_upload_is_refused_and_nothing_is_lost(
    http: httpx.Client, photo: Callable[[], bytes], status: int
) -> None:
    problem(send(http, photo()), status)
    assert send(http, SQUARE).status_code == 200


def test_a_very_large_photo_is_answered(http: httpx.Client) -> None:
    """64 million pixels are within the limits: without a face, and aligned."""
    photo = encoded(Image.new("RGB", (8000, 8000), (90, 120, 150)), "JPEG", quality=40)
    assert "face" in problem(send(http, photo, align="true"), 422)
    assert send(http, photo).status_code == 200


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "LA", "1", "I;16"])
def test_every_colour_mode_is_taken(http: httpx.Client, mode: str) -> None:
    image = picture()
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    answer = send(http, encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    if mode == "CMYK" and answer.status_code == 415:  # TIFF is no promise; JPEG is
        answer = send(http, encoded(image, "JPEG"))
    assert answer.status_code == 200, answer.text


def test_of_an_animation_the_first_frame_is_taken(http: httpx.Client) -> None:
    frames = [picture(), Image.new("RGB", (48, 48), "red")]
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    still = encoded(frames[0], "WEBP", lossless=True)
    aligned = [
        http.get(send(http, photo).json()["images"]["aligned"]).content
        for photo in (animated, still)
    ]
    assert aligned[0] == aligned[1]


def test_exif_orientation_is_honoured_over_rest(http: httpx.Client) -> None:
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    aligned = [
        http.get(send(http, photo).json()["images"]["aligned"]).content
        for photo in (encoded(upright), turned)
    ]
    assert aligned[0] == aligned[1]


def test_a_photo_without_a_face_says_so(http: httpx.Client) -> None:
    photo = encoded(Image.new("RGB", (200, 150), (30, 90, 160)))
    assert "face" in problem(send(http, photo, align="true"), 422)


@pytest.mark.parametrize("sentence", ["", "   ", "smile " * 1667, "🙂🙂🙂", "\u200b"])
def test_a_sentence_without_sense_is_refused(http: httpx.Client, sentence: str) -> None:
    problem(send(http, SQUARE, instruction=sentence), 422)


@pytest.mark.parametrize("sentence", ["paint the wall green", "what is the capital of France?"])
def test_a_sentence_out_of_scope_is_refused_with_what_can_be_asked(
    http: httpx.Client, face: bytes, sentence: str
) -> None:
    detail = problem(send(http, face, instruction=sentence), 422)
    assert "smil" in detail


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("snr_db", "nan"),
        ("snr_db", "inf"),
        ("snr_db", "-100"),
        ("snr_db", "1000"),
        ("channel", "nakagami"),
        ("k_factor_db", "-3"),
    ],
)
def test_a_number_out_of_range_is_refused(http: httpx.Client, field: str, value: str) -> None:
    assert field in problem(send(http, SQUARE, **{field: value}), 422)


# ------------------------------------------------------------------------------------------- faults


@pytest.fixture(scope="module")
def fresh(random_bundle: Path) -> Iterator[Stack]:
    """A stack of its own, whose processes may be killed if they are started again."""
    settings = Settings(
        weights=random_bundle, threads=1, default_deadline_s=4.0, drain_s=1.0, log_level="warning"
    )
    with Stack(settings, free_ports=True) as stack:
        yield stack


def test_killed_services_come_back_and_nothing_else_is_lost(fresh: Stack) -> None:
    killed: tuple[ServiceName, ...] = ("receiver", "channel", "transmitter")
    with httpx.Client(base_url=fresh.url, timeout=30.0) as http:
        kept = send(http, SQUARE).json()
        for name in killed:  # the last hop first, so that every one is the first to be missed
            fresh.kill(name)
            start = time.monotonic()
            assert name in problem(send(http, SQUARE), 503)
            assert time.monotonic() - start < 4.5
            assert http.get("/readyz").status_code == 503
            assert http.get("/healthz").status_code == 200
        for name in killed:
            fresh.start(name)
        fresh.wait_ready(60.0)
        assert send(http, SQUARE).status_code == 200
        assert http.get(f"/v1/edits/{kept['id']}").json() == kept


def test_a_service_killed_in_mid_request_is_503_in_time(fresh: Stack) -> None:
    with httpx.Client(base_url=fresh.url, timeout=30.0) as http:
        assert send(http, SQUARE).status_code == 200
        answers: list[httpx.Response] = []

        def edit() -> None:
            answers.append(send(http, SQUARE, quality="paper", instruction="make him older"))

        thread = threading.Thread(target=edit)
        thread.start()
        time.sleep(0.1)
        fresh.kill("transmitter")
        thread.join(10.0)
        # Where 0.1 s was enough for the whole edit, there was nothing left to lose.
        assert [a.status_code for a in answers] in ([503], [504], [200])
        fresh.start("transmitter")
        fresh.wait_ready(30.0)
        assert send(http, SQUARE).status_code == 200


def test_a_process_that_dies_is_named_with_its_last_words(random_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stack = Stack(Settings(weights=random_bundle, channel_port=port))
        stack.start("channel")
        try:
            stack.wait_end("channel", timeout_s=60.0)
            with pytest.raises(Unavailable, match=rf"channel ended with status 1(?s:.*){port}"):
                stack.check()
        finally:
            stack.stop()


# ---------------------------------------------------------------------------- as a user starts them


def edsc(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "edsc.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_up_serves_until_sigterm_and_leaves_nobody_behind(random_bundle: Path) -> None:
    process = edsc("up", "--free-ports", "--weights", str(random_bundle))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[4]
        assert httpx.get(f"{url}/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 0, stderr
        assert stderr.rstrip().endswith("stopped")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")
    finally:
        process.kill()
        process.communicate()


def test_demo_once_prints_what_happened(face: bytes) -> None:
    process = edsc("demo", "--once", "--free-ports")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    for word in ("smiling", "before", "expected", "after", "CBR", "0.0104", "time, ms", "demo/"):
        assert word in stdout
    assert (ROOT / "demo" / "received.png").is_file()


def test_remote_errors_are_the_services_own(stack: Stack) -> None:
    with Remote(stack.url) as remote:
        with pytest.raises(UnsupportedImage):
            remote.edit("", b"no picture", Order("-", align=False))
        with pytest.raises(InvalidRequest, match="snr_db"):
            remote.edit("", SQUARE, Order("-", align=False, snr_db=99.0))
