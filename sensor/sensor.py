"""The sensor: opens the kernel's events, drains the rings, serves subscriptions. One asyncio task's worth."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

from ringside.api.v0 import Subscription

from ._perf import lib
from .config import Config
from .engine import Engine, check, clock
from .errors import KernelError, SetupError, UnservableError
from .events import Family, Mechanism
from .events.container import FAMILY as CONTAINERS
from .events.container import ContainerFamily
from .events.debug import DebugFamily
from .events.file import FileFamily
from .events.kernel_call import KernelCallFamily
from .events.network import NetworkFamily
from .events.probes import Probes
from .events.process import FAMILY as PROCESSES
from .events.process import WAIT, ProcessFamily
from .events.syscall import SyscallFamily
from .metrics import Metrics
from .perf import HotplugSocket, Lane, Rings
from .process import ProcessTable
from .procfs import Procfs
from .subscription import Code, Loss, Output, Request, Subscriber, check_request, make_status
from .tracefs.filter import ALWAYS, Filter, exclude
from .tracefs.mount import open_tracefs
from .tracefs.probe import probe_features, sweep

log = logging.getLogger(__name__)

_RECORD, _FULL, _LOST, _UNKNOWN, _CORRUPT, _YIELD, _CGROUP = (  # a look at lib costs more than the comparison
    lib.RS_RECORD,
    lib.RS_FULL,
    lib.RS_LOST,
    lib.RS_UNKNOWN,
    lib.RS_CORRUPT,
    lib.RS_YIELD,
    lib.RS_CGROUP,
)
_BUDGET = 1 << 14  # records between two turns for others
_TURNS = 1 << 9  # lifecycle records between them
_IDLE_INTERVAL = 100_000_000  # ns between drains while nobody listens
_QUIET = 2.5  # drain intervals between drains that find nothing, at most: a wake-up costs more than a drain
_AGAIN = 1_000_000  # ns until a record that waits is tried again
_HOUSEKEEPING = 1.0  # s
_EVER = (1 << 64) - 1
_INIT_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h


class Sensor:
    """Use as `async with Sensor(config) as sensor`. Starting raises SetupError if it can't run here."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.outputs: dict[int, Output] = {}
        self._shared: dict[tuple[bytes, ...], Output] = {}
        self._checking = 0  # requests, whose probes nobody wants yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._soon: asyncio.Handle | None = None
        self._closing: list[Callable[[], None]] = []
        self._running = False
        self._draining = False
        self._drained = 0  # what is older than this has been handled
        self._stopping = False
        self._resync = False  # lifecycle records were lost
        self._losses_at = 0
        self._every = 0  # ns between two drains, as the timer is set
        self._quiet = 1.0  # how many drain intervals to wait
        self._seen = 0  # records, up to the last drain

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _start(self) -> None:
        config = self.config
        self.procfs = Procfs(config.proc)
        self._check_privileges()
        self.tracefs = open_tracefs(config.proc)
        self._closing.append(self.tracefs.close)
        self.sensor_id = config.sensor_id or f"{self.procfs.boot_id()[:8]}{secrets.token_hex(4)}"
        self.pid = os.getpid()
        self.engine = Engine(self.sensor_id, self.pid)
        self._closing.append(self.engine.close)
        self._threads = [self.pid, self.engine.start_courier()]
        self.rings = Rings(self.engine, config.ring_size, config.lifecycle_ring_size, config.ring_total)
        self._closing.append(self.rings.close)
        self._loop = asyncio.get_running_loop()
        self._timer = check(lib.rs_timer_open(), "timerfd_create")
        self._loop.add_reader(self._timer, self._drain_now)
        self._closing.append(self._close_timer)
        self.rings.on_open = lambda fd: self._loop.add_reader(fd, self._drain_now)
        self.rings.on_close = self._forget_reader
        self._hotplug = HotplugSocket()
        self._closing.append(self._hotplug.close)
        if self._hotplug.socket is not None:
            descriptor = self._hotplug.socket.fileno()
            self._loop.add_reader(descriptor, self._cpus_changed)
            self._closing.append(lambda: self._forget_reader(descriptor))
        self.metrics = Metrics(self.engine.counters, self._gauges)
        self.processes = ProcessTable(self.engine, self.procfs)
        self.features = probe_features(self.tracefs)
        sweep(self.tracefs, config.proc)
        self.probes = Probes(self)
        self.process_family = ProcessFamily(self)
        self._closing.append(self.process_family.close)
        self.container_family = ContainerFamily(self)
        self._closing.append(self.container_family.close)
        self._closing.append(self.probes.close)
        syscalls, debug = SyscallFamily(self), DebugFamily(self)
        files, network, calls = FileFamily(self), NetworkFamily(self), KernelCallFamily(self)
        self._all_families: list[Family] = [
            syscalls,
            self.process_family,
            files,
            network,
            calls,
            self.container_family,
            debug,
        ]
        self.families: dict[str, Callable[[Any, str], Sequence[Any]]] = {
            "syscall_events": syscalls.wants,
            "process_events": self.process_family.wants,
            "file_events": files.wants,
            "kernel_events": calls.wants,
            "network_events": network.wants,
            "container_events": self.container_family.wants,
            "chargen_events": debug.chargen,
            "ticker_events": debug.ticker,
        }
        self.process_family.open()
        self.processes.scan()
        self.container_family.open()
        self._running = True
        self._losses_at = clock()
        self._drain_now()
        self.spawn(self._housekeeping(), "housekeeping")

    async def close(self) -> None:
        """End all streams, remove everything from the kernel. Idempotent."""
        self._running = False
        if self._soon is not None:
            self._soon.cancel()
        await self.stop_streams()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._closing:
            self._closing.pop()()

    async def stop_streams(self) -> None:
        """End every stream, as a sensor that goes away."""
        self._stopping = True
        ended = [one for output in list(self.outputs.values()) for one in list(output.subscribers)]
        for subscriber in ended:
            self._leave(subscriber)
            subscriber.end(SensorStopped())
        await asyncio.sleep(0)

    def _close_timer(self) -> None:
        self._forget_reader(self._timer)
        os.close(self._timer)

    def _forget_reader(self, descriptor: int) -> None:
        self._loop.remove_reader(descriptor)

    def _check_privileges(self) -> None:
        try:
            namespace = os.stat("/proc/self/ns/pid").st_ino
        except OSError:
            namespace = _INIT_PID_NAMESPACE
        if namespace != _INIT_PID_NAMESPACE:
            raise SetupError(
                "this is not the host's pid namespace, so processes can't be told apart",
                "start the container with --pid=host (hostPID: true in Kubernetes)",
            )
        if not Path(self.config.proc, "self").exists():
            raise SetupError(
                f"no procfs at {self.config.proc}", "mount one, or set --proc to where the host's is"
            )

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something until the sensor stops; it is logged if it fails."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed", task.get_name(), exc_info=task.exception())

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING)
            self._cpus_changed()
            self._count_misses()
            self.process_family.read_exits()
            self.container_family.weigh()
            self._count_losses(
                self._losses_at, clock()
            )  # the last of a burst has no record behind it to tell

    def _count_misses(self) -> None:
        now = clock()
        for event, missed in self.probes.misses():
            loss = Loss(
                f"the probe on {event.name} missed calls",
                missed,
                now - int(_HOUSEKEEPING * 1e9),
                now,
                at_most=True,
            )
            self.report(event.outputs, loss)

    def _cpus_changed(self) -> None:
        self._hotplug.changed()
        try:
            self.rings.follow_cpus()
        except (KernelError, SetupError, UnservableError) as error:
            log.warning("following the CPUs: %s", error)

    # -- what families need ------------------------------------------------------------------------

    def exclude_self(self) -> Filter:
        """The kernel filter that leaves out what the sensor's own threads do, unless that is wanted."""
        return ALWAYS if self.config.include_self else exclude("common_pid", self._threads)

    def lineage_flag(self) -> int:
        """The flag for sources whose events carry the lineage."""
        flag: int = lib.RS_LINEAGE if self.config.lineage == "all" else 0
        return flag

    def output(self, number: int) -> Output:
        """The output of this number."""
        return self.outputs[number]

    def publish(self, outputs: Sequence[int], when: int, body: bytes, container: int = 0) -> int:
        """An event of no process."""
        return self.engine.emit(outputs, when, body, container=container)

    def flush(self, output: Output) -> None:
        """Send on what an output has, and end its streams if its limit is reached."""
        output.flush()
        if output.request.limit and not self.engine.limit_left(output.number):
            for subscriber in output.subscribers:
                subscriber.end()

    def moment(self) -> int:
        """The time of the record that is being handled, else of now (CLOCK_MONOTONIC_RAW, ns)."""
        when: int = self.engine.stop.time if self._draining else 0
        return when or clock()

    def waited_for(self, when: int) -> bool:
        """True if it is past that time (CLOCK_MONOTONIC_RAW ns)."""
        return clock() >= when

    def mechanisms(self) -> list[Mechanism]:
        """How each event family is served here."""
        return [row for family in self._all_families for row in family.mechanisms()]

    def _gauges(self) -> dict[str, float]:
        return {
            "subscribers": sum(len(output.subscribers) for output in self.outputs.values()),
            "outputs": len(self.outputs),
            "processes": len(self.processes),
            "queued_bytes": sum(
                one.waiting for output in self.outputs.values() for one in output.subscribers
            ),
            "cpus": len(self.rings.cpus),
            "events_limited_to_cgroups": sum(bool(one.cgroups) for one in self.rings.open_events),
        }

    # -- the drain ---------------------------------------------------------------------------------

    def _drain_now(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if not self._running:
            return
        try:
            delay = self._drain()
        except Exception:
            log.exception("a record could not be handled")
            delay = _AGAIN
        if not self._running:
            return
        if delay == 0:
            self._soon = self._loop.call_soon(self._drain_now)
        else:
            lib.rs_timer_every(self._timer, delay, delay == self._every)
            self._every = delay

    def drain_once(self) -> None:
        """Read the rings now, whoever waits for what is in them; nothing if that is being done."""
        if not self._draining:
            self._drain()

    def _drain(self) -> int:
        """Read the rings; how long until the next time, in ns, 0 if there is more at once."""
        self._draining = True
        try:
            return self._drain_all()
        finally:
            self._draining = False

    def _drain_all(self) -> int:
        engine, handlers, stop = self.engine, self.process_family.handlers, self.engine.stop
        delay = -1
        budget, turns = _BUDGET, _TURNS
        drain, handle = lib.rs_drain, engine.handle  # for each record: straight to C
        while True:
            why = drain(handle, budget, stop)
            if why == _RECORD:
                handler = handlers.get(stop.source)
                if handler is not None and handler() == WAIT:
                    lib.rs_again(engine.handle)
                    delay = _AGAIN
                    break
                turns -= 1
                if turns == 0:
                    delay = 0
                    break
            elif why == _FULL:
                if stop.index in self.outputs:
                    self.flush(self.outputs[stop.index])
            elif why == _UNKNOWN:
                self.processes.learn(stop.pid)
            elif why == _CGROUP:
                self.container_family.executed(stop.pid, stop.cgroup)
            elif why in (_LOST, _CORRUPT):
                self._lost(why == _CORRUPT)
            elif why == _YIELD:
                delay = 0
                break
            else:
                self.processes.look_for_foreign(stop.time)
                self._drained = stop.time
                if self.rings.unsettled:
                    self.rings.settle(self._drained)
                if self._resync:
                    self._resync = False
                    self.processes.resync()
                break
        for number in engine.gathered():
            if number in self.outputs:
                self.flush(self.outputs[number])
        return self._interval() if delay < 0 else delay

    def _interval(self) -> int:
        """ns until the next drain: more if the last ones found nothing."""
        before, self._seen = self._seen, self.engine.records
        self._quiet = 1.0 if self._seen != before else min(1.5 * self._quiet, _QUIET)
        return int(self._quiet * self.config.drain_interval) if self.outputs else _IDLE_INTERVAL

    def _lost(self, corrupt: bool) -> None:
        stop = self.engine.stop
        lane = self.rings.lane_of(stop.index)
        name = lane.value if lane else "closed"
        if lane is Lane.LIFECYCLE or lane is Lane.PROMPT:
            self._resync = True
        if corrupt:
            log.warning("the %s ring of CPU %d held %d bytes that are no record", name, stop.cpu, stop.count)
            self.report(
                None, Loss(f"the {name} ring of CPU {stop.cpu} held no valid record", 1, stop.time, stop.time)
            )
        elif not self._count_losses(stop.since or stop.time, stop.time):
            log.warning("the %s ring of CPU %d was full: %d records lost", name, stop.cpu, stop.count)
            outputs = [
                output.number for output in self.outputs.values() if lane is Lane.LIFECYCLE or output.has_bulk
            ]
            cause = f"the {name} ring of CPU {stop.cpu} was full"
            self.report(outputs, Loss(cause, stop.count, stop.since or stop.time, stop.time, True))

    def _count_losses(self, since: int, until: int) -> bool:
        """Tell each event's subscribers what the kernel says was lost of it; False if it does not say."""
        for event in list(self.rings.open_events):
            count = event.lost()
            if count is None:
                return False
            if count:
                log.warning("%s: %d records found a ring full and are lost", event.name, count)
                outputs = event.outputs() if event.outputs is not None else None
                self.report(outputs, Loss(f"{event.name}: a ring was full", count, since, until, True))
                if event.lane is not Lane.BULK and outputs is None:
                    self._resync = True
        self._losses_at = until
        return True

    def report(self, outputs: list[int] | None, loss: Loss) -> None:
        """Tell the subscribers of these outputs, or of all, what they did not get."""
        for number in list(self.outputs) if outputs is None else dict.fromkeys(outputs):
            if number in self.outputs:
                for subscriber in self.outputs[number].subscribers:
                    subscriber.report(replace(loss))

    # -- subscriptions -----------------------------------------------------------------------------

    @asynccontextmanager
    async def subscribe(self, subscription: Subscription | None) -> AsyncIterator[Subscriber]:
        """A stream of encoded GetEventsResponse messages; the first says that the subscription is live.

        RequestError for a request that makes no sense, UnservableError if no part of it can be served.
        """
        subscriber = await self._join(subscription)
        try:
            yield subscriber
        finally:
            self._leave(subscriber)

    async def _join(self, subscription: Subscription | None) -> Subscriber:
        self._checking += 1
        try:
            return self._join_checked(await check_request(self, subscription))
        finally:
            self._checking -= 1
            self._tidy()

    def _tidy(self) -> None:
        if not self._checking:
            self.probes.tidy()

    def _join_checked(self, request: Request) -> Subscriber:
        if self._stopping:
            raise SensorStopped
        if not request.wants:
            raise request.refused[0][1]
        subscriber = Subscriber(self, self.config.queue_size)
        output = self._shared.get(request.key) if request.key is not None else None
        if request.since is not None:
            self.drain_once()  # what is read by now is told from memory, and all else when it is read
        if output is None:
            output = Output(self, request)
            output.subscribers.append(subscriber)
            subscriber.output = output
            output.open()
            if request.key is not None:
                self._shared[request.key] = output
        else:
            output.flush()  # what came before is not for the one who comes now
            output.subscribers.append(subscriber)
            subscriber.output = output
        self.metrics.subscribers.inc()
        subscriber.tell(
            make_status(Code.OK, "subscribed"),
            *(
                make_status(
                    Code.FAILED_PRECONDITION,
                    f"{path}: {error}",
                    "FILTER_NOT_SERVED",
                    family=error.family,
                    cause=error.cause,
                    hint=error.hint,
                )
                for path, error in output.refused
            ),
            *(
                make_status(
                    Code.FAILED_PRECONDITION, f"{family}: {note}", "BEST_EFFORT", family=family, cause=note
                )
                for family, note in output.notes()
            ),
        )
        if output.request.since is not None:
            self._look_back(output, subscriber, output.request.since)
        if output.until:
            self._expire_in(max(0, output.until - clock()) / 1e9 + 0.03, subscriber)
        self._drain_now()
        return subscriber

    def _look_back(self, output: Output, subscriber: Subscriber, since: int) -> None:
        families = {want.family for want in output.attached}
        if families - {PROCESSES, CONTAINERS}:
            subscriber.tell(
                make_status(
                    Code.FAILED_PRECONDITION,
                    "since_duration: only process and container events are remembered; the others begin now",
                    "NOT_REMEMBERED",
                )
            )
        start, past = max(0, clock() - since), self.container_family
        known = max(
            self.process_family.remembered_since if PROCESSES in families else 0,
            past.remembered_since if CONTAINERS in families else 0,
        )
        if start < known:
            subscriber.tell(
                make_status(
                    Code.FAILED_PRECONDITION,
                    f"since_duration: nothing older than {(clock() - known) / 1e9:.0f} s is remembered",
                    "NOT_REMEMBERED",
                )
            )
        replay = self.process_family.replay(output.number, start)
        for when in chain(past.look_back(output.number, start), (_EVER,)):
            while replay(when):
                self.flush(output)

    def _expire_in(self, delay: float, subscriber: Subscriber) -> None:
        subscriber.expiry = self._loop.call_later(delay, self._expire, subscriber)

    def _expire(self, subscriber: Subscriber) -> None:
        output = subscriber.output
        if output is not None:
            self._drain_now()
            if self._drained < output.until:  # much waits; what belongs to the subscription is among it
                self._expire_in(_AGAIN / 1e9, subscriber)
            else:
                subscriber.end()

    def _leave(self, subscriber: Subscriber) -> None:
        output = subscriber.output
        subscriber.output = None
        if subscriber.expiry is not None:  # it may be years away
            subscriber.expiry.cancel()
        if output is None:
            return
        if subscriber in output.subscribers:
            output.subscribers.remove(subscriber)
        if not output.subscribers:
            if output.request.key is not None:
                self._shared.pop(output.request.key, None)
            output.close()
            self._tidy()


class SensorStopped(UnservableError):
    """The sensor is shutting down."""

    def __init__(self) -> None:
        super().__init__("sensor", "is shutting down", "reconnect when it is back")
