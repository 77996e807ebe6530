"""`python -m channel_sim` as a process of its own: ports, readiness, signals, metrics."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from shared.errors import Unavailable
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import open_channel, translated, wait_until_serving
from shared.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


def _start(*flags: str) -> tuple[subprocess.Popen[str], int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "channel_sim", "--port", "0", *flags],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("channel listening on 127.0.0.1:"), line
    return process, int(line.rpartition(":")[2])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(signum: signal.Signals) -> None:
    process, port = _start()
    try:
        settings = Settings(channel_target=f"127.0.0.1:{port}")
        wait_until_serving(settings, "channel", 20)
        with open_channel(settings, "channel") as channel:
            stub = edsc_pb2_grpc.ChannelStub(channel)
            stub.Describe(edsc_pb2.DescribeChannelRequest(), timeout=5)
            process.send_signal(signum)
            out, err = process.communicate(timeout=15)
            with pytest.raises(Unavailable), translated("channel"):
                stub.Describe(edsc_pb2.DescribeChannelRequest(), timeout=5)
        assert process.returncode == 0, err
        assert "channel ready" in out
        assert '"event": "draining"' in err
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


def test_metrics_over_http() -> None:
    process, port = _start("--metrics-port", "0")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("channel metrics on 127.0.0.1:")
        settings = Settings(channel_target=f"127.0.0.1:{port}")
        wait_until_serving(settings, "channel", 20)
        url = f"http://{line.split()[-1]}/metrics"
        with urllib.request.urlopen(url, timeout=5) as reply:
            assert 'edsc_ready{service="channel"} 1.0' in reply.read().decode()
    finally:
        process.kill()
        process.communicate()
