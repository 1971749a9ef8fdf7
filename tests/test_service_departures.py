"""Clients that leave while the sensor can't get rid of what it has for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpclib.client import Channel
from grpclib.const import Cardinality
from grpclib.protocol import H2Protocol
from ringside.api.v0 import ChargenEventFilter, EventFilter, GetEventsRequest, Subscription
from ringside.sensor import server, service

from .support.fakekernel import PATIENCE, FakeKernel


def calls() -> list[asyncio.Task[Any]]:
    """The calls that the server is at."""
    return [one for one in asyncio.all_tasks() if "request_handler" in repr(one.get_coro())]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _noted(connections: list[H2Protocol]) -> Callable[[H2Protocol, Any], None]:
    def connection_made(self: H2Protocol, transport: Any) -> None:
        connections.append(self)
        H2Protocol.connection_made(self, transport)

    return connection_made


@pytest.mark.parametrize("says_goodbye", [True, False])
async def test_a_client_that_reads_no_more_and_leaves_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_goodbye: bool
) -> None:
    connections: list[H2Protocol] = []
    monkeypatch.setattr(server._Protocol, "connection_made", _noted(connections))
    kernel = FakeKernel(tmp_path)
    kernel.proc.add(1, 0, "init", 1)
    address = tmp_path / "socket"
    stop, started = asyncio.Event(), asyncio.Event()
    with kernel.installed():
        serving = asyncio.create_task(
            service.serve(
                kernel.config(listen=(f"unix:{address}",)), started=lambda _: started.set(), stop=stop
            )
        )
        await asyncio.wait_for(started.wait(), PATIENCE)
        channel = Channel(path=str(address))
        wanted = EventFilter(chargen_events=[ChargenEventFilter(length=65536)])
        async with channel.request(
            f"/{service.SERVICE}/GetEvents", Cardinality.UNARY_STREAM, GetEventsRequest, bytes
        ) as stream:
            await stream.send_request()
            await stream.send_message(
                GetEventsRequest(subscription=Subscription(event_filter=wanted)), end=True
            )
            await stream.recv_initial_metadata()
            assert calls()
            client: Any = channel._protocol
            client.connection._transport.pause_reading()
            await until(lambda: not connections[0].connection.write_ready.is_set())
            if says_goodbye:
                await asyncio.wait_for(stream.cancel(), PATIENCE)
            channel.close()
        await until(lambda: not calls())
        stop.set()
        await asyncio.wait_for(serving, PATIENCE)
