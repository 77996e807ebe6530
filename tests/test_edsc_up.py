"""Replicas, their supervisor and rolling restarts: real processes with small random nets."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

import edsc.up as up
from edsc.up import Stack, parse_replicas
from evaluation.bench_service import supervised
from evaluation.traffic import Traffic, failures, in_background, statuses
from shared.errors import InvalidRequest
from shared.images import encode_png
from shared.settings import Settings

PHOTO = encode_png(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1)


def until(true: Callable[[], bool], what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


def settings_for(bundle: Path, max_connection_age_s: float = 60.0) -> Settings:
    return Settings(
        weights=bundle,
        threads=1,
        default_deadline_s=20.0,
        log_level="error",
        max_connection_age_s=max_connection_age_s,
    )


def test_replicas_are_read_from_words() -> None:
    assert parse_replicas("transmitter=2,receiver=3") == {"transmitter": 2, "receiver": 3}
    assert parse_replicas("") == {}
    for wrong in ("transmitter", "transmitter=0", "transmitter=two", "sender=2", "channel=65"):
        with pytest.raises(InvalidRequest, match=r"expected SERVICE=1\.\.64"):
            parse_replicas(wrong)
    with pytest.raises(InvalidRequest, match="at least 1"):
        Stack(Settings(), replicas={"gateway": 0})


def test_a_process_that_dies_again_and_again_is_started_ever_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A module that ends at once stands in for a service, so that no second is lost on torch."""
    monkeypatch.setattr(up, "MODULES", {**up.MODULES, "receiver": "this"})
    said: list[str] = []
    stack = Stack(Settings(), free_ports=True, log=lambda name, line: said.append(line))
    stack.start("receiver")
    try:
        deadline = time.monotonic() + 60.0
        while sum("again in" in line for line in said) < 3 and time.monotonic() < deadline:
            stack.supervise()
            time.sleep(0.02)
    finally:
        stack.stop()
    pauses = [line for line in said if "again in" in line]
    assert pauses[:3] == [f"ended with status 0; again in {pause} s" for pause in ("0.5", "1", "2")]


@pytest.mark.slow
def test_two_of_each_share_the_work_and_one_killed_costs_little(random_bundle: Path) -> None:
    counts = {"transmitter": 2, "channel": 2, "receiver": 2, "gateway": 2}
    with Stack(
        settings_for(random_bundle),
        free_ports=True,
        replicas=counts,  # type: ignore[arg-type]
    ) as stack:
        assert set(stack.pids) == {name for one in counts for name in (one, f"{one}-2")}
        traffic = Traffic(stack.url, [PHOTO], align=False)
        with supervised(stack), in_background(traffic, 4.0):
            for name in ("transmitter", "receiver-2", "channel", "gateway"):
                pid = stack.pids[name]
                os.kill(pid, signal.SIGKILL)
                until(lambda n=name, p=pid: stack.is_ready(n) and stack.pids[n] != p, name)  # type: ignore[misc]
                time.sleep(1.0)
        # What the dead gateway was busy with is lost with its connection; nothing else may be.
        failed = failures(traffic.outcomes)
        assert all(one.status in (0, 503, 504) for one in failed), failed
        assert len(failed) <= 3, failed
        assert statuses(traffic.outcomes).get("200", 0) > 20


@pytest.mark.slow
def test_a_rolling_restart_of_everything_fails_no_request(random_bundle: Path) -> None:
    settings = settings_for(random_bundle, max_connection_age_s=2.0)
    counts = {"transmitter": 2, "channel": 2, "receiver": 2}
    with Stack(settings, free_ports=True, replicas=counts) as stack:  # type: ignore[arg-type]
        before = stack.pids
        traffic = Traffic(stack.url, [PHOTO], align=False)
        with in_background(traffic, 5.0):
            stack.roll()
            time.sleep(1.0)
        assert not {*before.values()} & {*stack.pids.values()}, "somebody was not restarted"
        assert set(statuses(traffic.outcomes)) == {"200"}, failures(traffic.outcomes)[:3]


@pytest.mark.slow
def test_the_only_one_killed_is_503_until_it_is_back(random_bundle: Path) -> None:
    with Stack(settings_for(random_bundle), free_ports=True) as stack:
        traffic = Traffic(stack.url, [PHOTO], align=False)
        with supervised(stack), in_background(traffic, 5.0):
            for name in ("receiver", "transmitter", "channel"):
                time.sleep(1.0)
                os.kill(stack.pids[name], signal.SIGKILL)
                until(lambda n=name: not stack.is_ready(n), f"{name} is gone")  # type: ignore[misc]
                until(lambda n=name: stack.is_ready(n), f"{name} is back")  # type: ignore[misc]
            back_s = time.monotonic()
            time.sleep(6.0)
        failed = failures(traffic.outcomes)
        assert failed, "somebody should have noticed"
        assert {one.status for one in failed} <= {503, 504}, failed
        assert all(one.ended_s < back_s + 5.0 for one in failed)
        assert httpx.get(f"{stack.url}/readyz").status_code == 200
