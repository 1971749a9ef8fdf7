/*
 * Rings, merge, plans: from the kernel's perf ring buffers to protobuf bytes.
 *
 * This file moves bytes and decides nothing. What an event looks like on the wire (plans, tags), who
 * wants it (routes, tests) and who did it (processes) is set by Python; here records are taken from
 * the rings in the order of time, looked up, encoded once and appended to each output that wants them.
 * Errors are negative errno values. Nothing here is thread safe; nothing calls back into Python.
 *
 * Formats: perf_event_open(2) for the records, include/trace/trace_events.h for __data_loc,
 * protobuf.dev/programming-guides/encoding for the output.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "_perf.h"

enum {
    MAX_RECORD = 65536,       /* perf_event_header.size is 16 bits wide */
    BODY_ROOM = 3 << 20,      /* a FULL container event holds two documents of up to 1 MiB */
    MAX_BODY = 48 << 20,      /* a command line of two million empty arguments */
    HEAD_ROOM = 64,           /* two tags, an id of 8 + 1 + 8 + 1 + 16 bytes, a pid; put_fast() reads no more */
    ROOM_BEHIND = 64,         /* of an event: SLACK, and what put_varint() and put_tag() write too much */
    FETCH_ROOM = 49152,       /* what the courier reads for one record at most; the rest is 32 KiB at most */
    PATH_ROOM = 4096,         /* PATH_MAX, with its NUL */
    UNIX_PATH = 110,          /* struct sockaddr_un */
    MAX_DEPTH = 8,
    MAX_OPS = 1024,
    KEYS = 1024,              /* keys (system call numbers) below this are looked up, others searched */
    HOLD_ROOM = 4 << 20,
    MAX_ARGUMENTS = 1 << 20,
    IN_FLIGHT = 20000,        /* ns: a record stamped this long ago is surely in its ring by now */
    TWIN_LATEST = 50000000,   /* ns: a call interrupted between its records goes on by then */
    NO_ENTRY = -1,
    ID_ROOM = 64,
    SENSOR_ROOM = 64,
    PUBLISH_ROOM = 16,
};

#include "_bytes.h"
#include "_plan.c"

/* ---- the engine's parts ------------------------------------------------------------------------- */

struct process {
    uint32_t flags, container;
    uint32_t head; /* bytes of it */
    int32_t pid;
    uint8_t bytes[HEAD_ROOM]; /* Event.process_id and process_pid, encoded */
    /* what is behind is not needed for most events */
    struct process *parent, *next_dead;
    uint64_t start, counted_at, dead_at;
    uint64_t line_at; /* `changes`, as the line was made */
    uint8_t *line;
    uint32_t line_length, line_room;
    uint32_t refs; /* the table's, its children's, the list of the dead's */
    uint32_t threads;
    int32_t id; /* bytes of the id in the head */
    uint8_t comm_length, comm[RS_COMM];
};

/* What all its processes' events say of it, before and behind their own; the sensor's field is behind the first. */
struct container {
    uint32_t flags, head, tail, processes;
    uint64_t generation; /* differs for each container that has its number */
    uint8_t bytes[];
};

struct event { /* a perf event's id: which source it feeds, from when until when alone, and when it ended */
    uint32_t source, order;
    uint64_t from, until, end, generation;
};

struct twin { /* a ring's last record of a source whose perf event is being replaced; see is_twin() */
    enum { NO_TWIN, FIRST, SECOND } what;
    uint32_t source;
    int32_t tid;
    uint64_t id, generation, hash, time;
};

struct source {
    bool used;
    uint64_t elsewhere; /* records of containers that no output wants */
    uint32_t flags, key_offset, key_size;
    rs_op *ops;
    uint32_t n_ops;
    size_t extent; /* records of this length have all that OP_PLAIN reads */
    uint32_t view, view_length, view_count; /* see rs_source_view() */
    rs_follow follow;
    uint8_t *pool;
    size_t pool_length;
    rs_entry *entries;
    uint32_t n_entries;
    rs_test *tests;
    uint32_t n_tests;
    uint8_t *test_pool;
    size_t test_pool_length;
    int32_t any;          /* first entry for every key */
    int32_t others;       /* first entry for a key that by_key has no place for */
    int32_t *by_key;      /* first entry for each key below KEYS; NULL if there are none */
};

struct output {
    bool used, ready, include_self;
    bool plain; /* takes everything, but for the sensor's own */
    uint8_t *data;
    size_t length, room, flush_at;
    uint64_t events, first_time, last_time;
    uint64_t since, until, left, interval, next_time;
    uint8_t *containers;
    size_t container_bytes;
};

struct ring {
    bool used, mapped, prompt;
    int cpu;
    struct perf_event_mmap_page *page;
    uint8_t *data;
    uint64_t size, at, published, head;
    size_t mapped_length;
    const uint8_t *record; /* the one at `at`, whole; NULL if this drain has no more */
    uint32_t record_size;
    uint64_t record_time, last_time, lost;
    uint64_t skipped; /* bytes that were no record, not told yet */
    uint8_t *wrap;
    struct twin twin;
};

struct held { /* a record that waits for its container: this, then `length` bytes, padded to 8 */
    uint32_t total, length, side_length, container, source; /* source UINT32_MAX: outputs, then the body */
    uint64_t time;
    int32_t cpu, pid, tid;
    uint32_t n_outputs;
};

struct fetched { /* comes behind a sample, then `length` bytes, padded to 8 */
    uint64_t abi, argc, address, complete, cgroup, length;
};

struct courier;
static void courier_stop(rs_engine *e);
static void processes_free(rs_engine *e);

struct rs_engine {
    int32_t self_pid;
    rs_tags tags;
    uint64_t sequence;
    /* pieces that are the same for many events, ready to copy */
    uint8_t id[ID_ROOM + SLACK];             /* the id field; its last bytes are `sequence` in decimal */
    uint8_t sensor[SENSOR_ROOM + SLACK];     /* the sensor_id field and the tag of the sequence number */
    uint8_t publish[PUBLISH_ROOM + SLACK];   /* the publish time field and the tag of the event */
    size_t id_length, digits, sensor_length, publish_length;
    struct container *host; /* of processes that are in none */
    struct map events, processes;
    uint64_t generations; /* of perf events, and of containers */
    /* processes */
    struct map cgroups; /* by id, the number + 1 of the container whose processes belong there */
    char boot[RS_BOOT];
    char *proc;
    uint32_t threads_counted, cgroups_told;
    int32_t untold;
    bool asked; /* the record at hand was a question to Python, which has answered */
    uint64_t tick, changes; /* changes: of names and parents of those who may be ancestors */
    int64_t boot_offset;
    size_t foreign;
    struct process *dead, *dead_last, **chain;
    size_t chain_room;
    uint8_t *line; /* a command line, read from its process */
    struct { /* what is told just now */
        rs_facts facts;
        uint8_t facts_text[PATH_ROOM + SLACK];
    };
    /* their events of the last while, see remember() */
    uint8_t *past;
    size_t past_room, past_start, past_end, past_wrap, past_count;
    bool past_wrapped;
    uint64_t past_since;
    struct container **containers;
    size_t n_containers;
    uint64_t cached_id;
    struct event *cached_event;
    int32_t cached_pid;
    struct process *cached_process;
    struct source *sources;
    size_t n_sources;
    struct output *outputs;
    size_t n_outputs;
    struct ring *rings;
    size_t n_rings;
    uint32_t *wanting; /* scratch: outputs that want the record at hand */
    size_t wanting_room;
    uint32_t *ready;   /* outputs to flush */
    size_t n_ready, ready_room;
    bool draining, publish_fixed;
    struct courier *courier;
    int stepping; /* the ring whose record Python was given, or -1 */
    uint64_t cut;
    uint8_t *body, *hold;
    size_t body_room, hold_length;
    rs_counters counters;
};

static struct container *container_new(const rs_engine *e, uint32_t flags, const uint8_t *head, size_t head_length,
                                       const uint8_t *tail, size_t tail_length)
{
    size_t before = head_length + e->sensor_length;
    struct container *c = malloc(sizeof *c + before + tail_length + SLACK);
    if (!c)
        return NULL;
    *c = (struct container){.flags = flags, .head = (uint32_t)before, .tail = (uint32_t)tail_length};
    put(put(put(c->bytes, head, head_length), e->sensor, e->sensor_length), tail, tail_length);
    return c;
}

static void publish_at(rs_engine *e, uint64_t micros);

rs_engine *rs_new(int32_t self_pid, const rs_tags *tags, uint64_t first_sequence, const uint8_t *id_prefix,
                  size_t id_length, const uint8_t *sensor_field, size_t sensor_length)
{
    if (id_length > 32 || sensor_length + tags->sequence.length > SENSOR_ROOM || tags->id.length != 1 ||
        tags->event.length != 1 || tags->events.length != 1)
        return NULL;
    rs_engine *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->stepping = -1;
    e->changes = 1; /* no line was made then */
    e->tick = 1000000000u / (uint64_t)sysconf(_SC_CLK_TCK);
    e->self_pid = self_pid;
    e->tags = *tags;
    e->sequence = first_sequence;
    char digits[24];
    e->digits = (size_t)snprintf(digits, sizeof digits, "%" PRIu64, first_sequence);
    uint8_t *out = e->id;
    *out++ = tags->id.bytes[0];
    *out++ = (uint8_t)(id_length + e->digits);
    e->id_length = (size_t)(put(put(out, id_prefix, id_length), (uint8_t *)digits, e->digits) - e->id);
    out = put(e->sensor, sensor_field, sensor_length);
    e->sensor_length = (size_t)(put(out, tags->sequence.bytes, tags->sequence.length) - e->sensor);
    publish_at(e, 0);
    e->body_room = BODY_ROOM;
    e->body = malloc(e->body_room + SLACK);
    e->host = container_new(e, 0, NULL, 0, NULL, 0);
    if (!e->body || !e->host) {
        rs_free(e);
        return NULL;
    }
    return e;
}

static void source_free(struct source *s)
{
    free(s->ops);
    free(s->pool);
    free(s->entries);
    free(s->tests);
    free(s->test_pool);
    free(s->by_key);
    memset(s, 0, sizeof *s);
}

void rs_free(rs_engine *e)
{
    if (!e)
        return;
    for (size_t i = 0; i < e->n_rings; i++)
        rs_ring_close(e, (int)i);
    courier_stop(e);
    for (size_t i = 0; i < e->n_sources; i++)
        source_free(&e->sources[i]);
    for (size_t i = 0; i < e->n_outputs; i++)
        rs_output_clear(e, (uint32_t)i);
    map_free(&e->events, true);
    processes_free(e);
    for (size_t i = 0; i < e->n_containers; i++)
        free(e->containers[i]);
    free(e->containers);
    free(e->host);
    free(e->sources);
    free(e->outputs);
    free(e->rings);
    free(e->wanting);
    free(e->ready);
    free(e->body);
    free(e->hold);
    free(e->past);
    free(e);
}

const rs_counters *rs_count(const rs_engine *e)
{
    return &e->counters;
}

uint64_t rs_sequence(const rs_engine *e)
{
    return e->sequence;
}

static void next_sequence(rs_engine *e)
{
    size_t first = e->id_length - e->digits, i = e->id_length - 1;
    e->sequence++;
    while (i >= first && e->id[i] == '9')
        e->id[i--] = '0';
    if (i >= first) {
        e->id[i]++;
    } else { /* all nines: one digit more */
        e->id[first] = '1';
        e->id[e->id_length++] = '0';
        e->id[1]++;
        e->digits++;
    }
}

static void publish_at(rs_engine *e, uint64_t micros)
{
    uint8_t *out = put_varint(put_tag(e->publish, &e->tags.publish), micros);
    *out++ = e->tags.event.bytes[0];
    e->publish_length = (size_t)(out - e->publish);
}

/* Stamp events with this wall-clock time, in microseconds since the epoch, and not with when they were published. */
void rs_publish_time(rs_engine *e, uint64_t micros)
{
    publish_at(e, micros);
    e->publish_fixed = true;
}

static void publish_now(rs_engine *e)
{
    struct timespec t;
    if (!e->publish_fixed && !clock_gettime(CLOCK_REALTIME, &t))
        publish_at(e, (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000);
}

/* ---- containers and processes -------------------------------------------------------------------- */

/* What the events of a container's processes carry: the fields before and behind an event's own. */
int rs_container_set(rs_engine *e, uint32_t container, uint32_t flags, const uint8_t *head, size_t head_length,
                     const uint8_t *tail, size_t tail_length)
{
    if (!container || container >= 1u << 24 || head_length + tail_length > MAX_RECORD)
        return -EINVAL;
    if (!grow((void **)&e->containers, &e->n_containers, container + 1, sizeof *e->containers))
        return -ENOMEM;
    struct container *c = container_new(e, flags, head, head_length, tail, tail_length);
    if (!c)
        return -ENOMEM;
    const struct container *before = e->containers[container];
    bool same = before && before->head == c->head && !memcmp(before->bytes, c->bytes, c->head);
    c->processes = before ? before->processes : 0;
    c->generation = same ? before->generation : ++e->generations;
    free(e->containers[container]);
    e->containers[container] = c;
    return 0;
}

static inline const struct container *container_of(const rs_engine *e, uint32_t number)
{
    return number && number < e->n_containers && e->containers[number] ? e->containers[number] : e->host;
}

static inline struct process *process_of(rs_engine *e, int32_t pid)
{
    if (e->cached_process && e->cached_pid == pid)
        return e->cached_process;
    struct process *p = map_get(&e->processes, (uint64_t)(uint32_t)pid);
    e->cached_pid = pid;
    e->cached_process = p;
    return p;
}

#include "_processes.c"
#include "_outputs.c"

#include "_sources.c"
#include "_rings.c"
#include "_bpf.c"
#include "_uring.c"
#include "_courier.c"
#include "_loop.c"

/* ---- the drain ------------------------------------------------------------------------------------ */

struct record { /* a sample, taken apart */
    const uint8_t *raw, *side;
    size_t raw_length, side_length;
    uint64_t time;
    int cpu;
    int32_t pid, tid;
};

static inline bool accepts(const struct source *s, const rs_entry *entry, const struct record *rec)
{
    return entry->first_test < 0 ||
           rs_tests_run(s->tests + entry->first_test, s->n_tests - (uint32_t)entry->first_test, s->test_pool,
                        s->test_pool_length, rec->raw, rec->raw_length, rec->side, rec->side_length);
}

static inline size_t collect(rs_engine *e, const struct source *s, int32_t at, int64_t key, size_t n,
                             const struct record *rec, bool self, uint32_t container)
{
    size_t before = n;
    for (; at != NO_ENTRY; at = s->entries[at].next) {
        const rs_entry *entry = &s->entries[at];
        if (entry->key != key && !entry->any)
            continue; /* `others` has all keys that by_key has no place for */
        if (!wants(&e->outputs[entry->output], rec->time, self, container))
            continue;
        size_t k = 0;
        while (k < before && e->wanting[k] != entry->output)
            k++;
        if (k < before || (n > before && e->wanting[n - 1] == entry->output))
            continue; /* two filters of one subscription; entries are in the order of outputs */
        if (!accepts(s, entry, rec))
            continue;
        e->wanting[n++] = entry->output;
    }
    return n;
}

/* Make an event's body, in `body`; its length, or a negative errno. */
static int64_t plan_body(rs_engine *e, const struct source *s, const struct record *rec)
{
    for (size_t room = BODY_ROOM;; room *= 2) {
        if (room != e->body_room) { /* more than all but the longest command lines need is not kept */
            uint8_t *body = realloc(e->body, room + SLACK);
            if (!body)
                return -ENOMEM;
            e->body = body;
            e->body_room = room;
        }
        int64_t length = plan_run(s->ops, s->n_ops, s->pool, s->pool_length, rec->raw, rec->raw_length, rec->side,
                                  rec->side_length, e->body, room, rec->raw_length >= s->extent);
        if (length != -ENOSPC || room >= MAX_BODY)
            return length;
    }
}

/* Have a record go to whoever wants it; false if nobody does. */
static bool dispatch(rs_engine *e, const struct source *s, const struct record *rec, struct process *p)
{
    bool self = rec->pid == e->self_pid;
    uint32_t container = p ? p->container : 0;
    size_t n = collect(e, s, s->any, 0, 0, rec, self, container);
    if (s->key_size && s->key_offset <= rec->raw_length && s->key_size <= rec->raw_length - s->key_offset &&
        (s->by_key || s->others != NO_ENTRY)) {
        int64_t key = (int64_t)sign_extend(load(rec->raw + s->key_offset, s->key_size), s->key_size);
        int32_t list = s->by_key && key >= 0 && key < KEYS ? s->by_key[key] : s->others;
        n = collect(e, s, list, key, n, rec, self, container);
    }
    if (!n)
        return false;
    int64_t length = plan_body(e, s, rec);
    if (length < 0)
        e->counters.corrupt += rec->raw_length;
    else
        deliver(e, e->wanting, n, rec->time, rec->cpu, rec->tid, p, container_of(e, container), s->flags & RS_LINEAGE,
                e->body, (size_t)length);
    return true;
}

/* Whether all that want a source's records (of thousands, the first) want certain containers, and not this one. */
static bool is_elsewhere(const rs_engine *e, const struct source *s, uint32_t container)
{
    for (uint32_t i = 0; i < s->n_entries && i < 64; i++)
        if (takes(&e->outputs[s->entries[i].output], container))
            return false;
    return true;
}

static void dispatch_counted(rs_engine *e, struct source *s, const struct record *rec, struct process *p)
{
    if (dispatch(e, s, rec, p))
        return;
    if (rec->pid == e->self_pid) {
        e->counters.self++;
    } else {
        e->counters.unwanted++;
        s->elsewhere += is_elsewhere(e, s, p ? p->container : 0);
    }
}

#include "_lifecycle.c"

/* Let go what waited for this container; the number of events. */
uint64_t rs_release(rs_engine *e, uint32_t container)
{
    size_t length = e->hold_length, kept = 0;
    uint64_t released = 0;
    for (size_t at = 0; at < length;) {
        struct held h;
        memcpy(&h, e->hold + at, sizeof h);
        if (h.container != container) {
            memmove(e->hold + kept, e->hold + at, h.total);
            kept += h.total;
        } else {
            const uint8_t *bytes = e->hold + at + sizeof h;
            struct process *p = process_of(e, h.pid);
            const struct container *c = container_of(e, p ? p->container : 0);
            released++;
            if (h.source == UINT32_MAX) {
                size_t n = choose(e, (const uint32_t *)(const void *)bytes, h.n_outputs, h.time,
                                  h.pid == e->self_pid, p ? p->container : 0);
                put(e->body, bytes + 4 * h.n_outputs, h.length);
                if (n)
                    deliver(e, e->wanting, n, h.time, h.cpu, h.tid, p, c, false, e->body, h.length);
            } else if (h.source < e->n_sources && e->sources[h.source].used) {
                struct record rec = {bytes, bytes + h.length, h.length, h.side_length, h.time, h.cpu, h.pid, h.tid};
                dispatch_counted(e, &e->sources[h.source], &rec, p);
            }
        }
        at += h.total;
    }
    e->hold_length = kept;
    return released;
}

/* What a sample says of the caller, behind the record: its registers' kind and its cgroup, see rs_perf. */
static void caller(struct fetched *f, const uint8_t *more, size_t left)
{
    if (STACK_POINTER && left >= 8) {
        size_t size = (f->abi = load(more, 8)) ? 16 : 8;
        more += size;
        left -= size < left ? size : left;
    }
    f->cgroup = left >= 8 ? load(more, 8) : 0;
}

/* Whether no other perf event of the source can have told of what happened then. */
static inline bool is_alone(const struct event *v, uint64_t time)
{
    return v->until == UINT64_MAX && time >= v->from && (!v->from || time - v->from >= TWIN_LATEST);
}

/*
 * Whether a call has been told of already, by another perf event. One that takes another's place is enabled before that
 * is disabled, and meanwhile each writes a record of whatever passes both filters, one right behind the other, of the
 * same source, thread and content: the first counts. Their times differ and so no moment parts them. But a caller may do
 * the same again and again, so that all records are alike; then it matters which of the two events comes first:
 *
 * - The latest, of tracepoints and probes (perf_trace_add() puts it at the head of its CPU's list). While the older
 *   writes records it always did, so one of its records right behind the latest's is of the same call.
 * - The oldest, of bpf programs (bpf_prog_array_copy() appends). The latest's record behind it is of the same call if
 *   both were there when either was written; only calls on both sides of the whole change are not.
 *
 * Perf events limited to cgroups are taken off their CPU's list and put there again whenever tasks of different cgroups
 * follow each other, but with all others of their kind, and in the order in which they were opened (perf_cgroup_switch(),
 * visit_groups_merge()): the latest still comes first.
 */
static bool is_twin(rs_engine *e, struct ring *r, uint64_t id, const struct event *v, const struct record *rec)
{
    /* behind what a program emits is padding, of whatever was there */
    size_t padding = v->order == RS_LATEST_LAST ? 8 : 0;
    size_t length = rec->raw_length > padding ? rec->raw_length - padding : 0;
    uint64_t hash = rec->raw_length;
    for (size_t i = 0; i + 8 <= length; i += 8)
        hash = (hash ^ load(rec->raw + i, 8)) * 0x9e3779b97f4a7c15u;
    for (size_t i = length & ~(size_t)7; i < length; i++)
        hash = (hash ^ rec->raw[i]) * 0x9e3779b97f4a7c15u;
    const struct twin *t = &r->twin;
    bool known = t->what && t->source == v->source, alike = known && t->tid == rec->tid && t->hash == hash;
    bool twin = alike && t->id != id;
    if (twin && v->order == RS_LATEST_FIRST) {
        twin = t->generation > v->generation;
    } else if (twin) {
        const struct event *older = map_get(&e->events, t->id);
        twin = t->generation < v->generation && older && (t->time >= older->until || rec->time < older->end);
    }
    r->twin = (struct twin){.what = twin ? SECOND : is_alone(v, rec->time) ? NO_TWIN : FIRST, .source = v->source,
                            .tid = rec->tid, .id = id, .generation = v->generation, .hash = hash, .time = rec->time};
    return twin;
}

/* One sample: 0 to go on, or why to stop. */
static int sample(rs_engine *e, struct ring *r, rs_stop *stop)
{
    const uint8_t *p = r->record;
    uint32_t size = r->record_size;
    uint64_t id = load(p + 8, 8);
    struct record rec = {.time = r->record_time, .cpu = r->cpu, .pid = (int32_t)load(p + 16, 4),
                         .tid = (int32_t)load(p + 20, 4), .raw = p + 36};

    if (!e->cached_event || e->cached_id != id) {
        e->cached_event = map_get(&e->events, id);
        e->cached_id = id;
    }
    const struct event *event = e->cached_event;
    if (!event) {
        e->counters.stale++;
        return RS_DONE;
    }
    struct source *s = &e->sources[event->source];
    rec.raw_length = size >= 40 ? load(p + 32, 4) : SIZE_MAX;
    if (rec.raw_length > size - 36) {
        e->counters.corrupt += size;
        return RS_DONE;
    }
    bool unsure = !is_alone(event, rec.time) || (r->twin.what && r->twin.source == event->source);
    struct twin before;
    if (unsure) {
        before = r->twin;
        if (is_twin(e, r, id, event, &rec)) {
            e->counters.stale++;
            return RS_DONE;
        }
    }
    const uint8_t *more = p + 36 + rec.raw_length;
    size_t left = size - 36 - rec.raw_length;
    struct fetched f = {0};
    if (s->flags & RS_FETCHED && left >= sizeof f) {
        memcpy(&f, more, sizeof f);
        rec.side = more + sizeof f;
        rec.side_length = f.length <= left - sizeof f ? f.length : left - sizeof f;
    } else if (s->flags & RS_BEHIND) {
        rec.side = more;
        rec.side_length = left;
    }
    if (s->view_length) {
        struct text view = part(rec.raw, rec.raw_length, s->view, s->view_length);
        if (s->view_count && s->view_count + 4u <= rec.raw_length) {
            int32_t count = (int32_t)load(rec.raw + s->view_count, 4);
            view.length = count < 0 ? 0 : (size_t)count < view.length ? (size_t)count : view.length;
        }
        rec.side = view.at;
        rec.side_length = view.length;
    }
    if (s->flags & RS_CALLER)
        caller(&f, more, left);
    if (s->flags & RS_LIFECYCLE) {
        *stop = (rs_stop){.code = -1, .index = (int32_t)(r - e->rings), .cpu = r->cpu, .source = event->source, .pid = rec.pid,
                          .tid = rec.tid, .raw = rec.raw, .raw_length = (uint32_t)rec.raw_length,
                          .time = rec.time, .abi = f.abi, .argc = f.argc, .address = f.address,
                          .complete = f.complete, .memory = rec.side, .memory_length = (uint32_t)rec.side_length};
        stop->cgroup = f.cgroup;
        int why = lifecycle(e, s, &rec, &f, stop);
        if (unsure && why != RS_DONE && why != RS_RECORD)
            r->twin = before; /* the record will come again */
        return why;
    }
    struct process *process = NULL;
    if (rec.pid > 0) {
        process = process_of(e, rec.pid);
        if (!process) {
            if (unsure)
                r->twin = before; /* the record will come again */
            *stop = (rs_stop){.index = (int32_t)(r - e->rings), .cpu = r->cpu, .pid = rec.pid, .tid = rec.tid,
                              .time = rec.time};
            return RS_UNKNOWN;
        }
        if (s->flags & (process->flags & RS_FOREIGN ? RS_NATIVE : RS_ALIEN)) {
            e->counters.unwanted++;
            return RS_DONE;
        }
        if (container_of(e, process->container)->flags & RS_HOLD) {
            struct held h = {0, (uint32_t)rec.raw_length, (uint32_t)rec.side_length, process->container,
                             event->source, rec.time, r->cpu, rec.pid, rec.tid, 0};
            if (hold(e, h, NULL, rec.raw, rec.side))
                return RS_DONE;
        }
    }
    dispatch_counted(e, s, &rec, process);
    return RS_DONE;
}

/* The record that Python was just given can't be handled yet: give it again at the next rs_drain(). */
void rs_again(rs_engine *e)
{
    if (e->stepping >= 0)
        e->counters.records--;
    e->stepping = -1;
}

/*
 * With thousands of processes and containers most look-ups miss the cache. So have what the next records need on its
 * way: of the third the place in the table, of the second the process, of the first the container.
 */
static inline void fetch_ahead(rs_engine *e, const struct ring *r)
{
    int32_t pid = (int32_t)load(r->record + 16, 4);
    uint64_t at = r->at + r->record_size;
    for (int steps = 0; steps < 3; steps++) {
        uint64_t offset = at & (r->size - 1);
        if (at + 24 > r->head || offset + 24 > r->size)
            return;
        const uint8_t *next = r->data + offset;
        int32_t other = (int32_t)load(next + 16, 4);
        if (other == pid)
            return;
        pid = other;
        if (steps == 2) {
            map_prefetch(&e->processes, (uint64_t)(uint32_t)other);
            return;
        }
        const struct process *p = map_get(&e->processes, (uint64_t)(uint32_t)other);
        if (!p)
            return;
        if (steps) {
            __builtin_prefetch(p);
            __builtin_prefetch((const char *)p + 64);
        } else if (p->container) {
            const char *c = (const char *)container_of(e, p->container);
            for (int line = 0; line < 5; line++)
                __builtin_prefetch(c + 64 * line);
        }
        at += load(next + 6, 2);
    }
}

int rs_drain(rs_engine *e, uint64_t budget, rs_stop *stop)
{
    *stop = (rs_stop){.index = -1};
    publish_now(e);
    if (e->stepping >= 0) {
        if (e->rings[e->stepping].used && e->rings[e->stepping].record)
            ring_step(&e->rings[e->stepping], e->cut);
        e->stepping = -1;
    }
    if (!e->draining) {
        clock_sync(e);
        e->cut = rs_clock() - IN_FLIGHT;
        courier_settle(e);
        for (size_t i = 0; i < e->n_rings; i++) {
            struct ring *r = &e->rings[i];
            if (!r->used)
                continue;
            /* acquire: what the head says is there is read after the head */
            r->head = __atomic_load_n(&r->page->data_head, __ATOMIC_ACQUIRE);
            ring_load(r, e->cut);
        }
        e->draining = true;
    }
    for (;;) {
        struct ring *first = NULL;
        uint64_t second = UINT64_MAX; /* the time up to which `first` may go on alone */
        if (e->n_ready) {
            stop->index = (int32_t)e->ready[--e->n_ready];
            e->outputs[stop->index].ready = false;
            return RS_FULL;
        }
        for (size_t i = 0; i < e->n_rings; i++) {
            struct ring *r = &e->rings[i];
            if (r->skipped) {
                *stop = (rs_stop){.index = (int32_t)i, .cpu = r->cpu, .count = r->skipped, .time = e->cut};
                e->counters.corrupt += r->skipped;
                r->skipped = 0;
                return RS_CORRUPT;
            }
            if (!r->record)
                continue;
            if (!first || r->record_time < first->record_time) {
                second = first ? first->record_time : second;
                first = r;
            } else if (r->record_time < second) {
                second = r->record_time;
            }
        }
        if (!first)
            break;
        do {
            uint32_t type = (uint32_t)load(first->record, 4);
            if (type == PERF_RECORD_SAMPLE) {
                fetch_ahead(e, first);
                int why = sample(e, first, stop);
                if (why == RS_UNKNOWN || why == RS_CGROUP)
                    return why; /* the record stays, to be taken again */
                e->counters.records++;
                if (why == RS_RECORD) {
                    e->stepping = (int)(first - e->rings); /* its bytes must stay until Python has read them */
                    return why;
                }
            } else if (type == PERF_RECORD_LOST && first->record_size >= 48) {
                uint64_t count = load(first->record + 16, 8);
                *stop = (rs_stop){.index = (int32_t)(first - e->rings), .cpu = first->cpu, .count = count,
                                  .since = first->last_time, .time = first->record_time};
                first->lost += count;
                e->counters.lost += count;
                ring_step(first, e->cut);
                return RS_LOST;
            }
            ring_step(first, e->cut);
            if (budget && !--budget)
                return RS_YIELD;
        } while (first->record && first->record_time <= second && !e->n_ready);
    }
    for (size_t i = 0; i < e->n_rings; i++)
        if (e->rings[i].used)
            ring_publish(&e->rings[i]);
    e->draining = false;
    processes_forget(e, e->cut);
    stop->time = e->cut;
    return RS_DONE;
}
