/* Who did it: the process table, kept by lifecycle records in the order of time. Part of _perf.c. */

enum {
    TOLD_FLAGS = RS_FOREIGN | RS_ALIVE | RS_KERNEL_THREAD,
    LISTED = 1u << 16,    /* among the dead that are still remembered */
    FORKED = 1u << 17,    /* somebody's parent, perhaps */
    MAX_LINE = 16 << 10,  /* bytes of a lineage, about a thousand processes; what is below has pid 1 for parent */
    ENTRY_ROOM = 32 + 3 * RS_COMM, /* of one process in a lineage */
    CLOSE = 20000,        /* ns between two looks at two clocks */
    UNSURE = 1000000,     /* ns that may lie between a process's start time being taken and its fork event */
    MAX_CGROUPS = 65536,
};
#define NO_START UINT64_MAX
#define GRACE 2000000000u /* ns that a dead process is kept, for events of its last moments */

/* ---- the table ----------------------------------------------------------------------------------- */

static void process_unref(struct process *p)
{
    while (p && !--p->refs) {
        struct process *up = p->parent;
        free(p->line);
        free(p);
        p = up;
    }
}

/* Each that is alive counts in its container. */
static void process_counts(rs_engine *e, const struct process *p, int by)
{
    if (p->flags & RS_ALIVE && p->container && p->container < e->n_containers && e->containers[p->container])
        e->containers[p->container]->processes += (uint32_t)by;
}

static void process_flags(rs_engine *e, struct process *p, uint32_t flags)
{
    process_counts(e, p, -1);
    e->foreign += !!(flags & RS_FOREIGN) - !!(p->flags & RS_FOREIGN);
    p->flags = flags;
    process_counts(e, p, 1);
}

/* It is no longer the one of its pid. */
static void process_gone(rs_engine *e, struct process *p)
{
    process_flags(e, p, p->flags & ~(uint32_t)(RS_ALIVE | RS_FOREIGN));
    process_unref(p);
}

static void process_named(rs_engine *e, struct process *p, const uint8_t *comm, size_t length)
{
    length = strnlen((const char *)comm, length < RS_COMM ? length : RS_COMM);
    if (length == p->comm_length && (!length || !memcmp(p->comm, comm, length)))
        return;
    put(p->comm, comm, length);
    p->comm_length = (uint8_t)length;
    p->line_at = 0;
    e->changes += !!(p->flags & FORKED);
}

static void process_adopt(rs_engine *e, struct process *p, struct process *parent)
{
    for (const struct process *up = parent; up; up = up->parent)
        if (up == p)
            return; /* procfs was read while pids were used again: nobody descends from himself */
    if (p->parent == parent)
        return;
    if (parent) {
        parent->refs++;
        parent->flags |= FORKED;
    }
    process_unref(p->parent);
    p->parent = parent;
    e->changes++;
}

static void process_died(rs_engine *e, struct process *p, uint64_t time)
{
    process_flags(e, p, p->flags & ~(uint32_t)RS_ALIVE);
    p->threads = 0;
    if (p->flags & LISTED)
        return;
    p->flags |= LISTED;
    p->refs++;
    p->dead_at = time;
    p->next_dead = NULL;
    *(e->dead_last ? &e->dead_last->next_dead : &e->dead) = p;
    e->dead_last = p;
}

/* Forget those who have been dead for long; as somebody's ancestor one stays. */
static void processes_forget(rs_engine *e, uint64_t now)
{
    while (e->dead && e->dead->dead_at + GRACE < now) {
        struct process *p = e->dead;
        e->dead = p->next_dead;
        e->dead_last = e->dead ? e->dead_last : NULL;
        p->flags &= ~(uint32_t)LISTED;
        if (!(p->flags & RS_ALIVE) && map_get(&e->processes, (uint64_t)(uint32_t)p->pid) == p) {
            map_take(&e->processes, (uint64_t)(uint32_t)p->pid);
            e->cached_process = NULL;
            process_gone(e, p);
        }
        process_unref(p);
    }
}

static void processes_free(rs_engine *e)
{
    processes_forget(e, UINT64_MAX);
    for (size_t i = 0; i < e->processes.room; i++)
        if (e->processes.slots[i].key)
            process_unref(e->processes.slots[i].value);
    map_free(&e->processes, false);
    map_free(&e->cgroups, false);
    free(e->chain);
    free(e->line);
    free(e->proc);
}

/* A process of this pid, which replaces the one that had it before; NULL if memory is short. */
static struct process *process_new(rs_engine *e, int32_t pid, uint64_t start)
{
    struct process *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    struct process *before = map_get(&e->processes, (uint64_t)(uint32_t)pid);
    if (!map_set(&e->processes, (uint64_t)(uint32_t)pid, p)) {
        free(p);
        return NULL;
    }
    if (before)
        process_gone(e, before);
    e->cached_process = NULL;
    p->refs = 1;
    p->pid = pid;
    p->start = start;
    uint8_t *out = p->bytes;
    if (start != NO_START) {
        char id[2 * RS_BOOT + 32];
        int n = snprintf(id, sizeof id, "%s-%" PRIx32 "-%" PRIx64, e->boot, (uint32_t)pid, start);
        out = put(out, e->tags.process_id.bytes, e->tags.process_id.length);
        *out++ = (uint8_t)n;
        out = put(out, (const uint8_t *)id, (size_t)n);
        p->id = n;
    }
    out = put_varint(put(out, e->tags.process_pid.bytes, e->tags.process_pid.length), (uint64_t)pid);
    p->head = (uint32_t)(out - p->bytes);
    return p;
}

static struct text process_id(const rs_engine *e, const struct process *p)
{
    return (struct text){p->bytes + e->tags.process_id.length + 1, (size_t)p->id};
}

/* Event.process_lineage, encoded: kept until an ancestor has another name or parent, which is rare. */
static struct text lineage_of(rs_engine *e, struct process *p)
{
    size_t n = 0;
    struct process *up = p;
    for (; up && up->line_at != e->changes; up = up->parent) { /* anybody can make one too deep for a recursion */
        if (!grow((void **)&e->chain, &e->chain_room, n + 1, sizeof *e->chain))
            return (struct text){p->bytes, 0};
        e->chain[n++] = up;
    }
    while (n--) {
        struct process *one = e->chain[n];
        uint8_t name[3 * RS_COMM], entry[ENTRY_ROOM];
        size_t length = put_text(name, one->comm, one->comm_length);
        uint8_t *out = put(entry, e->tags.lineage_pid.bytes, e->tags.lineage_pid.length);
        out = put_varint(out, (uint64_t)(uint32_t)one->pid << 1); /* sint32 */
        if (length)
            out = put_varint(put(out, e->tags.lineage_command.bytes, e->tags.lineage_command.length), length);
        size_t body = (size_t)(put(out, name, length) - entry), before = up ? up->line_length : 0;
        size_t room = 16 + body + before;
        if (room > one->line_room) {
            uint8_t *more = realloc(one->line, room);
            if (!more)
                return (struct text){p->bytes, 0};
            one->line = more;
            one->line_room = (uint32_t)room;
        }
        out = put(one->line, e->tags.lineage.bytes, e->tags.lineage.length);
        out = put(put_varint(out, body), entry, body);
        one->line_length = (uint32_t)(put(out, up ? up->line : NULL, before) - one->line);
        one->line_at = e->changes;
        up = one;
    }
    return (struct text){p->line, p->line_length};
}

/* How the clocks lie: they drift apart by what NTP corrects. */
static void clock_sync(rs_engine *e)
{
    for (int tries = 0; tries < 4; tries++) {
        struct timespec boot;
        uint64_t before = rs_clock();
        clock_gettime(CLOCK_BOOTTIME, &boot);
        uint64_t after = rs_clock(), at = (uint64_t)boot.tv_sec * 1000000000u + (uint64_t)boot.tv_nsec;
        if (after - before < CLOSE || !e->boot_offset)
            e->boot_offset = (int64_t)(at - (before + after) / 2);
        if (after - before < CLOSE)
            return; /* else we were interrupted, and the difference is none */
    }
}

/* The start time in /proc/PID/stat, behind the name, which may hold anything; NO_START if it is gone. */
static uint64_t read_start(const rs_engine *e, int32_t pid)
{
    char path[4096], text[1024];
    if (snprintf(path, sizeof path, "%s/%" PRId32 "/stat", e->proc, pid) >= (int)sizeof path)
        return NO_START;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NO_START;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    const char *at = strrchr(text, ')');
    for (int fields = 2; at && fields < 22; fields++) /* proc_pid_stat(5): (2) comm, (22) starttime */
        at = strchr(at + 1, ' ');
    return at ? strtoull(at + 1, NULL, 10) : NO_START;
}

static bool is_near(uint64_t a, uint64_t b)
{
    return a - b + 1 <= 2;
}

/* A new process; its start is told from the event's time, or read where that may be off by a tick. */
static struct process *process_forked(rs_engine *e, struct process *parent, int32_t pid, uint64_t time,
                                      const uint8_t *comm)
{
    uint64_t at = time + (uint64_t)e->boot_offset, start = at / e->tick;
    struct process *known = map_get(&e->processes, (uint64_t)(uint32_t)pid);
    if (known && known->flags & RS_ALIVE && known->start != NO_START && is_near(known->start, start))
        return known; /* procfs had it already */
    if ((at - UNSURE) / e->tick != start) {
        uint64_t told = read_start(e, pid);
        start = is_near(told, start) ? told : start;
    }
    parent->refs++; /* the child may have had the pid of its own parent's parent */
    struct process *p = process_new(e, pid, start);
    if (!p) {
        process_unref(parent);
        return NULL;
    }
    parent->flags |= FORKED;
    p->threads = 1;
    p->container = parent->container;
    process_flags(e, p, RS_ALIVE | (parent->flags & (RS_FOREIGN | RS_KERNEL_THREAD)));
    process_named(e, p, comm, 16);
    struct process *first = map_get(&e->processes, 1);
    if (lineage_of(e, parent).length > MAX_LINE && first) { /* nested that deep by mistake, or to fill events */
        process_unref(parent);
        parent = first;
        parent->refs++;
    }
    p->parent = parent;
    return p;
}

/* ---- what Python says and asks ------------------------------------------------------------------- */

/* What procfs says of a process: another, or news of the one that is known with this start. */
int rs_process_set(rs_engine *e, const rs_process *told)
{
    if (told->pid <= 0 || told->comm_length > RS_COMM)
        return -EINVAL;
    uint64_t start = told->flags & RS_NAMELESS ? NO_START : told->start;
    struct process *p = map_get(&e->processes, (uint64_t)(uint32_t)told->pid);
    if (!p || p->start != start || start == NO_START) {
        p = process_new(e, told->pid, start);
        if (!p)
            return -ENOMEM;
        p->container = told->container;
    }
    process_flags(e, p, (p->flags & ~(uint32_t)TOLD_FLAGS) | (told->flags & TOLD_FLAGS));
    process_named(e, p, told->comm, told->comm_length);
    p->threads = told->threads;
    p->counted_at = told->counted_at;
    if (!(p->flags & RS_ALIVE))
        process_died(e, p, rs_clock());
    return 0;
}

/* What is known of a process; false if nothing is. */
int rs_process_get(rs_engine *e, int32_t pid, rs_process *out)
{
    const struct process *p = map_get(&e->processes, (uint64_t)(uint32_t)pid);
    if (!p)
        return 0;
    *out = (rs_process){.pid = pid, .parent = p->parent ? p->parent->pid : 0,
                        .flags = (p->flags & TOLD_FLAGS) | (p->start == NO_START ? RS_NAMELESS : 0),
                        .container = p->container,
                        .threads = p->threads, .comm_length = p->comm_length, .start = p->start,
                        .counted_at = p->counted_at};
    put(out->comm, p->comm, p->comm_length);
    return 1;
}

/* The parent of a process, by whoever has that pid now. */
void rs_process_adopt(rs_engine *e, int32_t pid, int32_t parent)
{
    struct process *p = map_get(&e->processes, (uint64_t)(uint32_t)pid);
    if (p)
        process_adopt(e, p, parent > 0 ? map_get(&e->processes, (uint64_t)(uint32_t)parent) : NULL);
}

/* A process is in another container (0: the host) now. */
void rs_process_move(rs_engine *e, int32_t pid, uint32_t container)
{
    struct process *p = map_get(&e->processes, (uint64_t)(uint32_t)pid);
    if (!p)
        return;
    process_counts(e, p, -1);
    p->container = container;
    process_counts(e, p, 1);
}

/* A process is gone, and nobody told how. */
void rs_process_end(rs_engine *e, int32_t pid, uint64_t time)
{
    struct process *p = map_get(&e->processes, (uint64_t)(uint32_t)pid);
    if (p)
        process_died(e, p, time);
}

/* The pids that are known, as many as there is room for; how many there are. */
size_t rs_process_pids(const rs_engine *e, int32_t *out, size_t room)
{
    size_t n = 0;
    for (size_t i = 0; i < e->processes.room && n < room; i++)
        if (e->processes.slots[i].key)
            out[n++] = (int32_t)(e->processes.slots[i].key - 1);
    return e->processes.used;
}

/* A process's Event.process_lineage, encoded; its length. Good until the next call. */
size_t rs_process_lineage(rs_engine *e, int32_t pid, const uint8_t **out)
{
    struct process *p = map_get(&e->processes, (uint64_t)(uint32_t)pid);
    struct text line = p ? lineage_of(e, p) : (struct text){NULL, 0};
    *out = line.at;
    return line.length;
}

/* How many 32-bit processes there are, or were a moment ago. */
size_t rs_process_foreign(const rs_engine *e)
{
    return e->foreign;
}

/* How many of a container's processes are alive. */
uint32_t rs_container_processes(const rs_engine *e, uint32_t container)
{
    return container_of(e, container)->processes;
}

/* Programs that begin in this cgroup, of processes of this container, are where they should be. */
int rs_cgroup_set(rs_engine *e, uint64_t cgroup, uint32_t container)
{
    if (e->cgroups.used >= MAX_CGROUPS)
        map_free(&e->cgroups, false);
    return map_set(&e->cgroups, cgroup, (void *)(uintptr_t)(container + 1)) ? 0 : -ENOMEM;
}

/* What cgroups are is no longer known. */
void rs_cgroups_clear(rs_engine *e)
{
    map_free(&e->cgroups, false);
}

/* ns between CLOCK_BOOTTIME and the events' clock. */
int64_t rs_boot_offset(const rs_engine *e)
{
    return e->boot_offset;
}
