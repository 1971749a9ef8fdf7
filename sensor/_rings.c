/* Perf events, and the rings they write to. Part of _perf.c. */

/* ---- perf events --------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define STACK_POINTER (1ull << 7) /* PERF_REG_X86_SP */
#define FIRST_ARGUMENT (1ull << 1) /* PERF_REG_X86_BX */
#elif defined(__aarch64__)
#define STACK_POINTER (1ull << 31) /* PERF_REG_ARM64_SP */
#else
#define STACK_POINTER 0 /* no user stack is sampled there */
#endif
#ifndef FIRST_ARGUMENT
#define FIRST_ARGUMENT 0
#endif
#define CGROUP_SWITCHES 11 /* PERF_COUNT_SW_CGROUP_SWITCHES, 5.13 */
#ifndef PERF_FORMAT_LOST
#define PERF_FORMAT_LOST (1u << 4) /* 6.0 */
#endif

/* Open a perf event on a CPU, not enabled yet; the descriptor, or -errno. */
int rs_perf_open(const rs_perf *perf, int cpu, int cgroup_fd)
{
    struct perf_event_attr attr = {
        .size = sizeof attr,
        .type = perf->tracepoint < 0 ? PERF_TYPE_SOFTWARE : PERF_TYPE_TRACEPOINT,
        .config = perf->tracepoint == RS_PERF_OUTPUT     ? PERF_COUNT_SW_BPF_OUTPUT
                  : perf->tracepoint == RS_PERF_SWITCHES ? CGROUP_SWITCHES
                  : perf->tracepoint < 0                 ? PERF_COUNT_SW_DUMMY
                                                         : (uint64_t)perf->tracepoint,
        .sample_period = perf->tracepoint != RS_PERF_SWITCHES,
        .sample_type = PERF_SAMPLE_IDENTIFIER | PERF_SAMPLE_TID | PERF_SAMPLE_TIME | PERF_SAMPLE_RAW,
        .disabled = 1,
        .sample_id_all = 1,
        .watermark = perf->watermark > 0,
        .wakeup_watermark = perf->watermark ? perf->watermark : 1, /* else wakeup_events, the same field */
        .use_clockid = 1,
        .clockid = CLOCK_MONOTONIC_RAW,
        .read_format = PERF_FORMAT_LOST,
    };
    unsigned long flags = PERF_FLAG_FD_CLOEXEC | (cgroup_fd >= 0 ? PERF_FLAG_PID_CGROUP : 0);
    if (perf->stack_size && STACK_POINTER) {
        attr.sample_type |= PERF_SAMPLE_REGS_USER | PERF_SAMPLE_STACK_USER;
        attr.sample_regs_user = STACK_POINTER;
        attr.sample_stack_user = perf->stack_size;
    }
    if (perf->abi && STACK_POINTER) {
        attr.sample_type |= PERF_SAMPLE_REGS_USER; /* of which the ABI is a part; it takes one at least */
        attr.sample_regs_user = STACK_POINTER;
    }
    if (perf->first_argument && FIRST_ARGUMENT) {
        attr.sample_type |= PERF_SAMPLE_REGS_USER;
        attr.sample_regs_user = FIRST_ARGUMENT;
    }
    if (perf->cgroup)
        attr.sample_type |= PERF_SAMPLE_CGROUP;
    pid_t whose = cgroup_fd >= 0 ? cgroup_fd : -1;
    long fd = syscall(SYS_perf_event_open, &attr, whose, cpu, -1, flags);
    if (fd < 0 && errno == EINVAL) {
        attr.read_format = 0; /* before 6.0 */
        fd = syscall(SYS_perf_event_open, &attr, whose, cpu, -1, flags);
    }
    if (fd < 0 && errno == ENOENT && perf->tracepoint == RS_PERF_SWITCHES) {
        attr.config = PERF_COUNT_SW_CONTEXT_SWITCHES; /* before 5.13: of any tasks */
        fd = syscall(SYS_perf_event_open, &attr, whose, cpu, -1, flags);
    }
    return fd < 0 ? -errno : (int)fd;
}

int rs_perf_id(int fd, uint64_t *id)
{
    return ioctl(fd, PERF_EVENT_IOC_ID, id) ? -errno : 0;
}

int rs_perf_filter(int fd, const char *filter)
{
    return ioctl(fd, PERF_EVENT_IOC_SET_FILTER, filter) ? -errno : 0;
}

int rs_perf_redirect(int fd, int ring_fd)
{
    return ioctl(fd, PERF_EVENT_IOC_SET_OUTPUT, ring_fd) ? -errno : 0;
}

int rs_perf_enable(int fd, int on)
{
    return ioctl(fd, on ? PERF_EVENT_IOC_ENABLE : PERF_EVENT_IOC_DISABLE, 0) ? -errno : 0;
}

/* Samples of this event that found its ring full, ever; -ENOTSUP before 6.0. */
int64_t rs_perf_lost(int fd)
{
    uint64_t value[2];
    ssize_t n = read(fd, value, sizeof value);
    return n < 0 ? -errno : n < (ssize_t)sizeof value ? -ENOTSUP : (int64_t)value[1];
}

/* What it has counted; -errno. */
int64_t rs_perf_count(int fd)
{
    uint64_t value[2];
    ssize_t n = read(fd, value, sizeof value);
    return n < 0 ? -errno : n < 8 ? -EIO : (int64_t)value[0];
}

/* ---- rings --------------------------------------------------------------------------------------- */

struct ring;
static void prompt_close(rs_engine *e, const struct ring *r);

static int ring_add(rs_engine *e, struct ring r)
{
    size_t i = 0;
    while (i < e->n_rings && e->rings[i].used)
        i++;
    if (!grow((void **)&e->rings, &e->n_rings, i + 1, sizeof *e->rings))
        return -ENOMEM;
    r.used = true;
    r.at = r.published = __atomic_load_n(&r.page->data_tail, __ATOMIC_RELAXED);
    e->rings[i] = r;
    return (int)i;
}

/* Map a perf event's ring of `pages` (a power of two) data pages; the ring's index, or -errno. */
int rs_ring_open(rs_engine *e, int fd, int cpu, size_t pages)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), length = (pages + 1) * page;
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    struct ring r = {.cpu = cpu, .mapped = true, .page = memory, .data = (uint8_t *)memory + page,
                     .size = pages * page, .mapped_length = length};
    int i = ring_add(e, r);
    if (i < 0)
        munmap(memory, length);
    return i;
}

/* The same over memory that is laid out like a ring and belongs to the caller. */
int rs_ring_attach(rs_engine *e, void *memory, size_t pages, size_t page_size, int cpu)
{
    uint64_t size = pages * page_size;
    if (!size || size & (size - 1) || page_size < sizeof(struct perf_event_mmap_page))
        return -EINVAL;
    struct ring r = {.cpu = cpu, .page = memory, .data = (uint8_t *)memory + page_size, .size = size};
    return ring_add(e, r);
}

void rs_ring_close(rs_engine *e, int ring)
{
    if (ring < 0 || (size_t)ring >= e->n_rings || !e->rings[ring].used)
        return;
    struct ring *r = &e->rings[ring];
    if (r->prompt)
        prompt_close(e, r);
    if (r->mapped)
        munmap(r->page, r->mapped_length);
    free(r->wrap);
    *r = (struct ring){0};
}

uint64_t rs_ring_lost(const rs_engine *e, int ring)
{
    return ring >= 0 && (size_t)ring < e->n_rings ? e->rings[ring].lost : 0;
}

/* Bytes in the ring that were not read yet. */
size_t rs_ring_waiting(const rs_engine *e, int ring)
{
    if (ring < 0 || (size_t)ring >= e->n_rings || !e->rings[ring].used)
        return 0;
    return (size_t)(__atomic_load_n(&e->rings[ring].page->data_head, __ATOMIC_ACQUIRE) - e->rings[ring].at);
}

static inline void ring_publish(struct ring *r)
{
    if (r->published == r->at)
        return;
    r->published = r->at;
    /* release: every read of the bytes comes before the kernel may write over them */
    __atomic_store_n(&r->page->data_tail, r->at, __ATOMIC_RELEASE);
}

/* Make `record` the one at `at`, or NULL if there is none older than the cut. */
static inline void ring_load(struct ring *r, uint64_t cut)
{
    uint64_t left = r->head - r->at;
    r->record = NULL;
    if (!left)
        return;
    if (left > r->size || (left | r->at) % 8)
        goto corrupt;
    uint64_t offset = r->at & (r->size - 1);
    const uint8_t *p = r->data + offset; /* a header never wraps: records are multiples of 8 */
    uint32_t size = (uint32_t)load(p + 6, 2);
    if (size < 32 || size > left || size % 8)
        goto corrupt;
    if (offset + size > r->size) {
        if (!r->wrap && !(r->wrap = malloc(MAX_RECORD)))
            return;
        size_t first = (size_t)(r->size - offset);
        memcpy(r->wrap, p, first);
        memcpy(r->wrap + first, r->data, size - first);
        p = r->wrap;
    }
    uint64_t time = load(p + (load(p, 4) == PERF_RECORD_SAMPLE ? 24 : size - 16), 8);
    if (time > cut)
        return;
    r->record = p;
    r->record_size = size;
    r->record_time = time;
    return;
corrupt: /* nothing behind it can be trusted; begin again with what comes next */
    r->skipped += left;
    r->at = r->head;
}

static inline void ring_step(struct ring *r, uint64_t cut)
{
    r->last_time = r->record_time;
    r->at += r->record_size;
    if (r->at - r->published >= r->size / 8)
        ring_publish(r);
    ring_load(r, cut);
}
