"""The sensor's own figures, served to Prometheus if asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .errors import SetupError

if TYPE_CHECKING:
    from .config import Address


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, by: int = 1) -> None:
        """Count."""
        self.value += by


class Metrics:
    """Counters kept by the sensor; the engine's are read when asked for."""

    def __init__(self, engine: Callable[[], dict[str, int]], gauges: Callable[[], dict[str, float]]) -> None:
        self.dropped = Counter()
        self.statuses = Counter()
        self.subscribers = Counter()
        self.engine_warnings = Counter()
        self._engine = engine
        self._gauges = gauges
        self._started = time.monotonic()

    def figures(self) -> dict[str, float]:
        """Everything, by name."""
        return {
            **{f"engine_{name}": value for name, value in self._engine().items()},
            "subscriber_dropped": self.dropped.value,
            "subscribers_ever": self.subscribers.value,
            "container_engine_warnings": self.engine_warnings.value,
            **self._gauges(),
        }

    def collect(self) -> Iterable[Any]:
        """For prometheus_client's registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        gauges = self._gauges()
        for name, value in self.figures().items():
            family = GaugeMetricFamily if name in gauges else CounterMetricFamily
            yield family(f"ringside_{name}", name.replace("_", " "), value=value)

    def serve(self, address: Address) -> Callable[[], None]:
        """Serve them at http://HOST:PORT/metrics; the way to stop."""
        from prometheus_client import start_http_server
        from prometheus_client.core import CollectorRegistry

        registry = CollectorRegistry()
        registry.register(self)
        try:
            server, thread = start_http_server(address.port, addr=address.host, registry=registry)
        except OSError as error:
            raise SetupError(f"no metrics at {address}: {error.strerror}", "choose another") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
