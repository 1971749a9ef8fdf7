"""Kernel functions: kprobes and kretprobes of the caller's choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ringside.api.v0 import (
    KernelFunctionCallEventFieldType,
    KernelFunctionCallEventType,
    KernelFunctionCallFilter,
)

from ..errors import KernelError, RequestError, UnservableError
from ..plan import Kernel, Map, Table
from ..tracefs.filter import explain_filter
from ..tracefs.format import Field, Format, Kind
from . import Mechanism
from .bulk import BulkWant

if TYPE_CHECKING:
    from ..sensor import Sensor

FAMILY = "kernel functions"
_LONGEST_FILTER = 4095
_ADDRESSES = ("__probe_ip", "__probe_func", "__probe_ret_ip")
_TYPES = KernelFunctionCallEventFieldType
_INTEGERS = {
    (1, True): _TYPES.SINT8,
    (2, True): _TYPES.SINT16,
    (4, True): _TYPES.SINT32,
    (8, True): _TYPES.SINT64,
    (1, False): _TYPES.UINT8,
    (2, False): _TYPES.UINT16,
    (4, False): _TYPES.UINT32,
    (8, False): _TYPES.UINT64,
}


def argument_entries(field: Field) -> list[tuple[str, Table]]:
    """How one fetched argument stands in the event's map; an array of strings as NAME[0], NAME[1]..."""
    if field.kind is Kind.DATA_LOCS:
        return [
            (f"{field.name}[{at}]", _text(Kernel(field.name, at, faulty=True))) for at in range(field.count)
        ]
    if field.is_string:
        return [(field.name, _text(Kernel(field.name, faulty=True)))]
    if field.kind in (Kind.INTEGER, Kind.BOOL, Kind.POINTER):
        value = "signed_value" if field.signed else "unsigned_value"
        kind = _INTEGERS[field.size, field.signed]
        return [(field.name, {"field_type": kind, value: Kernel(field.name, signed=field.signed)})]
    return [(field.name, {"field_type": _TYPES.BYTES, "bytes_value": Kernel(field.name)})]


def _text(source: Kernel) -> Table:
    return {"field_type": _TYPES.STRING, "string_value": source}


def call_table(record: Format) -> Table:
    """The table of a probe's records."""
    entries = [
        entry
        for field in record.own_fields
        if field.name not in _ADDRESSES
        for entry in argument_entries(field)
    ]
    return {"kernel_call": [("arguments", Map(entries))]}


class KernelCallFamily:
    """Wants for KernelFunctionCallFilter."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor

    def mechanisms(self) -> list[Mechanism]:
        """How this kernel serves kernel function calls."""
        features = self._sensor.features
        if features.kprobes and self._sensor.tracefs.writable:
            return [Mechanism(FAMILY, True, "kprobes", "BTF arguments" if features.btf else "")]
        return [Mechanism(FAMILY, False, "none", *_missing(features.kprobes))]

    def wants(self, request: KernelFunctionCallFilter, path: str) -> list[BulkWant]:
        """What a filter asks for. RequestError if it makes no sense, UnservableError without kprobes."""
        kinds = (KernelFunctionCallEventType.ENTER, KernelFunctionCallEventType.EXIT)
        if request.type not in kinds:
            raise RequestError(
                f"{path}.type",
                "must be KERNEL_FUNCTION_CALL_EVENT_TYPE_ENTER or KERNEL_FUNCTION_CALL_EVENT_TYPE_EXIT",
            )
        if not request.symbol:
            raise RequestError(f"{path}.symbol", "is missing: name a kernel function")
        if len(request.filter.encode("utf-8", "replace")) > _LONGEST_FILTER:
            raise RequestError(
                f"{path}.filter", f"longer than {_LONGEST_FILTER} bytes, the kernel takes no more"
            )
        if "\0" in request.filter:
            raise RequestError(f"{path}.filter", "holds a NUL")
        fetchargs = tuple(sorted(request.arguments.items()))
        try:
            spec = self._sensor.probes.kprobe(
                "call", request.symbol, fetchargs, is_return=request.type == kinds[1]
            )
            features = self._sensor.features
            if not features.kprobes or not self._sensor.tracefs.writable:
                cause, hint = _missing(features.kprobes)
                raise UnservableError(FAMILY, cause, hint)
            event = self._sensor.probes.get(
                spec, call_table, fixed_filter=request.filter or None, may_miss=True
            )
        except RequestError as error:
            raise RequestError(f"{path}.{error.field}", error.problem) from error
        except KernelError as error:
            raise UnservableError(FAMILY, str(error)) from error
        if request.filter and not event.kernel.is_open:
            self._try_filter(request.filter, event.record, path)
        return [BulkWant(FAMILY, event)]

    def _try_filter(self, text: str, record: Format, path: str) -> None:
        group = self._sensor.probes.group
        problem = explain_filter(self._sensor.tracefs, group, record.name, text)
        if problem is not None:
            raise RequestError(f"{path}.filter", f"the kernel refuses {text!r}: {problem}")


def _missing(has_kprobes: bool) -> tuple[str, str]:
    if has_kprobes:
        return "tracefs can't be written to", "mount it read-write"
    return "this kernel has no kprobes", "a kernel with CONFIG_KPROBE_EVENTS"


__all__: list[Any] = ["FAMILY", "KernelCallFamily", "argument_entries", "call_table"]
