"""The gateway's socket."""

import asyncio
import socket

import pytest

from gateway.__main__ import bind
from shared.settings import Settings


async def test_answers_are_not_held_back() -> None:
    """Nagle's algorithm costs 40 ms an answer on a kept connection: it has to be off."""
    listener = bind(Settings(gateway_port=0))
    seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def look(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        seen.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(look, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        no_delay = await asyncio.wait_for(seen, 5.0)
        writer.close()
        await writer.wait_closed()
    assert no_delay


def test_a_taken_gateway_port_raises() -> None:
    with bind(Settings(gateway_port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            bind(Settings(gateway_port=port))
