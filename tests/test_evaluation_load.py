"""Load tests: the arrival process, the accounting, the report, and a real run."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import evaluation.load
from edsc.cli import app
from edsc.up import Stack
from evaluation.arrivals import Arrival, Job, Mix, Photo, plan, read_photos
from evaluation.load import LoadOptions, psnr_db, run_load, run_step
from evaluation.load_report import STYLE, Plot, Series, html, write_report
from evaluation.metrics import psnr_db as torch_psnr_db
from evaluation.outcomes import LoadReport, Outcome, percentiles, quality_by_snr, summarise
from gateway.answer import ChannelName, Order, Quality
from shared.errors import InvalidRequest, Unavailable
from shared.settings import Settings
from shared.tracing import Tracing

ROOT = Path(__file__).resolve().parent.parent
PHOTO = Photo("face.png", b"not looked at")
MIX = Mix((PHOTO,))


# ------------------------------------------------------------------------------------ the options


@pytest.mark.parametrize(
    "url", ["http://example.com", "http://10.0.0.1:8000", "http://127.0.0.1.example.com"]
)
def test_another_host_must_be_named_twice(url: str) -> None:
    with pytest.raises(InvalidRequest, match="--allow-host"):
        LoadOptions(MIX, url=url)
    host = httpx.URL(url).host
    assert LoadOptions(MIX, url=url, allowed_hosts=(host,)).url == url


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://"])
def test_a_url_is_a_url(url: str) -> None:
    with pytest.raises(InvalidRequest, match="url"):
        LoadOptions(MIX, url=url)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": ()},
        {"rates": (0.0,)},
        {"rates": (1e6,)},
        {"rates": (math.nan,)},
        {"seconds": 1e5},
        {"most": 0},
        {"most": 10**7},
        {"timeout_s": math.inf},
        {"baseline": -1},
    ],
)
def test_load_is_bounded(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="expected"):
        LoadOptions(MIX, **wrong)


# --------------------------------------------------------------------------------- the accounting


def outcome(
    due_s: float, latency_s: float, fate: str = "ok", status: int = 200, **more: Any
) -> Outcome:
    timings = {"invert": 10.0 * latency_s, "queue": 1.0} if fate == "ok" else {}
    fields: dict[str, Any] = {
        "due_s": due_s, "sent_s": due_s + 0.001, "done_s": due_s + latency_s, "fate": fate,
        "status": status, "reason": "" if fate == "ok" else "busy", "snr_db": 6.0,
        "channel": "awgn", "quality": "fast", "timings_ms": timings,
    }  # fmt: skip
    return Outcome(**{**fields, **more})


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(2).lognormal(3.0, 1.0, 501).tolist()
    for count in (1, 2, 100, 501):
        found = percentiles(values[:count])
        assert list(found) == ["p50", "p95", "p99"]
        expected = np.percentile(values[:count], (50, 95, 99))
        np.testing.assert_allclose(list(found.values()), expected, atol=6e-4)
    assert percentiles([]) == {}


def test_every_arrival_is_accounted_for() -> None:
    random = np.random.default_rng(9)
    fates = ["ok", "rejected", "failed", "unsent"]
    outcomes = [
        outcome(
            i / 10, float(random.exponential()), fates[int(random.integers(4))], retry_after=False
        )
        for i in range(400)
    ]
    step = summarise(10.0, 40.0, outcomes, deadline_s=1.0)
    lost = sum(step.rejected.values()) + sum(step.failed.values()) + step.unsent
    assert step.ok + lost == step.arrivals == 400
    assert step.good == sum(o.fate == "ok" and o.latency_ms <= 1000.0 for o in outcomes) < step.ok
    assert step.span_s == pytest.approx(max(40.0, *(o.done_s for o in outcomes)), abs=1e-3)
    assert step.goodput == pytest.approx(step.good / step.span_s, rel=1e-3)
    assert step.pictures_missing == step.ok
    ok_ms = [o.latency_ms for o in outcomes if o.fate == "ok"]
    assert step.latency_ms["p95"] == pytest.approx(np.percentile(ok_ms, 95), abs=1e-3)
    # 10 ms of "invert" a second of latency.
    assert step.stages_ms["invert"]["p95"] == pytest.approx(
        np.percentile(ok_ms, 95) / 100, abs=1e-2
    )
    assert set(step.stages_ms) == {"invert", "queue"}


def test_goodput_counts_the_time_that_a_queue_drains() -> None:
    """Ten answers of which the last comes at 20 s: half an answer a second, not one."""
    late = [outcome(float(i), 2.0 * (i + 1) - i) for i in range(10)]
    assert summarise(1.0, 10.0, late, deadline_s=60.0).goodput == pytest.approx(0.5)


def test_rejects_are_counted_by_status_and_told_when_to_return() -> None:
    outcomes = [
        outcome(0.0, 0.01, "rejected", 429, retry_after=True),
        outcome(0.1, 0.01, "rejected", 429),
        outcome(0.2, 0.01, "rejected", 503, reason="unavailable"),
    ]
    step = summarise(10.0, 1.0, outcomes, 1.0)
    assert step.rejected == {"429 busy": 2, "503 unavailable": 1}
    assert step.busy_without_retry_after == 1
    assert step.latency_ms == {}
    assert (step.ok, step.goodput) == (0, 0.0)


def test_an_empty_step_is_a_step() -> None:
    step = summarise(0.001, 1.0, [], 1.0)
    assert (step.arrivals, step.ok, step.span_s) == (0, 0, 1.0)


def test_psnr_is_the_metrics_own() -> None:
    random = np.random.default_rng(4)
    a, b = (random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2))

    def floats(picture: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
        return torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 127.5 - 1.0

    assert psnr_db(a, b) == pytest.approx(float(torch_psnr_db(floats(a), floats(b))), abs=1e-9)
    assert psnr_db(a, a) == 99.0
    with pytest.raises(InvalidRequest, match="32, 32"):
        psnr_db(a, b[:16])


def test_quality_pairs_the_same_edit_with_itself() -> None:
    loaded = [
        outcome(0.0, 1.0, snr_db=s, psnr_db=p, pixels="x") for s, p in ((0, 15), (0, 17), (6, 20))
    ]
    alone = [outcome(0.0, 1.0, snr_db=0.0, psnr_db=15.05, pixels="x")]
    low, high = quality_by_snr(loaded, [(loaded[0], alone[0])])
    assert (low.count, low.under_load, low.pairs, low.identical) == (2, 16.0, 1, 1)
    assert (low.pair_under_load, low.pair_alone) == (15.0, 15.05)
    assert low.worst == pytest.approx(0.05)
    assert (high.count, high.pairs, high.pair_alone, high.worst) == (1, 0, None, None)


# ----------------------------------------------------------------------------- sending, in the open


Handler = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


@contextmanager
def answered_by(handler: Handler) -> Iterator[Callable[[], httpx.AsyncClient]]:
    """Clients whose requests reach `handler`, whatever their address."""
    yield lambda: httpx.AsyncClient(
        base_url="http://127.0.0.1", transport=httpx.MockTransport(handler)
    )


def step_of(handler: Handler, times: list[float], **more: Any) -> list[Outcome]:
    arrivals = [Arrival(at_s, Job(PHOTO, Order("-"))) for at_s in times]
    options = {"timeout_s": 5.0, "max_in_flight": 1000, **more}

    async def run() -> list[Outcome]:
        with answered_by(handler) as client:
            async with client() as http:
                return await run_step(http, arrivals, **options)

    return asyncio.run(run())


def test_latency_counts_from_the_moment_a_request_was_due() -> None:
    """One server, one request at a time, 0.1 s each, five due at once: 0.1, 0.2, ... 0.5 s.

    A closed loop would have called every one of them 0.1 s.
    """
    turn = asyncio.Lock()

    async def handler(request: httpx.Request) -> httpx.Response:
        async with turn:
            await asyncio.sleep(0.1)
        return httpx.Response(429, json={"type": "urn:edsc:problem:busy"})

    done = step_of(handler, [0.0] * 5)
    for place, one in enumerate(sorted(done, key=lambda o: o.latency_ms), start=1):
        assert one.latency_ms >= 100.0 * place - 5.0
    assert {(o.fate, o.status, o.reason) for o in done} == {("rejected", 429, "busy")}


def test_a_server_that_hangs_stops_nobody() -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60.0)
        raise AssertionError

    done = step_of(handler, [0.0, 0.05, 0.1], timeout_s=0.3)
    assert [(o.fate, o.reason) for o in done] == [("failed", "timeout")] * 3
    assert all(o.lag_ms < 1000.0 for o in done)  # the second was not kept waiting
    assert all(295.0 <= o.latency_ms < 5000.0 for o in done)


def test_what_goes_wrong_is_named() -> None:
    answers: list[httpx.Response | Exception] = [
        httpx.ConnectError("refused"),
        httpx.Response(200, text="<html>"),
        httpx.Response(503, json=["odd"]),
        httpx.Response(200, json={"timings_ms": {"invert": 1.0}, "images": {"sent": "/a"}}),
    ]

    async def handler(request: httpx.Request) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    done = step_of(handler, [0.0, 0.1, 0.2, 0.3])
    assert [(o.fate, o.status, o.reason) for o in done] == [
        ("failed", 0, "ConnectError"),
        ("failed", 200, "not JSON"),
        ("rejected", 503, "503"),
        ("ok", 200, ""),
    ]
    assert done[3].timings_ms == {"invert": 1.0}
    assert summarise(10.0, 1.0, done, 1.0).pictures_missing == 1  # its answer names no picture


def test_arrivals_beyond_the_limit_are_counted_as_unsent() -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.3)
        return httpx.Response(429, json={})

    done = step_of(handler, [0.0, 0.01, 0.02, 0.5], max_in_flight=2)
    assert [o.fate for o in done] == ["rejected", "rejected", "unsent", "rejected"]


def test_the_form_is_the_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields sent are read back as the order that was drawn."""
    from fastapi.testclient import TestClient

    from gateway.app import create_app

    seen: list[tuple[bytes, Order]] = []

    class Recorder:
        settings = Settings()
        tracing = Tracing.off()
        deadline_s = 5.0

        async def edit(self, edit_id: str, photo: bytes, order: Order, **more: Any) -> Any:
            seen.append((photo, order))
            raise Unavailable("only looking")

        async def close(self) -> None:
            pass

    job = Job(
        Photo("x.png", b"123"),
        Order("add bangs", snr_db=-6.0, channel=ChannelName.RICIAN, align=False),
    )
    with TestClient(create_app(Recorder())) as client:  # type: ignore[arg-type]
        answer = client.post(
            "/v1/edits", files={"image": (job.photo.name, job.photo.data)}, data=job.form()
        )
    assert answer.status_code == 503, answer.text
    assert seen == [(b"123", job.order)]


# ------------------------------------------------------------------------------------- the report


def made_up_report() -> LoadReport:
    random = np.random.default_rng(0)
    outcomes, steps, fates = [], [], ("ok", "rejected")
    for rate in (1.0, 2.0, 4.0):
        arrivals = plan(MIX, rate, 10.0, most=100, seed=int(rate))
        done = [
            outcome(
                a.at_s, float(random.exponential(0.2 * rate)), fates[int(random.random() < 0.2)],
                snr_db=a.job.order.snr_db, psnr_db=15 + a.job.order.snr_db / 6,
            )
            for a in arrivals
        ]  # fmt: skip
        outcomes.append(tuple(done))
        steps.append(summarise(rate, 10.0, done, 1.0))
    seen = [o for step in outcomes for o in step]
    quality = quality_by_snr(seen, [(o, o) for o in seen[:9]])
    options = {"mix": MIX.describe(), "note": "<script>alert(1)</script>"}
    return LoadReport(
        "http://127.0.0.1:8000", "now", options, tuple(steps), quality, tuple(outcomes)
    )


def test_the_report_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    report = made_up_report()
    data, page = write_report(report, tmp_path / "new")
    found = json.loads(data.read_text())
    assert [step["rate"] for step in found["steps"]] == [1.0, 2.0, 4.0]
    assert [len(step) for step in found["requests"]] == [s.arrivals for s in report.steps]
    assert found["same_quality"] is True
    text = page.read_text()
    assert text.count("<svg") == 6
    for banned in ("<script", "<link", "src=", "@import", "url("):
        assert banned not in text
    assert "&lt;script&gt;" in text
    # Well-formed, so that every browser sees the same.
    body = text.removeprefix("<!doctype html>\n").replace(STYLE, "")
    body = body.replace("&nbsp;", " ").replace('<meta charset="utf-8">', "")
    start, end = body.index("<meta"), body.index("<title>")
    ET.fromstring(body[:start] + body[end:])


def test_a_report_of_nothing_says_so() -> None:
    step = summarise(1.0, 1.0, [], 1.0)
    empty = LoadReport("http://127.0.0.1", "now", {}, (step,), (), ((),))
    assert empty.same_quality is None
    text = html(empty)
    assert "No data." in text
    assert "nothing was made again" in text


def test_marks_lie_where_their_values_say() -> None:
    points = [(0.0, 1.0, ""), (5.0, 10.0, ""), (10.0, 100.0, "")]
    drawn = Plot("x", "y", [Series("s", "#000", points)], log_y=True).svg()
    circles = ET.fromstring(drawn[: drawn.index("</svg>") + 6]).findall("circle")
    xs, ys = ([float(c.attrib[k]) for c in circles] for k in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)  # decades
    assert ys[0] > ys[2]  # upwards


# ------------------------------------------------------------------------------------- for real


def encoded(size: int) -> bytes:
    file = io.BytesIO()
    Image.effect_mandelbrot((size, size), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_no_gateway_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(48))
    arguments = [
        "load",
        "--url",
        "http://127.0.0.1:9",
        "--photos",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "does not answer" in result.stderr
    result = CliRunner().invoke(app, [*arguments, "--rate", "0"])
    assert result.exit_code == 2
    result = CliRunner().invoke(app, [*arguments[:2], "http://example.com", *arguments[3:]])
    assert "--allow-host" in result.stderr


@pytest.mark.slow
def test_load_on_four_real_processes(random_bundle: Path, tmp_path: Path) -> None:
    """Both ends of the rate: all served, and most refused; the pictures stay the same."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for size in (48, 64):
        (photos / f"{size}.png").write_bytes(encoded(size))
    settings = Settings(
        weights=random_bundle,
        threads=1,
        queue_size=4,
        log_level="warning",
        # Random nets draw the same face 50 dB apart in passes of one and of two in bfloat16.
        precision="float32",
    )
    mix = Mix(
        read_photos(photos),
        ("-", "add bangs"),
        qualities=(Quality.FAST, Quality.BALANCED),
        align=False,
    )
    news: list[str] = []
    with Stack(settings, free_ports=True) as stack:
        options = LoadOptions(
            mix, url=stack.url, rates=(1.0, 40.0), seconds=4.0, timeout_s=200.0, baseline=10
        )
        report = run_load(options, news.append)
    calm, storm = report.steps
    assert len(news) == 2
    for step in report.steps:
        lost = sum(step.rejected.values()) + sum(step.failed.values()) + step.unsent
        assert step.ok + lost == step.arrivals
        assert step.failed == {}
        assert step.busy_without_retry_after == 0
        assert step.pictures_missing == 0
        assert {"invert", "propagate", "receive", "queue", "overhead"} <= set(step.stages_ms)
    assert calm.ok == calm.arrivals
    assert storm.arrivals > 10 * calm.arrivals
    assert set(storm.rejected) <= {"429 busy"}
    assert storm.ok + storm.rejected.get("429 busy", 0) == storm.arrivals
    assert sum(at.pairs for at in report.quality) == 10
    assert report.same_quality is True, "".join(f"\n{at}" for at in report.quality)
    assert report.baseline_failures == ()
    write_report(report, tmp_path / "report")


def test_most_limits_are_where_they_are_said_to_be() -> None:
    assert LoadOptions(MIX, rates=(evaluation.load.MOST_RATE,)).rates == (1000.0,)
    assert LoadOptions(MIX, seconds=evaluation.load.MOST_SECONDS).seconds == 3600.0


def locust(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Locust on our file, without its page."""
    pytest.importorskip("gevent", reason="Locust is not installed: pip install '.[load]'")
    file = str(ROOT / "evaluation" / "locustfile.py")
    return subprocess.run(
        [sys.executable, "-m", "locust", "-f", file, "--headless", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing gevent here is only to ask whether it is there
def test_locust_sends_the_same_mix(random_bundle: Path, tmp_path: Path) -> None:
    refused = locust("-H", "http://example.com", "-u", "1", "-t", "2s", "--photos", str(tmp_path))
    assert refused.returncode == 2
    assert "--allow-host" in refused.stdout
    (tmp_path / "a.png").write_bytes(encoded(48))
    settings = Settings(weights=random_bundle, threads=1, log_level="warning")
    options = ("-u", "2", "-r", "2", "-t", "8s", "--photos", str(tmp_path), "--no-align")
    with Stack(settings, free_ports=True) as stack:
        done = locust("-H", stack.url, *options, "--csv", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "run_stats.csv").open() as file:
        total = {row["Name"]: row for row in csv.DictReader(file)}["edit, fast"]
    assert int(total["Request Count"]) >= 4
    assert int(total["Failure Count"]) == 0
