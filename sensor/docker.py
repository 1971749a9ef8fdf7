"""Docker's (or Podman's) API as a witness of containers: connects, lists, follows, reconnects, for ever.

aiodocker brings the client and its connections. Its event channel is unbounded and its answers are read
whole, so both are read here, with a bound on bytes and time: an engine that hangs, floods or talks nonsense
costs one warning, and counts, and nothing else. It is imported when a socket first exists: it takes 17 MB.

    connect -> subscribe to events, since the last one heard -> list -> all events until now: none older than
            the list is still on its way -> tell the table what the list implies -> events in order,
            several containers at a time -> lost: back off, connect again

Events are held until the list is told. The list is younger than events in hand, so each of its entries is
first taken back to the state that the container's first event in hand came from.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import random
import re
import time
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .container import (
    CREATED,
    EXITED,
    RUNNING,
    UNKNOWN,
    ContainerState,
    ContainerTable,
    Document,
    Facts,
    Listing,
    image_id_of,
    is_hex_id,
)
from .errors import EngineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    import aiodocker
    import aiohttp

_log = logging.getLogger(__name__)

#: (name, where it listens). Podman's service speaks Docker's language.
_SOCKETS: Final = (
    ("docker", "run/docker.sock"),
    ("docker", "var/run/docker.sock"),
    ("podman", "run/podman/podman.sock"),
)


def engine_sockets(root: Path = Path("/")) -> list[tuple[str, Path]]:
    """(name, socket) of every engine to look for below `root`, whether it is there now or not, each once."""
    found: dict[Path, tuple[str, Path]] = {}
    for name, place in _SOCKETS:
        path = root / place
        found.setdefault(path.parent.resolve() / path.name, (name, path))  # /var/run is /run
    return list(found.values())


_ACTIONS: Final = ("create", "start", "die", "destroy", "rename")
#: Podman's words, by which its events have to be asked for; it tells one of them in Docker's.
_WORDS: Final = {"died": "die", "remove": "destroy"}
_STATES: Final = {
    "created": CREATED,
    "initialized": CREATED,  # Podman's word
    "configured": CREATED,  # Podman's word
    "running": RUNNING,
    "paused": RUNNING,
    "stopping": RUNNING,
    "restarting": EXITED,
    "removing": EXITED,
    "exited": EXITED,
    "stopped": EXITED,
    "dead": EXITED,
}
_TEXT_LIMIT: Final = 4096


@dataclass(frozen=True, slots=True)
class DockerLimits:
    """Bounds on what an engine may cost. Seconds, bytes, counts."""

    look: float = 1.0  # for a socket that is not there
    backoff_least: float = 0.1
    backoff_most: float = 5.0
    answer: float = 5.0  # for any answer, from request to last byte
    patience: float = 15.0  # without an engine, until the kernel speaks for its containers
    ping: float = 15.0
    start: float = 0.1  # that an inspect document may delay the news that a container runs
    drain: float = 2.0  # for events in hand when the connection is lost
    inspect_bytes: int = 1 << 20
    list_bytes: int = 16 << 20
    line_bytes: int = 1 << 20
    events: int = 20_000  # in hand
    remembered: int = 4_096  # events, not to hear them twice; engines replay at most 256
    at_once: int = 8  # containers whose events are worked on
    questions: int = 1_024  # of the table, in hand


@dataclass(slots=True)
class DockerCounts:
    """What happened, for the metrics."""

    connects: int = 0
    failures: int = 0
    events: int = 0
    inspects: int = 0
    inspect_failures: int = 0
    oversized: int = 0
    garbage: int = 0
    overflows: int = 0
    lists: int = 0


class _NotFoundError(EngineError):
    """The engine knows no such container."""


class _SilentError(EngineError):
    """No answer within the time allowed."""


class _OversizedError(EngineError):
    """An answer is longer than allowed."""


@dataclass(frozen=True, slots=True)
class _Event:
    id: str
    action: str
    time_ns: int
    facts: Facts


class DockerSource:
    """Feeds one engine's containers to the table for as long as `run` runs."""

    def __init__(
        self,
        table: ContainerTable,
        socket: Path,
        *,
        name: str = "docker",
        running_facts: Callable[[str], Facts] = lambda _: Facts(),
        limits: DockerLimits = DockerLimits(),
    ) -> None:
        """`running_facts` finds a running container's pid and config.json on disk (Runtimes.running)."""
        self.name = name
        self.socket = socket
        self.counts = DockerCounts()
        self.connected = False  # its list is told and its events are followed
        self._table = table
        self._running_facts = running_facts
        self._limits = limits
        self._client: aiodocker.Docker | None = None
        self._warned = False
        self._warned_at = -float("inf")
        self._last_event_ns = 0
        self._since_ns = 0  # what this connection has to hear
        self._heard_lately: OrderedDict[tuple[int, str, str], None] = OrderedDict()
        self._in_hand: dict[str, deque[_Event]] = {}
        self._in_hand_count = 0
        self._nothing_in_hand = asyncio.Event()
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._told_list = asyncio.Event()  # workers wait for it
        self._idle = asyncio.Event()  # no worker is in the middle of an event
        self._working = 0
        self._list_wanted = asyncio.Event()
        self._questions: asyncio.Queue[str] = asyncio.Queue(limits.questions)
        self._asked: set[str] = set()
        self._is_podman = False

    async def run(self) -> None:
        """Follow the engine until cancelled. Never raises for what an engine does."""
        limits = self._limits
        backoff = limits.backoff_least
        down_since: float | None = None
        released = False
        while True:
            if self._socket_is_there():
                if backoff == limits.backoff_least:
                    self._table.source_up(self.name, self._ask)
                reason = await self._follow()
                if self.connected:
                    backoff, down_since, released = limits.backoff_least, None, False
                self._disconnect(reason)
                pause = backoff * random.uniform(0.5, 1)
                backoff = min(backoff * 2, limits.backoff_most)
            else:
                pause, backoff = limits.look, limits.backoff_least
            now = time.monotonic()
            if down_since is None:
                down_since = now
            elif now - down_since > limits.patience and not released:
                released = True
                self._table.release(self.name, time.time_ns())
            await asyncio.sleep(pause)

    def _socket_is_there(self) -> bool:
        try:
            return self.socket.exists()
        except OSError:
            return True  # then connecting says why not

    def _disconnect(self, reason: str) -> None:
        self.connected = False
        self._table.source_down(self.name)
        self._in_hand.clear()
        self._in_hand_count = 0
        self._asked.clear()
        self._ready, self._questions = asyncio.Queue(), asyncio.Queue(self._limits.questions)
        self.counts.failures += 1
        if not self._warned and time.monotonic() - self._warned_at > 60:
            self._warned_at = time.monotonic()
            _log.warning("%s engine at %s: %s; trying again", self.name, self.socket, reason)
        self._warned = True

    async def _follow(self) -> str:
        """One connection, from connect to its loss; says why it was lost."""
        self._since_ns = self._last_event_ns + 1 if self._last_event_ns else time.time_ns()
        self._told_list.clear()
        self._nothing_in_hand.set()
        self._idle.set()
        self._list_wanted.set()
        try:
            self._client = await self._new_client()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._read_events())
                    tasks.create_task(self._keep_listed())
                    tasks.create_task(self._ping())
                    tasks.create_task(self._answer())
                    for _ in range(self._limits.at_once):
                        tasks.create_task(self._work())
            finally:
                client, self._client = self._client, None
                await client.close()
        except (EngineError, OSError, ImportError) as error:
            return str(error)
        except ExceptionGroup as group:
            cause = _first(group)
            if not _engines_fault(cause):
                _log.error(
                    "%s engine at %s: giving up this connection", self.name, self.socket, exc_info=cause
                )
            return str(cause) or type(cause).__name__
        return "the connection was closed"

    async def _new_client(self) -> aiodocker.Docker:
        await asyncio.to_thread(importlib.import_module, "aiodocker")
        import aiodocker
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._limits.answer)
        return aiodocker.Docker(url=f"unix://{self.socket}", timeout=timeout)

    # Events

    async def _read_events(self) -> None:
        # The engine answers before it subscribes; with `since` it sends what came between, too.
        parameters = _events_parameters(self._since_ns)
        try:
            async with (
                asyncio.timeout(self._limits.answer) as patience,
                self._session.get(self._url("events"), params=parameters) as response,
            ):
                patience.reschedule(None)
                if response.status != 200:
                    raise EngineError(f"events: status {response.status}")
                self.counts.connects += 1
                async for line in self._lines(response):
                    self._heard(line)
        except TimeoutError as error:
            raise _SilentError(f"events: no answer within {self._limits.answer:g} s") from error
        # What is in hand may be all there will ever be of it: a daemon that stops says so and hangs up.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain):
                await self._told_list.wait()
                await self._nothing_in_hand.wait()
        raise EngineError("the connection was closed")

    async def _lines(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Lines of a stream that never ends; one that is too long is left out and a new list asked for."""
        line = bytearray()
        too_long = False
        async for chunk in response.content.iter_any():
            parts = chunk.split(b"\n")
            for number, part in enumerate(parts):
                if number:
                    if line and not too_long:
                        yield bytes(line)
                    line.clear()
                    too_long = False
                if not too_long:
                    line += part
                    if len(line) > self._limits.line_bytes:
                        too_long = True
                        line.clear()
                        self.counts.oversized += 1
                        self._list_wanted.set()

    async def _catch_up(self) -> None:
        """Hear every event until now; the stream brings them too, but who knows when."""
        parameters = _events_parameters(self._since_ns, None if self._is_podman else time.time_ns())
        if self._is_podman:
            # It stops reading its file at once where the end is past, and has this for it instead.
            parameters["stream"] = "false"
        for line in (await self._get("events", self._limits.list_bytes, parameters)).split(b"\n"):
            if line:
                self._heard(line)

    def _heard(self, line: bytes) -> None:
        document = _json(line)
        event = None if document is None else _event(document)
        if event is None:
            self.counts.garbage += 1
            if self.counts.garbage > 100 and not self.connected:
                raise EngineError("its events are no events")
            self._list_wanted.set()
            return
        if not event.action:
            return
        key = (event.time_ns, event.id, event.action)
        if key in self._heard_lately:
            return
        self._heard_lately[key] = None
        while len(self._heard_lately) > self._limits.remembered:
            self._heard_lately.popitem(last=False)
        self.counts.events += 1
        self._last_event_ns = max(self._last_event_ns, min(event.time_ns, time.time_ns()))
        if event.action in ("create", "start"):
            # The name at once: the container's first program may run before the engine is asked for more.
            self._table.claim(event.id, self.name, event.facts)
            self._asked.discard(event.id)
        queue = self._in_hand.get(event.id)
        if queue is None:
            queue = self._in_hand[event.id] = deque()
            self._ready.put_nowait(event.id)
        queue.append(event)
        self._nothing_in_hand.clear()
        self._in_hand_count += 1
        if self._in_hand_count > self._limits.events:
            self.counts.overflows += 1
            self._last_event_ns = 0  # the new list explains them
            raise EngineError("its events come faster than they can be worked off")

    async def _work(self) -> None:
        """Work off events: those of one container in order, of several at once."""
        while True:
            container_id = await self._ready.get()
            await self._told_list.wait()
            queue = self._in_hand[container_id]
            self._working += 1
            self._idle.clear()
            try:
                await self._apply(queue[0])
            finally:
                self._working -= 1
                if not self._working:
                    self._idle.set()
            queue.popleft()
            self._in_hand_count -= 1
            if queue:
                self._ready.put_nowait(container_id)
            else:
                del self._in_hand[container_id]
                if not self._in_hand:
                    self._nothing_in_hand.set()

    async def _apply(self, event: _Event) -> None:
        table, facts = self._table, event.facts
        known = table.get(event.id)
        match event.action:
            case "create":
                inspected = await self._inspect(event.id)
                told = replace(inspected.facts, host_pid=0, exit_code=None) if inspected else facts
                table.created(event.id, self.name, event.time_ns, told)
                table.learn(event.id, self.name, Facts())
            case "start":
                # The disk is faster, and knows the pid also of a program that has ended by now.
                on_disk = self._running_facts(event.id)
                inspected = None
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._limits.start if on_disk.host_pid else None):
                        inspected = await self._inspect(event.id)
                told = replace(inspected.facts, exit_code=None) if inspected else facts
                told = replace(
                    told, host_pid=told.host_pid or on_disk.host_pid, oci_config=on_disk.oci_config
                )
                table.running(event.id, self.name, event.time_ns, told)
                table.learn(event.id, self.name, Facts())
            case "die":
                ran = True
                if known is not None and known.state is CREATED:
                    # No start was heard. It may never have run: then it has no time of a start.
                    inspected = await self._inspect(event.id)
                    ran = inspected is not None and inspected.started_ns > 0
                table.exited(event.id, self.name, event.time_ns, facts, ran=ran)
            case "destroy":
                table.destroyed(event.id, self.name, event.time_ns, facts)
            case "rename":
                table.learn(event.id, self.name, facts)

    # The list

    async def _keep_listed(self) -> None:
        while True:
            await self._list_wanted.wait()
            self._list_wanted.clear()
            self._told_list.clear()
            await self._idle.wait()
            running = await self._list()
            self._told_list.set()
            if not self.connected:
                self.connected = True
                self._table.source_up(self.name, self._ask)
                if self._warned:
                    _log.info("%s engine at %s: connected", self.name, self.socket)
                self._warned = False
            for container_id in list(self._asked):
                self._question(container_id)
            for container_id in running:
                await self._look_at_running(container_id)
            await asyncio.sleep(
                self._limits.look
            )  # an engine that talks nonsense makes no more lists than that

    async def _list(self) -> list[str]:
        """Ask for the list and tell it; returns the running containers whose pid is not known yet."""
        limits = self._limits
        body = await self._get("containers/json", limits.list_bytes, {"all": "1"})
        entries = _json(body)
        if not isinstance(entries, list):
            raise EngineError("its list of containers is no list")
        self.counts.lists += 1
        told, running = [], []
        for entry in entries:
            listing = _listing(entry)
            if listing is None:
                self.counts.garbage += 1
                continue
            if self._is_news(listing):
                listing = await self._inspected_listing(listing)
            elif listing.state is RUNNING:
                running.append(listing.id)
            told.append(listing)
        await self._catch_up()
        listings = []
        for listing in told:
            first = self._in_hand[listing.id][0].action if listing.id in self._in_hand else ""
            if first == "create":
                continue  # the event brings it into being
            listings.append(self._before(listing, first))
        self._table.listed(self.name, listings, time.time_ns(), following=self._in_hand)
        for listing in listings:
            if listing.id in self._asked:
                self._asked.discard(listing.id)
        return running

    def _before(self, listing: Listing, action: str) -> Listing:
        """The listing as it was before an event; "" is none."""
        if action == "die":
            state = RUNNING
        elif action == "start":
            known = self._table.get(listing.id)
            state = CREATED if known is not None and known.state is CREATED else EXITED
        else:
            return listing
        return replace(listing, state=state, facts=replace(listing.facts, host_pid=0, exit_code=None))

    def _is_news(self, listing: Listing) -> bool:
        """Whether telling this will make events, so that it should be told with everything."""
        known = self._table.get(listing.id)
        if known is None or known.state is UNKNOWN:
            # Lists have the time in whole seconds: one made in the sensor's first second needs a look.
            return listing.created_ns + 10**9 > self._table.born_ns
        return known.state is not listing.state and listing.state is not EXITED

    async def _inspected_listing(self, listing: Listing) -> Listing:
        inspected = await self._inspect(listing.id, strict=True)
        if inspected is None:
            return listing
        return replace(
            listing,
            state=listing.state if inspected.state is UNKNOWN else inspected.state,
            facts=inspected.facts,
            created_ns=inspected.created_ns or listing.created_ns,
            ran=inspected.started_ns > 0,
        )

    async def _look_at_running(self, container_id: str) -> None:
        """The pid and documents of a container that runs already; a pid that changed is a missed restart."""
        inspected = await self._inspect(container_id)
        known = self._table.get(container_id)
        if inspected is None or known is None or known.state is not RUNNING or inspected.state is not RUNNING:
            return
        if container_id in self._in_hand:
            return
        facts = replace(inspected.facts, exit_code=None)
        facts = replace(facts, oci_config=self._running_facts(container_id).oci_config)
        self._table.running(container_id, self.name, max(inspected.started_ns, self._table.born_ns), facts)

    # What the table asks

    def _ask(self, container_id: str) -> None:
        if not is_hex_id(container_id) or len(self._asked) >= self._limits.questions:
            self._table.disclaim(container_id, self.name)
            return
        self._asked.add(container_id)
        if self.connected:
            self._question(container_id)

    def _question(self, container_id: str) -> None:
        try:
            self._questions.put_nowait(container_id)
        except asyncio.QueueFull:
            self._asked.discard(container_id)
            self._table.disclaim(container_id, self.name)

    async def _answer(self) -> None:
        while True:
            container_id = await self._questions.get()
            inspected = await self._inspect(container_id)
            self._asked.discard(container_id)
            if inspected is None:
                self._table.disclaim(container_id, self.name)
            elif container_id not in self._in_hand:
                known = self._table.get(container_id)
                if known is not None and known.state is UNKNOWN:
                    self._table.listed_one(self.name, inspected.listing(container_id), time.time_ns())

    # Requests

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            raise EngineError("not connected")
        return self._client.session

    def _url(self, path: str) -> str:
        # Without a version the engine speaks its newest; what is read here has been the same since 1.24.
        return f"http://localhost/{path}"

    async def _ping(self) -> None:
        """Find out that an engine hangs: its silent event stream would not tell."""
        while True:
            await asyncio.sleep(self._limits.ping)
            await self._get("_ping", 1 << 16)

    async def _inspect(self, container_id: str, *, strict: bool = False) -> _Inspected | None:
        """What the engine says of one container; None if it is gone or the answer is of no use.

        `strict`: no answer at all is an error.
        """
        self.counts.inspects += 1
        try:
            body = await self._get(f"containers/{container_id}/json", self._limits.inspect_bytes)
            return _inspected(_json(body), body)
        except _NotFoundError:
            return None
        except _OversizedError:
            self.counts.oversized += 1
            return await self._summary(container_id)
        except Exception as error:
            if not _engines_fault(error) or (strict and isinstance(error, _SilentError)):
                raise
            self.counts.inspect_failures += 1
            return None

    async def _summary(self, container_id: str) -> _Inspected | None:
        """The list's entry of one container, for when its document is too long."""
        with suppress(EngineError, OSError, TimeoutError):
            filters = json.dumps({"id": [container_id]})
            body = await self._get(
                "containers/json", self._limits.inspect_bytes, {"all": "1", "filters": filters}
            )
            entries = _json(body)
            listing = _listing(entries[0]) if isinstance(entries, list) and entries else None
            if listing is not None and listing.id == container_id:
                started = listing.created_ns if listing.state is not CREATED else 0
                return _Inspected(listing.facts, listing.state, listing.created_ns, started)
        return None

    async def _get(self, path: str, limit: int, parameters: Mapping[str, str] | None = None) -> bytes:
        """The body of an answer of at most `limit` bytes, read within `answer` seconds."""
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._limits.answer),
                self._session.get(self._url(path), params=parameters) as response,
            ):
                self._is_podman = response.headers.get("Server", "").startswith("Libpod")
                if response.status == 404:
                    raise _NotFoundError(path)
                if response.status != 200:
                    raise EngineError(f"{path}: status {response.status}")
                if (response.content_length or 0) > limit:
                    raise _OversizedError(f"{path}: an answer of {response.content_length} bytes")
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > limit:
                        raise _OversizedError(f"{path}: an answer of more than {limit} bytes")
        except TimeoutError as error:
            raise _SilentError(f"{path}: no answer within {self._limits.answer:g} s") from error
        return bytes(body)


@dataclass(frozen=True, slots=True)
class _Inspected:
    facts: Facts
    state: ContainerState
    created_ns: int
    started_ns: int  # 0: it never ran

    def listing(self, container_id: str) -> Listing:
        return Listing(container_id, self.state, self.facts, self.created_ns, ran=self.started_ns > 0)


def _events_parameters(since_ns: int, until_ns: int | None = None) -> dict[str, str]:
    """Query parameters for events of interest; the engine knows fractions of seconds in this form only."""
    times = {"since": since_ns} if until_ns is None else {"since": since_ns, "until": until_ns}
    parameters = {name: f"{value // 10**9}.{value % 10**9:09}" for name, value in times.items()}
    return parameters | {"filters": json.dumps({"type": ["container"], "event": [*_ACTIONS, *_WORDS]})}


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _engines_fault(error: Exception) -> bool:
    """Whether it is an engine's doing; otherwise it is a mistake of ours."""
    library = type(error).__module__.partition(".")[0] in ("aiohttp", "aiodocker")
    return library or isinstance(error, (EngineError, OSError, TimeoutError))


def _json(text: bytes) -> Any:
    """What the text says; None if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(document: object, *path: str) -> str:
    """A string in a document, made safe: bounded, and valid Unicode. "" if there is none."""
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    if not isinstance(document, str):
        return ""
    return document[:_TEXT_LIMIT].encode("utf-8", "replace").decode()


def _number(document: object, *path: str) -> int | None:
    """An integer in a document, within 32 bits; None if there is none."""
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    if isinstance(document, int) and not isinstance(document, bool) and -(1 << 31) <= document < 1 << 31:
        return document
    return None


def _slashed(name: str) -> str:
    """Names as inspect has them: events leave out the '/'."""
    return name if not name or name.startswith("/") else f"/{name}"


def _image_id(text: str) -> str:
    digits = image_id_of(text)
    return digits if is_hex_id(digits) else ""


def _event(document: object) -> _Event | None:
    """An event of a container; None if it is nonsense, without an action if it is of no interest."""
    if not isinstance(document, dict):
        return None
    container_id, action = _text(document, "Actor", "ID") or _text(document, "id"), _text(document, "Action")
    action = _WORDS.get(action, action)
    time_ns = document.get("timeNano")
    if not is_hex_id(container_id) or not action or type(time_ns) is not int:
        return None
    if _text(document, "Type") not in ("container", "") or action not in _ACTIONS:
        action = ""
    attributes = document["Actor"].get("Attributes") if isinstance(document.get("Actor"), dict) else None
    code = _text(attributes, "exitCode") or _text(attributes, "containerExitCode")
    facts = Facts(
        name=_slashed(_text(attributes, "name")),
        image_name=_text(attributes, "image"),
        exit_code=int(code) if re.fullmatch(r"-?\d{1,9}", code, re.ASCII) else None,
    )
    return _Event(container_id, action, max(0, min(time_ns, 1 << 62)), facts)


def _listing(entry: object) -> Listing | None:
    """One entry of the list."""
    container_id = _text(entry, "Id")
    if not isinstance(entry, dict) or not is_hex_id(container_id):
        return None
    names = entry.get("Names")
    own = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    # Links add names like /other/alias.
    name = min(own, key=lambda one: (one.count("/"), own.index(one)), default="")
    state = _STATES.get(_text(entry, "State").lower(), UNKNOWN)
    if state is UNKNOWN:
        return None
    # "Exited (137) 5 minutes ago"
    code = re.match(r"Exited \((-?\d{1,9})\)", _text(entry, "Status"), re.ASCII)
    facts = Facts(
        name=_slashed(_text({"name": name}, "name")),
        image_id=_image_id(_text(entry, "ImageID")),
        image_name=_text(entry, "Image"),
        exit_code=int(code[1]) if code and state is EXITED else None,
    )
    return Listing(container_id, state, facts, (_number(entry, "Created") or 0) * 10**9)


def _inspected(document: object, raw: bytes) -> _Inspected:
    """An inspect document; EngineError if it is none."""
    if not isinstance(document, dict) or not isinstance(document.get("State"), dict):
        raise EngineError("an inspect document that is none")
    state = _STATES.get(_text(document, "State", "Status").lower(), UNKNOWN)
    facts = Facts(
        name=_slashed(_text(document, "Name")),
        image_id=_image_id(_text(document, "Image")),
        image_name=_text(document, "Config", "Image") or _text(document, "ImageName"),
        host_pid=max(0, _number(document, "State", "Pid") or 0),
        exit_code=_number(document, "State", "ExitCode") if state is EXITED else None,
        docker_config=Document.of(raw),
    )
    return _Inspected(
        facts, state, _time_ns(_text(document, "Created")), _time_ns(_text(document, "State", "StartedAt"))
    )


_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)", re.ASCII)


def _time_ns(text: str) -> int:
    """RFC 3339 as nanoseconds since the epoch; 0 for Go's zero time and for what is no time."""
    match = _TIME.fullmatch(text)
    if match is None:
        return 0
    try:
        seconds = (
            datetime.fromisoformat(match[1] + match[3].replace("Z", "+00:00")).astimezone(UTC).timestamp()
        )
    except (ValueError, OverflowError):
        return 0
    return max(0, int(seconds) * 10**9 + int((match[2] or "").ljust(9, "0")))
