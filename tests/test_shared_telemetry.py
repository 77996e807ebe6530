"""Logs, metrics and settings."""

import json
from pathlib import Path

import pytest
import structlog
from pydantic import ValidationError

from shared.settings import Settings, settings_from_flags
from shared.telemetry import Metrics, Stopwatch, configure_logging, logger

pytestmark = pytest.mark.usefixtures("logging_undone")


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_sentences_and_pictures_stay_out_of_logs(
    level: str, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("transmitter", "debug")
    with structlog.contextvars.bound_contextvars(request_id="abc"):
        getattr(logger(), level)("read", instruction="give him a beard", data=b"\x89PNG", photo=[1])
    line = json.loads(capfd.readouterr().err)
    assert line["instruction"] == "<16 characters>"
    assert line["data"] == "<4 bytes>"
    assert line["photo"] == "<private>"
    assert (line["service"], line["request_id"], line["level"]) == ("transmitter", "abc", level)


def test_debug_is_for_whoever_asks_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("transmitter", "info")
    logger().debug("read", instruction="give him a beard")
    assert not capfd.readouterr().err
    configure_logging("transmitter", "debug")
    logger().debug("read", instruction="give him a beard", data=b"\x89PNG")
    line = json.loads(capfd.readouterr().err)
    assert (line["instruction"], line["data"]) == ("give him a beard", "<4 bytes>")


def test_what_a_bug_says_is_for_debugging(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(level: str) -> str:
        configure_logging("transmitter", level)
        try:
            try:
                raise KeyError("give him a beard")
            except KeyError as error:
                raise ValueError("b'\\x89PNG'") from error
        except ValueError:
            logger().exception("failed", request_id="abc")
        return capfd.readouterr().err

    line = json.loads(fail("info"))
    kinds = [told["kind"] for told in line["exception"]]
    assert kinds == ["builtins.ValueError", "builtins.KeyError"]
    assert "test_shared_telemetry.py" in line["exception"][0]["frames"][0]
    assert "beard" not in json.dumps(line)
    assert "PNG" not in json.dumps(line)
    assert "give him a beard" in fail("debug")


def test_metrics_text() -> None:
    metrics = Metrics("receiver")
    metrics.answered("Receive", "OK", 0.003)
    metrics.rejected("queue_full")
    metrics.stages({"decode": 2.0})
    text = metrics.text().decode()
    for line in (
        'edsc_requests_total{code="OK",method="Receive",service="receiver"} 1.0',
        'edsc_rejected_total{reason="queue_full",service="receiver"} 1.0',
        'edsc_stage_seconds_sum{service="receiver",stage="decode"} 0.002',
        'edsc_request_seconds_bucket{le="0.005",method="Receive",service="receiver"} 1.0',
        'edsc_ready{service="receiver"} 0.0',
    ):
        assert line in text


def test_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    with watch.stage("decode"):
        pass
    watch.add("decode", 5.0)
    assert 5.0 <= watch.stages_ms()["decode"] < 50.0
    assert set(watch.timings_ms()) == {"decode", "total"}


def test_settings_flags_over_environment_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDSC_CHANNEL_PORT", "7001")
    monkeypatch.setenv("EDSC_QUEUE_SIZE", "3")
    monkeypatch.setenv("EDSC_RECEIVER_TARGET", "dns:///receiver:50053")
    found = settings_from_flags("channel", ["--port", "7002", "--host", "0.0.0.0"])
    assert (found.port("channel"), found.queue_size) == (7002, 3)
    assert found.port("transmitter") == 50051
    assert found.target("receiver") == "dns:///receiver:50053"
    assert found.target("channel") == "127.0.0.1:7002"  # 0.0.0.0 is no address to call
    assert settings_from_flags("channel", []).port("channel") == 7001


def test_settings_are_frozen_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError):
        Settings().queue_size = 7
    with pytest.raises(SystemExit) as left:
        settings_from_flags("channel", ["--port", "70000"])
    assert left.value.code == 2
    assert "channel_port" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        settings_from_flags("channel", ["--weights"])
    assert settings_from_flags("receiver", ["--weights", "w"]).weights == Path("w")
