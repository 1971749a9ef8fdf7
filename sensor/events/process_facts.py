"""What process events say: the facts that C gathers (rs_facts in _perf.h), and which goes where."""

from __future__ import annotations

from ringside.api.v0 import ProcessEventType

from ..bpf import record_format
from ..plan import Kernel, Table, Texts, When

FORK, EXEC, EXIT = ProcessEventType.FORK, ProcessEventType.EXEC, ProcessEventType.EXIT

FACTS, _ = record_format(
    "process",
    code="s32",
    status="u32",
    signal="u32",
    core="u32",
    known="u32",
    child="s32",
    child_id="char",
    filename="char",
)

TABLES: dict[ProcessEventType, Table] = {
    FORK: {"process": {"type": FORK, "fork_child_pid": Kernel("child"), "fork_child_id": Kernel("child_id")}},
    EXEC: {
        "process": {"type": EXEC, "exec_filename": Kernel("filename"), "exec_command_line": Texts()},
    },
    EXIT: {
        "process": [
            ("type", EXIT),
            When(
                Kernel("known"),
                1,
                {
                    "exit_code": Kernel("code"),
                    "exit_status": Kernel("status"),
                    "exit_signal": Kernel("signal"),
                    "exit_core_dumped": Kernel("core"),
                },
            ),
        ]
    },
}
