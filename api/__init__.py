"""The wire contract: .proto files, dataclasses generated from them, descriptors.

`ringside.api.v0` has every message of the API; the shared error model (google.rpc) is exported from here.
"""

from __future__ import annotations

from .google.protobuf import Any
from .google.rpc import ErrorInfo, Status

__all__ = ["Any", "ErrorInfo", "Status"]
