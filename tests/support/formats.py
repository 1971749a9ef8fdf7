"""What tests ask of a record's format."""

from __future__ import annotations

from ringside.sensor.tracefs.format import Format


def fixed_size(record: Format) -> int:
    """Bytes of the fixed part of a record: the end of its last field."""
    return max((field.offset + field.size for field in record.fields), default=0)
