"""What a container's health check says of the process beside it."""

import pytest

from shared import probe as command
from shared.errors import DeadlineExceeded, Unavailable
from shared.pb import edsc_pb2_grpc
from shared.probe import probe
from shared.rpc import Server
from shared.settings import Settings
from tests.test_shared_rpc import Probe


def test_a_service_is_healthy_once_it_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(Settings(channel_port=0), "channel")
    edsc_pb2_grpc.add_ChannelServicer_to_server(Probe(server), server.grpc)
    port = server.start()
    # Elsewhere there are others of its kind: it is this one that is asked.
    here = Settings(host="0.0.0.0", channel_port=port, channel_target="dns:///nobody:50052")
    with pytest.raises(Unavailable, match="the channel says NOT_SERVING; expected SERVING"):
        probe("channel", here)
    server.ready()
    probe("channel", here)
    monkeypatch.setenv("EDSC_CHANNEL_PORT", str(port))
    assert command.main(["channel"]) == 0
    server.drain(0.0)
    with pytest.raises((Unavailable, DeadlineExceeded)):
        probe("channel", here, timeout_s=2.0)
    assert command.main(["channel"]) == 1
    assert "the channel" in capsys.readouterr().err


def test_a_gateway_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Unavailable, match="the gateway does not answer"):
        probe("gateway", Settings(gateway_port=1), timeout_s=2.0)
    with pytest.raises(SystemExit):
        command.main(["nobody"])
    assert "invalid choice" in capsys.readouterr().err
