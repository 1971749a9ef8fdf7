"""Ringside's client: subscribe to a sensor's events from async Python.

    import asyncio
    from ringside.client import connect, events, processes

    async def main() -> None:
        async with connect() as sensor:
            async for event in sensor.events(events(processes("exec"))):
                print(event.event.process.exec_command_line)

    asyncio.run(main())

Needs neither root nor the sensor's C module: any process that may open the socket can do it.
"""

from __future__ import annotations

from ringside.sensor.errors import RequestError
from ringside.sensor.expression import ParseError, parse

from .builders import chargen, containers, events, files, kernel, network, processes, syscalls, ticker
from .connection import Events, Sensor, connect, error_infos
from .decode import decode_response, decoder
from .errors import BadRequest, CallError, ClientError, NotServable, Unreachable
from .syscalls import UnknownSyscall

__all__ = [
    "BadRequest",
    "CallError",
    "ClientError",
    "Events",
    "NotServable",
    "ParseError",
    "RequestError",
    "Sensor",
    "UnknownSyscall",
    "Unreachable",
    "chargen",
    "connect",
    "containers",
    "decode_response",
    "decoder",
    "error_infos",
    "events",
    "files",
    "kernel",
    "network",
    "parse",
    "processes",
    "syscalls",
    "ticker",
]
