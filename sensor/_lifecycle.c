/*
 * What lifecycle records say: who forks, begins a program, ends; the events of that, and those of the last while,
 * for subscriptions that look back. Part of _perf.c.
 */

enum {
    CLONE_THREAD_FLAG = 0x00010000, /* include/uapi/linux/sched.h */
    MAX_DEPTH_DEAD = 64, /* of a chain that grows by dying, one generation at a time */
    LONGEST = 2 << 20,   /* bytes of a command line that is told */
};
#define CLONE_CGROUP_FLAG 0x200000000u /* CLONE_INTO_CGROUP of clone3(2), 5.7 */

/* ---- what happened lately: a ring of facts, and who it was -------------------------------------- */

struct past { /* then the facts, the arguments, the process's head and lineage, its container's fields */
    uint32_t total, source, raw, side, head, lineage, container, before, behind, held;
    int32_t cpu, pid, tid;
    uint64_t time, generation;
};

static int history_size(rs_engine *e, size_t size)
{
    free(e->past);
    e->past = size ? malloc(size + SLACK) : NULL;
    if (size && !e->past)
        return -ENOMEM;
    e->past_room = size;
    e->past_start = e->past_end = e->past_count = 0;
    e->past_wrapped = false;
    return 0;
}

static void forget_oldest(rs_engine *e)
{
    struct past oldest;
    memcpy(&oldest, e->past + e->past_start, sizeof oldest);
    e->past_since = oldest.time;
    e->past_start += oldest.total;
    e->past_count--;
    if (e->past_wrapped && e->past_start == e->past_wrap) {
        e->past_start = 0;
        e->past_wrapped = false;
    }
}

/* Keep an event that can be told again. `held`: it was not told yet, its container waits for its names. */
static void remember(rs_engine *e, uint32_t source, struct process *p, const struct record *rec, bool held)
{
    struct text line = lineage_of(e, p);
    const struct container *c = container_of(e, p->container);
    struct past past = {.source = source, .raw = (uint32_t)rec->raw_length, .side = (uint32_t)rec->side_length,
                        .head = p->head, .lineage = (uint32_t)line.length, .container = p->container,
                        .before = p->container ? c->head : 0, .behind = c->tail, .cpu = rec->cpu, .pid = rec->pid, .tid = rec->tid,
                        .held = held, .time = rec->time, .generation = c->generation};
    size_t total = (sizeof past + rec->raw_length + rec->side_length + p->head + line.length + past.before + past.behind + 7) &
                   ~(size_t)7;
    past.total = (uint32_t)total;
    if (total > e->past_room) {
        e->past_since = rec->time;
        return;
    }
    for (;; forget_oldest(e)) {
        if (!e->past_count)
            e->past_start = e->past_end = 0;
        if (e->past_wrapped ? e->past_start - e->past_end >= total : e->past_room - e->past_end >= total)
            break;
        if (!e->past_wrapped && e->past_start >= total) {
            e->past_wrap = e->past_end;
            e->past_wrapped = true;
            e->past_end = 0;
            break;
        }
    }
    uint8_t *out = put(e->past + e->past_end, (const uint8_t *)&past, sizeof past);
    out = put(put(out, rec->raw, rec->raw_length), rec->side, rec->side_length);
    out = put(put(out, p->bytes, p->head), line.at, line.length);
    put(out, c->bytes, past.before + past.behind);
    e->past_end += total;
    e->past_count++;
}

static bool is_wanted_by(const struct source *s, uint32_t output, const struct record *rec)
{
    for (int32_t at = s->any; at != NO_ENTRY; at = s->entries[at].next)
        if (s->entries[at].output == output && accepts(s, &s->entries[at], rec))
            return true;
    return false;
}

/*
 * Tell an output again what it wants of what happened from `since` and before `until`, as far as it is remembered.
 * `from`: where the last such call ended, all zero at first; no more must have happened meanwhile. 1 if the output has
 * reached its flush size before that.
 */
int rs_replay(rs_engine *e, uint32_t output, uint64_t since, uint64_t until, rs_place *from)
{
    if (output >= e->n_outputs || e->outputs[output].ready)
        return output < e->n_outputs;
    if (!from->index)
        from->at = e->past_start;
    for (; from->index < e->past_count; from->index++) {
        if (e->outputs[output].ready)
            return 1;
        if (e->past_wrapped && from->at == e->past_wrap)
            from->at = 0;
        size_t at = from->at;
        struct past past;
        memcpy(&past, e->past + at, sizeof past);
        const uint8_t *bytes = e->past + at + sizeof past;
        if (past.time >= until)
            return 0;
        from->at = at + past.total;
        if (past.time < since || past.source >= e->n_sources || !e->sources[past.source].used)
            continue;
        struct record rec = {.raw = bytes, .raw_length = past.raw, .side = bytes + past.raw, .side_length = past.side,
                             .time = past.time, .cpu = past.cpu, .pid = past.pid, .tid = past.tid};
        const struct container *c = container_of(e, past.container);
        bool same = c->generation == past.generation; /* its number may be another's by now */
        if (past.held && same && c->flags & RS_HOLD)
            continue; /* to be told when it has its names */
        struct process who = {.flags = RS_ALIVE, .container = same ? past.container : 0, .head = past.head,
                              .line_at = e->changes, .line_length = past.lineage};
        const uint8_t *head = bytes + past.raw + past.side;
        put(who.bytes, head, past.head);
        who.line = (uint8_t *)(uintptr_t)(head + past.head);
        const struct source *s = &e->sources[past.source];
        bool self = past.pid == e->self_pid;
        if (!wants(&e->outputs[output], past.time, self, who.container) || !is_wanted_by(s, output, &rec))
            continue;
        int64_t length = plan_body(e, s, &rec);
        if (length < 0)
            continue;
        struct container *was = NULL;
        if (!same && past.before + past.behind) {
            was = malloc(sizeof *was + past.before + past.behind + SLACK);
            if (!was)
                continue;
            *was = (struct container){.head = past.before, .tail = past.behind};
            put(was->bytes, head + past.head + past.lineage, past.before + past.behind);
            c = was;
        }
        deliver(e, &output, 1, past.time, past.cpu, past.tid, &who, c, true, e->body, (size_t)length);
        free(was);
    }
    return 0;
}

/* Nothing older is remembered. */
uint64_t rs_history_since(const rs_engine *e)
{
    return e->past_since;
}

/* How this sensor's processes are told apart and remembered; before any of them is known. */
int rs_life_set(rs_engine *e, const rs_life *life)
{
    if (strlen(life->boot) >= RS_BOOT)
        return -EINVAL;
    char *proc = strdup(life->proc);
    if (!proc)
        return -ENOMEM;
    free(e->proc);
    e->proc = proc;
    strcpy(e->boot, life->boot);
    e->threads_counted = life->threads_counted;
    e->cgroups_told = life->cgroups_told;
    e->untold = life->untold;
    return history_size(e, life->history);
}

/* ---- what the kernel says ------------------------------------------------------------------------ */

/* Have a source's records handled here. */
int rs_source_follow(rs_engine *e, uint32_t source, const rs_follow *follow)
{
    if (source >= e->n_sources || !(e->sources[source].flags & RS_LIFECYCLE))
        return -EINVAL;
    e->sources[source].follow = *follow;
    return 0;
}

static uint64_t field_at(const struct record *rec, uint32_t offset, unsigned size)
{
    return offset <= rec->raw_length && size <= rec->raw_length - offset ? load(rec->raw + offset, size) : 0;
}

/* Put a text behind the facts, as __data_loc has it; the length of all. */
static size_t facts_text(rs_engine *e, uint32_t *word, size_t length, struct text text)
{
    size_t n = text.length < sizeof e->facts_text - 1 ? text.length : sizeof e->facts_text - 1;
    put(e->facts_text, text.at, n);
    e->facts_text[n] = 0;
    *word = (uint32_t)length | (uint32_t)(n + 1) << 16;
    return length + n + 1;
}

/* An event of this process, to whom it may interest, now or later. `side`: its arguments. */
static void tell(rs_engine *e, uint32_t source, struct process *p, const struct record *cause, size_t length,
                 struct text side)
{
    if (source >= e->n_sources)
        return;
    const struct source *s = &e->sources[source];
    struct record rec = {.raw = (const uint8_t *)&e->facts, .raw_length = length, .side = side.at,
                         .side_length = side.length, .time = cause->time, .cpu = cause->cpu, .pid = p->pid,
                         .tid = cause->tid};
    bool held = false;
    if (container_of(e, p->container)->flags & RS_HOLD) { /* also while nobody listens: who comes may look back */
        struct held h = {0, (uint32_t)length, (uint32_t)side.length, p->container, source, rec.time,
                         rec.cpu, rec.pid, rec.tid, 0};
        held = hold(e, h, NULL, rec.raw, rec.side);
    }
    if (p->pid != e->untold)
        remember(e, source, p, &rec, held);
    if (s->any != NO_ENTRY && !held)
        dispatch(e, s, &rec, p);
}

/* The last thread of a process is gone. The wait(2) status is not known if it is negative. */
static void tell_exit(rs_engine *e, uint32_t source, struct process *p, const struct record *rec, int32_t code)
{
    e->facts = (rs_facts){.known = code >= 0};
    if (code >= 0) {
        e->facts.code = code;
        e->facts.status = (uint32_t)code >> 8 & 0xff;
        e->facts.signal = (uint32_t)code & 0x7f;
        e->facts.core = (uint32_t)code >> 7 & 1;
    }
    tell(e, source, p, rec, sizeof e->facts, (struct text){NULL, 0});
    process_died(e, p, rec->time);
    struct process *parent = p->parent;
    if (parent && !(parent->flags & RS_ALIVE)) {
        int depth = 0;
        for (struct process *up = p; up; up = up->parent)
            depth++;
        struct process *first = map_get(&e->processes, 1);
        if (depth > MAX_DEPTH_DEAD)
            process_adopt(e, p, first);
    }
}

/* The exit that Python was given, with the status that it has found and put there. */
void rs_process_exit(rs_engine *e, const rs_stop *stop)
{
    struct process *p = process_of(e, stop->pid);
    struct record rec = {.time = stop->time, .cpu = stop->cpu, .pid = stop->pid, .tid = stop->tid};
    if (p)
        tell_exit(e, stop->facts, p, &rec, stop->code);
}

static int on_fork(rs_engine *e, const rs_follow *how, const struct record *rec)
{
    if (rec->pid <= 0)
        return RS_DONE; /* the idle task makes init, and a CPU that comes up an idle task, of pid 0 */
    struct process *parent = process_of(e, rec->pid);
    if (!parent)
        return RS_UNKNOWN;
    int32_t pid = (int32_t)field_at(rec, how->at[0], 4);
    uint64_t flags = field_at(rec, how->at[1], 8);
    if (flags & CLONE_THREAD_FLAG) {
        parent->threads += e->threads_counted && rec->time > parent->counted_at;
        return RS_DONE;
    }
    uint8_t comm[16] = {0};
    struct text name = part(rec->raw, rec->raw_length, how->at[2], sizeof comm);
    put(comm, name.at, name.length);
    struct process *child = pid > 0 ? process_forked(e, parent, pid, rec->time, comm) : NULL;
    if (!child || process_of(e, rec->pid) != parent)
        return RS_DONE;
    e->facts = (rs_facts){.child = pid};
    size_t length = facts_text(e, &e->facts.child_id, sizeof e->facts, process_id(e, child));
    tell(e, how->facts, parent, rec, length, (struct text){NULL, 0});
    return flags & CLONE_CGROUP_FLAG ? RS_RECORD : RS_DONE;
}

static int on_rename(rs_engine *e, const rs_follow *how, const struct record *rec)
{
    int32_t tid = how->at[0] ? (int32_t)field_at(rec, how->at[0], 4) : rec->tid; /* else it is the caller itself */
    struct process *p = tid > 0 ? process_of(e, tid) : NULL;
    struct text comm = part(rec->raw, rec->raw_length, how->at[1], 16);
    if (p && p->flags & RS_ALIVE)
        process_named(e, p, comm.at, comm.length);
    return RS_DONE;
}

/* A command line from the memory of its process, if that still runs; else what is known of it. */
static struct text read_on(rs_engine *e, int32_t pid, uint64_t address, uint64_t length, struct text known)
{
    size_t want = length < LONGEST ? (size_t)length : LONGEST;
    if (!e->line && !(e->line = malloc(LONGEST)))
        return known;
    int64_t n = rs_read_memory(pid, address, e->line, want);
    return n > (int64_t)known.length ? (struct text){e->line, (size_t)n} : known;
}

static int on_exec(rs_engine *e, const rs_follow *how, const struct record *rec, const struct fetched *f)
{
    struct process *p = process_of(e, rec->pid);
    if (!p)
        return RS_UNKNOWN;
    uint32_t foreign = f->abi == PERF_SAMPLE_REGS_ABI_32 ? RS_FOREIGN : 0;
    process_flags(e, p, (p->flags & ~(uint32_t)RS_FOREIGN) | foreign);
    if (e->threads_counted && rec->time > p->counted_at)
        p->threads = 1;
    bool told = e->cgroups_told == RS_CGROUPS_ALL || (e->cgroups_told && !p->container);
    if (f->cgroup && told && !e->asked && map_get(&e->cgroups, f->cgroup) != (void *)(uintptr_t)(p->container + 1)) {
        e->asked = true;
        return RS_CGROUP;
    }
    e->asked = false;
    struct text line;
    if (how->what == RS_ON_EXEC_TOLD) {
        uint64_t length = field_at(rec, how->at[2], 8);
        line = data_loc(rec->raw, rec->raw_length, how->at[3]);
        if (line.length < length) /* longer than a record can be, or not present just then */
            line = read_on(e, rec->pid, field_at(rec, how->at[1], 8), length, line);
    } else {
        line = (struct text){rec->side, rec->side_length};
        if (!f->complete && f->argc) /* longer than a record can be */
            line = read_on(e, rec->pid, f->address, LONGEST, line);
        uint64_t left = f->argc;
        for (size_t i = 0; i < line.length; i++)
            if (!left || (!line.at[i] && !--left)) {
                line.length = f->argc ? i + 1 : 0;
                break;
            }
    }
    e->facts = (rs_facts){0};
    struct text filename = to_nul(data_loc(rec->raw, rec->raw_length, how->at[0]));
    size_t length = facts_text(e, &e->facts.filename, sizeof e->facts, filename);
    tell(e, how->facts, p, rec, length, line);
    return RS_DONE;
}

static int on_exit_of(rs_engine *e, const rs_follow *how, const struct record *rec, rs_stop *stop)
{
    if (how->what == RS_ON_EXIT && how->at[0] && !field_at(rec, how->at[0], 1))
        return RS_DONE; /* a thread; the kernel's filter leaves these out, if it could be set */
    struct process *p = process_of(e, rec->pid);
    if (!p)
        return RS_UNKNOWN;
    if (e->threads_counted) {
        if (!(p->flags & RS_ALIVE) || rec->time <= p->counted_at)
            return RS_DONE;
        if (p->threads > 1) {
            p->threads--;
            return RS_DONE;
        }
    }
    stop->facts = how->facts;
    stop->container = p->container;
    if (how->what == RS_ON_EXIT)
        return RS_RECORD; /* Python finds how it ended */
    stop->code = (int32_t)field_at(rec, how->at[0], 4);
    tell_exit(e, how->facts, p, rec, stop->code);
    return p->container ? RS_RECORD : RS_DONE;
}

/* A lifecycle record: RS_DONE if that was all, else what Python is to do. */
static int lifecycle(rs_engine *e, const struct source *s, const struct record *rec, const struct fetched *f,
                     rs_stop *stop)
{
    rs_follow how = s->follow; /* a copy: sources may move */
    switch (how.what) {
    case RS_ON_FORK: return on_fork(e, &how, rec);
    case RS_ON_RENAME: return on_rename(e, &how, rec);
    case RS_ON_EXEC:
    case RS_ON_EXEC_TOLD: return on_exec(e, &how, rec, f);
    case RS_ON_EXIT:
    case RS_ON_EXIT_TOLD: return on_exit_of(e, &how, rec, stop);
    default: return RS_RECORD;
    }
}
