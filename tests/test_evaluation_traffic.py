"""Load and what is made of it; the experiments themselves, with small random nets."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from evaluation import bench_service
from evaluation.bench_service import Options, Report
from evaluation.traffic import Outcome, Traffic, failures, goodput_hz, open_loop, pin, statuses


def outcomes(*found: tuple[float, int]) -> list[Outcome]:
    return [Outcome(ended - 0.5, ended, status) for ended, status in found]


def test_goodput_counts_what_was_done_in_time() -> None:
    seen = outcomes((1.0, 200), (2.0, 200), (2.5, 429), (3.0, 503), (9.0, 200))
    assert goodput_hz(seen, 0.0, 4.0) == pytest.approx(0.5)
    assert statuses([*seen, Outcome(0.0, 1.0, 0)]) == {"200": 3, "429": 1, "503": 1, "lost": 1}
    assert [one.status for one in failures(seen)] == [503]
    with pytest.raises(ValueError, match="no time"):
        goodput_hz(seen, 4.0, 4.0)


def test_open_loop_keeps_its_rate_whatever_the_answers() -> None:
    """Nobody listens: every request is lost at once, and the next still comes at its time."""
    traffic = Traffic("http://127.0.0.1:9", [b"photo"], timeout_s=1.0)
    open_loop(traffic, 100.0, 1.0, seed=3)
    # Poisson with mean 100: 99.9 % within 4 standard deviations.
    assert 60 < len(traffic.outcomes) < 140
    assert statuses(traffic.outcomes) == {"lost": len(traffic.outcomes)}
    assert "ConnectError" in traffic.outcomes[0].why


def test_what_is_sent_is_an_edit() -> None:
    import asyncio

    from fastapi import FastAPI, Request

    app, forms = FastAPI(), []

    @app.post("/v1/edits")
    async def edits(request: Request) -> dict[str, Any]:
        forms.append(dict(await request.form()))
        return {}

    async def send() -> None:
        traffic = Traffic("http://test", [b"one", b"two"], quality="paper", align=False)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(2):
                assert (await traffic.one(client)).status == 200

    asyncio.run(send())
    assert {form["quality"] for form in forms} == {"paper"}
    assert len({form["instruction"] for form in forms}) == 2
    assert forms[0]["align"] == "false"


def test_bars_are_passed_at_the_bar() -> None:
    report = Report()
    report.at_least("goodput", 1.8, 1.8)
    report.at_most("failed", 1, 0)
    assert [bar.passed for bar in report.bars] == [True, False]


def test_options_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_service.main(["--seconds", "0"])
    assert "more than 0" in capsys.readouterr().err


@pytest.mark.slow
def test_every_experiment_runs(random_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    status = bench_service.main(
        [
            *("--weights", str(random_bundle), "--no-align", "--seconds", "3", "--clients", "4"),
            *("--overload-s", "8", "--deadline-s", "20", "--load", "0.2", "--json", str(out)),
            "--no-bars",
        ]
    )
    assert status == 0
    report = json.loads(out.read_text())
    assert set(bench_service.EXPERIMENTS) < set(report)
    assert report["batching"]["ratio"] > 0
    assert set(report["overload"]["statuses"]) <= {"200", "429"}
    assert report["roll"]["statuses"].keys() == {"200"}
    assert not any(one["odd"] for one in report["kill"].values())
    assert report["kill_left_open"] == 0
    assert report["hops"]["hops_p50_ms"] > 0
    assert len(report["bars"]) == 11


def test_settings_of_a_run_differ_as_asked() -> None:
    options = Options((b"",), deadline_s=7.0)
    assert options.settings(max_batch=1).max_batch == 1
    assert options.settings().default_deadline_s == 7.0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are given on Linux only")
def test_a_pinned_process_has_one_core_with_all_its_threads() -> None:
    script = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        try:
            tasks = Path(f"/proc/{process.pid}/task")
            end_s = time.monotonic() + 20
            while len(list(tasks.iterdir())) < 2 and time.monotonic() < end_s:
                time.sleep(0.02)
            pin([process.pid])
            cores = [os.sched_getaffinity(int(thread.name)) for thread in tasks.iterdir()]
        finally:
            process.kill()
    assert len(cores) == 2
    assert cores[0] == cores[1] == {min(os.sched_getaffinity(0))}
