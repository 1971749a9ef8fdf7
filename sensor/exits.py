"""Exit codes from the proc connector: what sched_process_exit does not tell.

The kernel sends a netlink message for each thread that exits (drivers/connector/cn_proc.c,
proc_exit_connector). A classic socket filter drops all other kinds before they wake anybody.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import OrderedDict

from .engine import clock
from .errors import UnservableError

_NETLINK_CONNECTOR = 11
_CN_IDX_PROC = _CN_VAL_PROC = 1
_LISTEN = 1
_EXIT = 0x80000000
_MESSAGE = struct.Struct("=IHHII IIIIHH")  # nlmsghdr, cn_msg
_EVENT = struct.Struct("=IIQ iiI")  # what, cpu, timestamp_ns; process_pid, process_tgid, exit_code
_EVENT_OFFSET = _MESSAGE.size
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_KEEP = 4096
_PATIENCE = 0.5  # s
_APART = 100_000_000  # ns: no thread id comes again so soon, and no two clocks drift apart so far


class ExitConnector:
    """The last few thousand exits, by thread id. UnservableError if the kernel won't tell."""

    family = "process exit status"

    def __init__(self) -> None:
        self._codes: OrderedDict[int, tuple[int, int]] = OrderedDict()  # thread: when, status
        self.lost = 0
        try:
            self.socket = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
                _NETLINK_CONNECTOR,
            )
        except OSError as error:
            raise UnservableError(
                self.family, "no proc connector", "a kernel with CONFIG_PROC_EVENTS, or with kprobes"
            ) from error
        try:
            for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):
                try:
                    self.socket.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
                    break
                except OSError:
                    continue
            self._only_exits()
            self.socket.bind((0, _CN_IDX_PROC))
            self._request(_LISTEN)
            self._prove()
        except OSError as error:
            self.socket.close()
            raise UnservableError(
                self.family,
                f"the proc connector refuses: {error.strerror}",
                "CAP_NET_ADMIN in the host's namespaces, or a kernel with kprobes",
            ) from error

    def fileno(self) -> int:
        """The socket, readable when somebody exited."""
        return self.socket.fileno()

    def _only_exits(self) -> None:
        # BPF_LD|W|ABS what; BPF_JEQ EXIT; BPF_RET all; BPF_RET nothing. LD swaps from network order.
        exit_in_network_order = struct.unpack(">I", struct.pack("=I", _EXIT))[0]
        code = b"".join(
            struct.pack("=HBBI", *one)
            for one in (
                (0x20, 0, 0, _EVENT_OFFSET),
                (0x15, 0, 1, exit_in_network_order),
                (0x06, 0, 0, 0xFFFFFFFF),
                (0x06, 0, 0, 0),
            )
        )
        buffer = ctypes.create_string_buffer(code)
        program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def _prove(self) -> None:
        """A thread of ours ends: in a network or pid namespace of our own nobody would tell of it."""
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        deadline = time.monotonic() + _PATIENCE
        while thread.native_id not in self._codes:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.socket], [], [], left)[0]:
                raise OSError(errno.ENOMSG, "it is silent about an exit of our own")
            self.read()
        self._codes.clear()

    def _request(self, operation: int) -> None:
        body = struct.pack("=I", operation)
        self.socket.send(
            _MESSAGE.pack(
                _MESSAGE.size + len(body),
                3,
                0,
                0,
                os.getpid(),
                _CN_IDX_PROC,
                _CN_VAL_PROC,
                0,
                0,
                len(body),
                0,
            )
            + body
        )

    def read(self) -> None:
        """Take in what has come."""
        codes = self._codes
        offset = clock() - time.monotonic_ns()
        while True:
            try:
                message = self.socket.recv(1024)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: some are lost, their processes exit without a code
                self.lost += 1
                continue
            if len(message) >= _EVENT_OFFSET + _EVENT.size:
                what, _, when, tid, _, code = _EVENT.unpack_from(message, _EVENT_OFFSET)
                if what == _EXIT:
                    codes[tid] = when + offset, code
                    codes.move_to_end(tid)
        while len(codes) > _KEEP:
            codes.popitem(last=False)

    def take(self, tid: int, since: int) -> int | None:
        """The raw wait(2) status of a thread whose exit began then (CLOCK_MONOTONIC_RAW ns).

        None if it is not known (yet): what an earlier thread of that id exited with is somebody else's.
        """
        told = self._codes.pop(tid, None)
        return told[1] if told is not None and told[0] > since - _APART else None

    def close(self) -> None:
        """Stop listening; idempotent."""
        self.socket.close()
