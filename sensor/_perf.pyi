# The C engine as cffi presents it: `lib` has what _perf.h declares (a test compares the two).

from typing import Any, TypeAlias

# cffi's objects have whatever attributes their C type has, so this is where typing ends
CData: TypeAlias = Any
Bytes: TypeAlias = Any  # bytes, or a char pointer

class _FFI:
    NULL: CData
    def new(self, cdecl: str, init: object = ..., /) -> CData: ...
    def cast(self, cdecl: str, source: object, /) -> CData: ...
    def buffer(self, cdata: CData, size: int = ..., /) -> Any: ...
    def from_buffer(self, cdecl: Any, python_buffer: Any = ..., /) -> CData: ...
    def memmove(self, dest: Any, src: Any, n: int, /) -> None: ...
    def sizeof(self, cdecl: str | CData, /) -> int: ...
    def offsetof(self, cdecl: str, *fields: str) -> int: ...
    def typeof(self, cdecl: str | CData, /) -> Any: ...

class _Lib:
    RS_OP_CONST: int
    RS_OP_UINT: int
    RS_OP_INT: int
    RS_OP_ZIGZAG: int
    RS_OP_BOOL: int
    RS_OP_RAW: int
    RS_OP_CHARS: int
    RS_OP_STRING: int
    RS_OP_BYTES: int
    RS_OP_BLOCK: int
    RS_OP_BEGIN: int
    RS_OP_END: int
    RS_OP_UNLESS: int
    RS_OP_TEXTS: int
    RS_OP_FETCHED: int
    RS_KEEP_ZERO: int
    RS_SWAP: int
    RS_SIDE: int
    RS_ABSTRACT: int
    RS_SIGNED: int
    RS_FAULTY: int
    RS_DATA_LOC: int
    RS_ACCEPT: int
    RS_REJECT: int
    RS_EQ: int
    RS_NE: int
    RS_LT: int
    RS_LE: int
    RS_GT: int
    RS_GE: int
    RS_GLOB: int
    RS_BITS: int
    RS_TEST_INT: int
    RS_TEST_TEXT: int
    RS_LIFECYCLE: int
    RS_FETCHED: int
    RS_LINEAGE: int
    RS_CALLER: int
    RS_NATIVE: int
    RS_ALIEN: int
    RS_BEHIND: int
    RS_FOREIGN: int
    RS_ALIVE: int
    RS_KERNEL_THREAD: int
    RS_NAMELESS: int
    RS_LATEST_FIRST: int
    RS_LATEST_LAST: int
    RS_HOLD: int
    RS_DONE: int
    RS_RECORD: int
    RS_FULL: int
    RS_LOST: int
    RS_UNKNOWN: int
    RS_CORRUPT: int
    RS_YIELD: int
    RS_CGROUP: int
    RS_BOOT: int
    RS_COMM: int
    RS_CGROUPS_NONE: int
    RS_CGROUPS_HOST: int
    RS_CGROUPS_ALL: int
    RS_ON_NOTHING: int
    RS_ON_FORK: int
    RS_ON_RENAME: int
    RS_ON_EXEC: int
    RS_ON_EXEC_TOLD: int
    RS_ON_EXIT: int
    RS_ON_EXIT_TOLD: int
    RS_PERF_RING: int
    RS_PERF_OUTPUT: int
    RS_PERF_SWITCHES: int
    RS_FETCH_ARGUMENTS: int
    RS_FETCH_TEXT: int
    RS_FETCH_BLOCK: int
    RS_FETCH_NAME: int
    RS_FETCH_32: int
    RS_FETCH_WITHIN: int

    def rs_new(
        self,
        self_pid: int,
        tags: CData,
        first_sequence: int,
        id_prefix: Bytes,
        id_length: int,
        sensor_field: Bytes,
        sensor_length: int,
        /,
    ) -> CData: ...
    def rs_free(self, e: CData, /) -> None: ...
    def rs_clock(self, /) -> int: ...
    def rs_count(self, e: CData, /) -> CData: ...
    def rs_sequence(self, e: CData, /) -> int: ...
    def rs_perf_open(self, perf: CData, cpu: int, cgroup_fd: int, /) -> int: ...
    def rs_perf_id(self, fd: int, id: CData, /) -> int: ...
    def rs_perf_filter(self, fd: int, filter: Bytes, /) -> int: ...
    def rs_perf_redirect(self, fd: int, ring_fd: int, /) -> int: ...
    def rs_perf_enable(self, fd: int, on: int, /) -> int: ...
    def rs_perf_lost(self, fd: int, /) -> int: ...
    def rs_perf_count(self, fd: int, /) -> int: ...
    def rs_perf_program(self, fd: int, program: int, /) -> int: ...
    def rs_bpf_map(self, type: int, key_size: int, value_size: int, entries: int, /) -> int: ...
    def rs_bpf_map_set(self, map: int, key: Bytes, value: Bytes, /) -> int: ...
    def rs_bpf_program(self, name: Bytes, code: Bytes, count: int, log: CData, log_size: int, /) -> int: ...
    def rs_bpf_missed(self, program: int, /) -> int: ...
    def rs_bpf_map_next(self, map: int, key: CData | Bytes, next: CData, /) -> int: ...
    def rs_bpf_map_get(self, map: int, key: CData | Bytes, value: CData, /) -> int: ...
    def rs_uring_request(self, request: Bytes, /) -> int: ...
    def rs_courier_start(self, e: CData, priority: int, /) -> int: ...
    def rs_fetch_set(self, e: CData, id: int, fetches: CData, n_fetches: int, /) -> int: ...
    def rs_ring_prompt(self, e: CData, fd: int, cpu: int, pages: int, /) -> int: ...
    def rs_fetch_arguments(
        self,
        pid: int,
        abi: int,
        sp: int,
        stack: Bytes,
        stack_length: int,
        out: CData,
        room: int,
        argc: CData,
        address: CData,
        complete: CData,
        /,
    ) -> int: ...
    def rs_ring_open(self, e: CData, fd: int, cpu: int, pages: int, /) -> int: ...
    def rs_ring_attach(self, e: CData, memory: CData, pages: int, page_size: int, cpu: int, /) -> int: ...
    def rs_ring_close(self, e: CData, ring: int, /) -> None: ...
    def rs_ring_lost(self, e: CData, ring: int, /) -> int: ...
    def rs_ring_waiting(self, e: CData, ring: int, /) -> int: ...
    def rs_source_set(
        self,
        e: CData,
        source: int,
        flags: int,
        ops: CData,
        n_ops: int,
        pool: Bytes,
        pool_length: int,
        key_offset: int,
        key_size: int,
        /,
    ) -> int: ...
    def rs_source_route(
        self,
        e: CData,
        source: int,
        entries: CData,
        n_entries: int,
        tests: CData,
        n_tests: int,
        pool: Bytes,
        pool_length: int,
        /,
    ) -> int: ...
    def rs_source_view(
        self,
        e: CData,
        source: int,
        offset: int,
        length: int,
        count_offset: int,
        /,
    ) -> int: ...
    def rs_source_elsewhere(self, e: CData, source: int, /) -> int: ...
    def rs_event_set(self, e: CData, id: int, source: int, order: int, since: int, until: int, /) -> int: ...
    def rs_event_end(self, e: CData, id: int, time: int, /) -> None: ...
    def rs_event_clear(self, e: CData, id: int, /) -> None: ...
    def rs_output_set(
        self,
        e: CData,
        output: int,
        flush_at: int,
        since: int,
        until: int,
        limit: int,
        interval: int,
        include_self: int,
        /,
    ) -> int: ...
    def rs_output_containers(self, e: CData, output: int, bits: Bytes, length: int, /) -> int: ...
    def rs_output_clear(self, e: CData, output: int, /) -> None: ...
    def rs_output_next(self, e: CData, after: int, /) -> int: ...
    def rs_output_batch(self, e: CData, output: int, batch: CData, /) -> None: ...
    def rs_output_reset(self, e: CData, output: int, /) -> None: ...
    def rs_output_left(self, e: CData, output: int, /) -> int: ...
    def rs_life_set(self, e: CData, life: CData, /) -> int: ...
    def rs_process_set(self, e: CData, told: CData, /) -> int: ...
    def rs_process_get(self, e: CData, pid: int, out: CData, /) -> int: ...
    def rs_process_adopt(self, e: CData, pid: int, parent: int, /) -> None: ...
    def rs_process_move(self, e: CData, pid: int, container: int, /) -> None: ...
    def rs_process_end(self, e: CData, pid: int, time: int, /) -> None: ...
    def rs_process_exit(self, e: CData, stop: CData, /) -> None: ...
    def rs_process_lineage(self, e: CData, pid: int, out: CData, /) -> int: ...
    def rs_process_pids(self, e: CData, out: CData, room: int, /) -> int: ...
    def rs_process_foreign(self, e: CData, /) -> int: ...
    def rs_boot_offset(self, e: CData, /) -> int: ...
    def rs_source_follow(self, e: CData, source: int, follow: CData, /) -> int: ...
    def rs_cgroup_set(self, e: CData, cgroup: int, container: int, /) -> int: ...
    def rs_cgroups_clear(self, e: CData, /) -> None: ...
    def rs_container_processes(self, e: CData, container: int, /) -> int: ...
    def rs_replay(self, e: CData, output: int, since: int, until: int, place: CData, /) -> int: ...
    def rs_history_since(self, e: CData, /) -> int: ...
    def rs_container_set(
        self,
        e: CData,
        container: int,
        flags: int,
        head: Bytes,
        head_length: int,
        tail: Bytes,
        tail_length: int,
        /,
    ) -> int: ...
    def rs_release(self, e: CData, container: int, /) -> int: ...
    def rs_send_message(
        self,
        fd: int,
        message: Bytes,
        length: int,
        stream: int,
        frame: int,
        rest: CData,
        room: int,
        /,
    ) -> int: ...
    def rs_timer_open(self, /) -> int: ...
    def rs_timer_every(self, fd: int, ns: int, same: int, /) -> int: ...
    def rs_publish_time(self, e: CData, micros: int, /) -> None: ...
    def rs_drain(self, e: CData, budget: int, stop: CData, /) -> int: ...
    def rs_again(self, e: CData, /) -> None: ...
    def rs_emit(
        self,
        e: CData,
        outputs: CData,
        n_outputs: int,
        time: int,
        cpu: int,
        pid: int,
        tid: int,
        container: int,
        body: Bytes,
        length: int,
        /,
    ) -> int: ...
    def rs_plan_run(
        self,
        ops: CData,
        n_ops: int,
        pool: Bytes,
        pool_length: int,
        raw: Bytes,
        raw_length: int,
        side: Bytes,
        side_length: int,
        out: CData,
        room: int,
        /,
    ) -> int: ...
    def rs_tests_run(
        self,
        tests: CData,
        n_tests: int,
        pool: Bytes,
        pool_length: int,
        raw: Bytes,
        raw_length: int,
        side: Bytes,
        side_length: int,
        /,
    ) -> int: ...
    def rs_glob(self, pattern: Bytes, pattern_length: int, text: Bytes, length: int, /) -> int: ...
    def rs_read_memory(self, pid: int, address: int, out: CData, length: int, /) -> int: ...
    def rs_count_events(self, response: Bytes, length: int, /) -> int: ...

ffi: _FFI
lib: _Lib
