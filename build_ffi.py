"""Describes the C module to cffi; setup.py builds it as ringside.sensor._perf."""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]

ffibuilder = FFI()
ffibuilder.cdef((HERE / "sensor" / "_perf.h").read_text())
ffibuilder.set_source(
    "ringside.sensor._perf",
    '#include "_perf.c"',
    include_dirs=["sensor"],
    depends=[
        f"sensor/{name}"
        for name in (
            "_perf.c",
            "_perf.h",
            "_bytes.h",
            "_plan.c",
            "_processes.c",
            "_outputs.c",
            "_sources.c",
            "_lifecycle.c",
            "_rings.c",
            "_bpf.c",
            "_uring.c",
            "_courier.c",
            "_loop.c",
        )
    ],
    py_limited_api=True,
    extra_compile_args=[
        "-std=gnu11",
        "-O3",
        "-Wall",
        "-Wextra",
        *(["-Werror"] if os.environ.get("RINGSIDE_WERROR") else []),
        # what cffi itself generates is not ours to mend
        "-Wno-unused-parameter",
        "-Wno-unused-function",
        "-Wno-missing-field-initializers",
        *(SANITIZE if os.environ.get("RINGSIDE_SANITIZE") else []),
    ],
    extra_link_args=SANITIZE[:1] if os.environ.get("RINGSIDE_SANITIZE") else [],
)
