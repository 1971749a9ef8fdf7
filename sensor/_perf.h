/* The engine's interface. cffi reads this file as it stands, so it holds declarations only. */

/* What a plan does, one operation after the other. `tag` is the protobuf tag, already a varint. */
enum {
    RS_OP_CONST,   /* copy `length` bytes of the pool from `text` */
    RS_OP_UINT,    /* varint of the unsigned integer at `offset` */
    RS_OP_INT,     /* varint of the sign-extended integer at `offset` (ten bytes if negative) */
    RS_OP_ZIGZAG,  /* zigzag varint of the integer at `offset` */
    RS_OP_BOOL,    /* varint 1 if the integer at `offset` is not zero */
    RS_OP_RAW,     /* `length` bytes at `offset` as they are: fixed32, fixed64 */
    RS_OP_CHARS,   /* string: up to `length` bytes at `offset`, to the first NUL */
    RS_OP_STRING,  /* string behind the __data_loc word at `offset`, to the first NUL */
    RS_OP_BYTES,   /* bytes behind the __data_loc word at `offset` */
    RS_OP_BLOCK,   /* bytes: `length` bytes at `offset` */
    RS_OP_BEGIN,   /* open a nested message */
    RS_OP_END,     /* close it and write its length before it */
    RS_OP_UNLESS,  /* go to `jump` unless the integer at `offset` equals `value` */
    RS_OP_TEXTS,   /* repeated string: each text in what came with the record, to its NUL */
    RS_OP_FETCHED, /* go to `jump` if no more than `offset` bytes of the caller's memory came with the record */
};

enum { /* flags of an operation */
    RS_KEEP_ZERO = 1, /* write the field even if it is zero: a member of a oneof, a map's value */
    RS_SWAP = 2,      /* the integer is in network byte order */
    RS_SIDE = 4,      /* `offset` counts in the memory that came with the record */
    RS_ABSTRACT = 16, /* RS_OP_CHARS: a leading NUL is written as '@' (unix(7), abstract sockets) */
    RS_SIGNED = 32,   /* sign-extend the integer */
    RS_FAULTY = 64,   /* RS_OP_STRING: "(fault)" is no text but the kernel's word for none */
    RS_DATA_LOC = 128 /* tests: the text lies behind a __data_loc word */
};

typedef struct {
    uint8_t op, size, flags, tag_length;
    uint8_t tag[4];
    uint32_t offset, length, text, jump;
    uint64_t value;
} rs_op;

/* One comparison of a compiled predicate; `yes` and `no` are indexes, or RS_ACCEPT, RS_REJECT. */
enum { RS_ACCEPT = -1, RS_REJECT = -2 };
enum { RS_EQ, RS_NE, RS_LT, RS_LE, RS_GT, RS_GE, RS_GLOB, RS_BITS };
enum { RS_TEST_INT, RS_TEST_TEXT };

typedef struct {
    uint8_t kind, cmp, flags;
    uint16_t size;
    uint32_t offset, length, text;
    uint64_t value;
    int32_t yes, no;
} rs_test;

/* Who gets a source's records: an output, for one key or (any = 1) for all, if its tests accept. */
typedef struct {
    uint32_t output;
    int32_t first_test; /* index of the first test, or RS_ACCEPT */
    int64_t key;
    uint32_t any;
    int32_t next; /* the engine's own */
} rs_entry;

enum { /* flags of a source */
    RS_LIFECYCLE = 1, /* its records go to Python */
    RS_FETCHED = 2,   /* its samples come through the courier, with memory of the caller behind them */
    RS_LINEAGE = 4,   /* its events carry the lineage */
    RS_CALLER = 8,    /* its samples bring the caller's ABI and cgroup, see rs_perf */
    RS_NATIVE = 16,   /* records of processes flagged RS_FOREIGN are left out */
    RS_ALIEN = 32,    /* records of all others are */
    RS_BEHIND = 64    /* what a sample brings behind the record is taken for memory that came with it */
};

enum { /* flags of a process */
    RS_FOREIGN = 1, /* runs with another system call table than the kernel's own (32-bit) */
    RS_ALIVE = 2,
    RS_KERNEL_THREAD = 4,
    RS_NAMELESS = 8 /* when it began is not known, so it has no id */
};

/* Which of a source's perf events writes its record of a call first, while one takes another's place. */
enum { RS_LATEST_FIRST, RS_LATEST_LAST };

enum { /* flags of a container */
    RS_HOLD = 1 /* its processes' events wait for rs_release() */
};

/* Why rs_drain() returned. */
enum {
    RS_DONE,    /* all that is older than `time`, just before the drain began, is handled */
    RS_RECORD,  /* a lifecycle record: the stop's fields say what */
    RS_FULL,    /* output `index` has reached its flush size */
    RS_LOST,    /* ring `index` lost `count` records between `since` and `time` */
    RS_UNKNOWN, /* a record of process `pid`, which has no context yet; set one and go on */
    RS_CORRUPT, /* ring `index` held something that is no record; `count` bytes were skipped */
    RS_YIELD,   /* the budget is used up; go on when others had their turn */
    RS_CGROUP   /* process `pid` begins a program in `cgroup`; move it if need be, and go on */
};

typedef struct {
    int32_t index, cpu;
    uint32_t source;
    int32_t pid, tid;
    uint32_t raw_length, memory_length;
    uint64_t time, since, count, cgroup;
    uint64_t abi, argc, address, complete; /* of the memory that came with it, see rs_fetch */
    const uint8_t *raw, *memory;
    int32_t code;              /* of an exit: what wait(2) tells, negative if that is not known */
    uint32_t facts, container; /* of an exit: the source of its event, where the process was */
} rs_stop;

typedef struct {
    uint64_t records;   /* samples read from the rings */
    uint64_t events;    /* events encoded, each once */
    uint64_t delivered; /* events handed to outputs, once for each */
    uint64_t unwanted;  /* samples that no output wanted */
    uint64_t self;      /* samples of the sensor's own process, left out */
    uint64_t stale;     /* samples of no known perf event, or of one being replaced whose call the other told */
    uint64_t lost;      /* samples that the kernel could not write */
    uint64_t corrupt;   /* bytes skipped because they were no record */
    uint64_t held;      /* samples that waited for their container's names */
    uint64_t hold_full; /* samples that could not wait, the buffer being full */
} rs_counters;

typedef struct {
    const uint8_t *data;
    size_t length;
    uint64_t events, first_time, last_time;
} rs_batch;

/* The tags of the fields that every event has, as varints; Python takes them from the schema. */
typedef struct {
    uint8_t length, bytes[7];
} rs_tag;

typedef struct {
    rs_tag events, event, id, sequence, time, tid, cpu, publish; /* events, event and id: one byte each */
    rs_tag process_id, process_pid, lineage, lineage_pid, lineage_command;
} rs_tags;

enum { RS_BOOT = 12, RS_COMM = 64 }; /* bytes of a boot's name, of a thread's (those of workers are long) */

/* How processes are told apart and remembered. */
typedef struct {
    const char *boot;         /* what all their ids begin with */
    const char *proc;         /* where procfs is */
    size_t history;           /* bytes of their events that are kept */
    uint32_t threads_counted; /* the kernel does not say whether a thread was its process's last */
    uint32_t cgroups_told;
    int32_t untold;           /* whose events are kept for nobody */
} rs_life;

/* Whether Python wants to hear of a program that begins in a cgroup where its process should not be. */
enum { RS_CGROUPS_NONE, RS_CGROUPS_HOST, RS_CGROUPS_ALL }; /* never, if it is in no container, always */

typedef struct {
    int32_t pid, parent;                 /* parent: 0 if it has none */
    uint32_t flags, container, threads, comm_length;
    uint64_t start;                      /* clock ticks since boot */
    uint64_t counted_at;                 /* thread records before this are in `threads` already */
    uint8_t comm[RS_COMM];
} rs_process;

/* What lifecycle records say, and where in them; all else is Python's. */
enum {
    RS_ON_NOTHING,
    RS_ON_FORK,      /* child's pid, clone flags, comm */
    RS_ON_RENAME,    /* pid (0: the caller's), comm */
    RS_ON_EXEC,      /* file name; the arguments have come from the courier */
    RS_ON_EXEC_TOLD, /* file name, address and length of the arguments, the arguments */
    RS_ON_EXIT,      /* whether it was the last thread (0: not said); Python finds out how it ended */
    RS_ON_EXIT_TOLD  /* what wait(2) tells */
};

typedef struct {
    uint32_t what;
    uint32_t facts; /* the source that gets an rs_facts for each */
    uint32_t at[4]; /* offsets */
} rs_follow;

/* What a process event says; the arguments of a program come with it, a NUL behind each. */
typedef struct {
    int32_t code;                                  /* what wait(2) tells, and its parts */
    uint32_t status, signal, core, known;
    int32_t child;
    uint32_t child_id, filename;                   /* __data_loc words */
} rs_facts;

/* How far what is remembered was told. */
typedef struct {
    uint64_t at, index;
} rs_place;

typedef struct rs_engine rs_engine;

rs_engine *rs_new(int32_t self_pid, const rs_tags *tags, uint64_t first_sequence, const uint8_t *id_prefix,
                  size_t id_length, const uint8_t *sensor_field, size_t sensor_length);
void rs_free(rs_engine *e);
uint64_t rs_clock(void);
const rs_counters *rs_count(const rs_engine *e);
uint64_t rs_sequence(const rs_engine *e);

enum {
    RS_PERF_RING = -1,
    RS_PERF_OUTPUT = -2,  /* what bpf programs hand to it */
    RS_PERF_SWITCHES = -3 /* nothing: it counts how often tasks of different cgroups follow each other on the CPU */
};

/* What a perf event samples, and when it wakes its reader. */
typedef struct {
    int64_t tracepoint;      /* its id; RS_PERF_RING: nothing, only a ring to write to; or one of the others */
    uint32_t watermark;      /* wake the reader when this many bytes are waiting; 0: for each sample */
    uint32_t stack_size;     /* bytes of the user's stack, a multiple of 8, for RS_FETCH_ARGUMENTS */
    uint32_t abi;            /* the caller's ABI: that of its registers, for RS_CALLER */
    uint32_t cgroup;         /* the id of the cgroup too, for RS_FETCH_ARGUMENTS and RS_CALLER */
    uint32_t first_argument; /* the ABI, and the register of a 32-bit call's first argument, for RS_BEHIND */
} rs_perf;

int rs_perf_open(const rs_perf *perf, int cpu, int cgroup_fd);
int rs_perf_id(int fd, uint64_t *id);
int rs_perf_filter(int fd, const char *filter);
int rs_perf_redirect(int fd, int ring_fd);
int rs_perf_enable(int fd, int on);
int64_t rs_perf_lost(int fd);
int64_t rs_perf_count(int fd);
int rs_perf_program(int fd, int program);

int rs_bpf_map(uint32_t type, uint32_t key_size, uint32_t value_size, uint32_t entries);
int rs_bpf_map_set(int map, const uint8_t *key, const uint8_t *value);
int rs_bpf_program(const char *name, const uint8_t *code, uint32_t count, uint8_t *log, uint32_t log_size);
int64_t rs_bpf_missed(int program);
int rs_bpf_map_next(int map, const uint8_t *key, uint8_t *next);
int rs_bpf_map_get(int map, const uint8_t *key, uint8_t *value);

int rs_uring_request(const uint8_t *request);

/* What the courier reads of a caller's memory, the moment a perf event's record is there. */
enum {
    RS_FETCH_ARGUMENTS, /* of a program that has just begun: the argument strings, NUL after each */
    RS_FETCH_TEXT,      /* text at the pointer at `offset`, to its NUL */
    RS_FETCH_BLOCK,     /* `length` bytes at the pointer at `offset`; as many as the integer at `count`
                           says if that is less (`count` 0: no such integer) */
    RS_FETCH_NAME       /* the same behind a struct msghdr: its msg_name, msg_namelen bytes */
};

enum { /* flags of what is read */
    RS_FETCH_32 = 1,    /* pointers have 4 bytes; a longer one is of no 32-bit caller, and not followed */
    RS_FETCH_WITHIN = 2 /* `offset` and `count` are places in the front, of 4 bytes each */
};

typedef struct {
    uint32_t offset, size;
    uint64_t value;
} rs_when;

/* `front` bytes, if not 0, at the pointer at `front_offset` come before the rest; without them there is none. */
typedef struct {
    uint32_t kind, offset, count, length;
    uint32_t flags, front, front_offset;
    uint32_t n_when;
    rs_when when[2]; /* only of records in which these integers have these values */
} rs_fetch;

int rs_courier_start(rs_engine *e, int priority);
int rs_fetch_set(rs_engine *e, uint64_t id, const rs_fetch *fetches, uint32_t n_fetches);
int rs_ring_prompt(rs_engine *e, int fd, int cpu, size_t pages);
int64_t rs_fetch_arguments(int32_t pid, uint64_t abi, uint64_t sp, const uint8_t *stack, size_t stack_length,
                           uint8_t *out, size_t room, uint64_t *argc, uint64_t *address, uint64_t *complete);

int rs_ring_open(rs_engine *e, int fd, int cpu, size_t pages);
int rs_ring_attach(rs_engine *e, void *memory, size_t pages, size_t page_size, int cpu);
void rs_ring_close(rs_engine *e, int ring);
uint64_t rs_ring_lost(const rs_engine *e, int ring);
size_t rs_ring_waiting(const rs_engine *e, int ring);

int rs_source_set(rs_engine *e, uint32_t source, uint32_t flags, const rs_op *ops, uint32_t n_ops,
                  const uint8_t *pool, size_t pool_length, uint32_t key_offset, uint32_t key_size);
int rs_source_route(rs_engine *e, uint32_t source, const rs_entry *entries, uint32_t n_entries,
                    const rs_test *tests, uint32_t n_tests, const uint8_t *pool, size_t pool_length);
int rs_source_view(rs_engine *e, uint32_t source, uint32_t offset, uint32_t length, uint32_t count_offset);
uint64_t rs_source_elsewhere(const rs_engine *e, uint32_t source);
int rs_event_set(rs_engine *e, uint64_t id, uint32_t source, uint32_t order, uint64_t from, uint64_t until);
void rs_event_end(rs_engine *e, uint64_t id, uint64_t time);
void rs_event_clear(rs_engine *e, uint64_t id);

int rs_output_set(rs_engine *e, uint32_t output, size_t flush_at, uint64_t since, uint64_t until, uint64_t limit,
                  uint64_t interval, uint32_t include_self);
int rs_output_containers(rs_engine *e, uint32_t output, const uint8_t *bits, size_t length);
void rs_output_clear(rs_engine *e, uint32_t output);
int64_t rs_output_next(const rs_engine *e, int64_t after);
void rs_output_batch(const rs_engine *e, uint32_t output, rs_batch *batch);
void rs_output_reset(rs_engine *e, uint32_t output);
uint64_t rs_output_left(const rs_engine *e, uint32_t output);

int rs_life_set(rs_engine *e, const rs_life *life);
int rs_process_set(rs_engine *e, const rs_process *told);
int rs_process_get(rs_engine *e, int32_t pid, rs_process *out);
void rs_process_adopt(rs_engine *e, int32_t pid, int32_t parent);
void rs_process_move(rs_engine *e, int32_t pid, uint32_t container);
void rs_process_end(rs_engine *e, int32_t pid, uint64_t time);
void rs_process_exit(rs_engine *e, const rs_stop *stop);
size_t rs_process_lineage(rs_engine *e, int32_t pid, const uint8_t **out);
size_t rs_process_pids(const rs_engine *e, int32_t *out, size_t room);
size_t rs_process_foreign(const rs_engine *e);
int64_t rs_boot_offset(const rs_engine *e);
int rs_source_follow(rs_engine *e, uint32_t source, const rs_follow *follow);
int rs_cgroup_set(rs_engine *e, uint64_t cgroup, uint32_t container);
void rs_cgroups_clear(rs_engine *e);
uint32_t rs_container_processes(const rs_engine *e, uint32_t container);
int rs_replay(rs_engine *e, uint32_t output, uint64_t since, uint64_t until, rs_place *from);
uint64_t rs_history_since(const rs_engine *e);
int rs_container_set(rs_engine *e, uint32_t container, uint32_t flags, const uint8_t *head, size_t head_length,
                     const uint8_t *tail, size_t tail_length);
uint64_t rs_release(rs_engine *e, uint32_t container);

int64_t rs_send_message(int fd, const uint8_t *message, size_t length, uint32_t stream, uint32_t frame, uint8_t *rest,
                        size_t room);
int rs_timer_open(void);
int rs_timer_every(int fd, uint64_t ns, int same);

void rs_publish_time(rs_engine *e, uint64_t micros);
int rs_drain(rs_engine *e, uint64_t budget, rs_stop *stop);
void rs_again(rs_engine *e);
uint64_t rs_emit(rs_engine *e, const uint32_t *outputs, uint32_t n_outputs, uint64_t time, int cpu, int32_t pid,
                 int32_t tid, uint32_t container, const uint8_t *body, size_t length);

int64_t rs_plan_run(const rs_op *ops, uint32_t n_ops, const uint8_t *pool, size_t pool_length, const uint8_t *raw,
                    size_t raw_length, const uint8_t *side, size_t side_length, uint8_t *out, size_t room);
int rs_tests_run(const rs_test *tests, uint32_t n_tests, const uint8_t *pool, size_t pool_length, const uint8_t *raw,
                 size_t raw_length, const uint8_t *side, size_t side_length);
int rs_glob(const uint8_t *pattern, size_t pattern_length, const uint8_t *text, size_t length);
int64_t rs_read_memory(int32_t pid, uint64_t address, uint8_t *out, size_t length);
int64_t rs_count_events(const uint8_t *response, size_t length);
