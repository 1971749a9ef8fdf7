/* The courier: what must be read of a caller's memory is read at once. Part of _perf.c. */

enum {
    GLANCE = 256, /* bytes that are read first */
    AHEAD = 16,   /* records that are read for at once */
};

/* Read another process's memory, as far as it is there; the number of bytes, or -errno. */
int64_t rs_read_memory(int32_t pid, uint64_t address, uint8_t *out, size_t length)
{
    size_t done = 0;
    while (done < length) {
        /* one page at a time: process_vm_readv(2) gives nothing of an iovec that faults midway */
        size_t step = 4096 - (size_t)((address + done) % 4096);
        if (step > length - done)
            step = length - done;
        struct iovec here = {out + done, step}, there = {(void *)(uintptr_t)(address + done), step};
        ssize_t n = process_vm_readv(pid, &here, 1, &there, 1, 0);
        if (n <= 0)
            return done ? (int64_t)done : n ? -errno : -EFAULT;
        done += (size_t)n;
    }
    return (int64_t)done;
}

/* How much is read first of something `length` long at most: most names are short, a page costs more than a part. */
static size_t first_step(uint64_t address, size_t length)
{
    size_t step = 4096 - (size_t)(address % 4096);
    step = step < GLANCE ? step : GLANCE;
    return step < length ? step : length;
}

/* Text to its NUL, which then counts; `have` bytes of it are there. 0 if there is no end in sight: a part of a name is
   not the name. */
static size_t read_text(int32_t pid, uint64_t address, uint8_t *out, size_t length, size_t have)
{
    for (size_t done = 0; done < length;) {
        int64_t n = (int64_t)have;
        if (!n) {
            size_t step = done ? 4096 - (size_t)((address + done) % 4096) : first_step(address, length);
            n = rs_read_memory(pid, address + done, out + done, step < length - done ? step : length - done);
        }
        if (n <= 0)
            return 0;
        const uint8_t *end = memchr(out + done, 0, (size_t)n);
        if (end)
            return (size_t)(end - out) + 1;
        done += (size_t)n;
        have = 0;
    }
    return 0;
}

/*
 * A thread of its own, of high priority, that takes the records of prompt rings as they come, reads the
 * memory that belongs to them while the caller still has it, and hands both on through a second ring, laid
 * out like the kernel's, that the drain merges like any other. It shares nothing else with the engine.
 */
enum {
    WINDOW = 1000000, /* ns in which so many records are many */
    MANY = 4,
    PAUSE = 250000,   /* ns that one may then wait for others */
    MAX_FETCHES = 64,
    MAX_FRONT = 64,
};

struct lane {
    bool used;
    int fd;
    struct perf_event_mmap_page *from, *to;
    uint8_t *from_data, *to_data;
    uint64_t from_size, to_size, at;
    size_t from_mapped;
};

struct courier {
    pthread_t thread;
    pthread_mutex_t lock; /* of all below; held while records are carried, and to add and remove */
    pthread_cond_t started;
    int wake, tid;
    bool stop, full;
    unsigned recent; /* records carried in the window */
    struct lane *lanes;
    size_t n_lanes;
    struct map fetches;
    uint8_t record[MAX_RECORD], made[MAX_RECORD];
    struct ahead { /* what was read for a record that is not carried yet, its place in the ring being `at` */
        uint64_t at;
        size_t length;
        uint8_t bytes[GLANCE];
    } ahead[AHEAD];
    size_t n_ahead;
};

static uint64_t stack_word(int32_t pid, uint64_t sp, const uint8_t *stack, size_t length, uint64_t index,
                           unsigned word)
{
    uint64_t at = index * word, value = 0;
    if (at + word <= length)
        return load(stack + at, word);
    return rs_read_memory(pid, sp + at, (uint8_t *)&value, word) == (int64_t)word ? value : 0;
}

/*
 * The arguments of a program that has just begun, from the top of its stack: argc, argv[], NULL, envp[],
 * NULL, ..., the strings (fs/binfmt_elf.c, create_elf_tables). `stack` is as much of it as the sample
 * brought. The strings lie together, those of envp behind them. The length, or -errno.
 */
int64_t rs_fetch_arguments(int32_t pid, uint64_t abi, uint64_t sp, const uint8_t *stack, size_t stack_length,
                           uint8_t *out, size_t room, uint64_t *argc, uint64_t *address, uint64_t *complete)
{
    unsigned word = abi == PERF_SAMPLE_REGS_ABI_32 ? 4 : 8;
    uint64_t count = stack_word(pid, sp, stack, stack_length, 0, word);
    uint64_t first = stack_word(pid, sp, stack, stack_length, 1, word);
    *argc = *address = *complete = 0;
    if (!sp || !first || !count || count > MAX_ARGUMENTS)
        return -ENODATA;
    uint64_t end = stack_word(pid, sp, stack, stack_length, count + 2, word);
    *argc = count;
    *address = first;
    size_t want = end > first && end - first < room ? (size_t)(end - first) : room, have = 0;
    if (first > sp && first - sp < stack_length) {
        have = stack_length - (size_t)(first - sp) < want ? stack_length - (size_t)(first - sp) : want;
        memcpy(out, stack + (first - sp), have);
    }
    for (int tries = 0; tries < 2; tries++) {
        uint64_t found = 0;
        for (size_t i = 0; i < have; i++)
            if (!out[i] && ++found == count) {
                *complete = 1;
                return (int64_t)i + 1;
            }
        if (tries == 0) {
            int64_t n = rs_read_memory(pid, first, out, want);
            if (n > 0 && (size_t)n > have)
                have = (size_t)n;
        }
    }
    return (int64_t)have;
}

/*
 * The caller may have freed its text by now and something else lie there. A name that holds control
 * characters or is not UTF-8 is more likely that than a name: better none than an invented one.
 */
static bool is_plausible(const uint8_t *text, size_t length)
{
    uint8_t valid[3 * PATH_ROOM + SLACK];
    for (size_t i = 0; i + 1 < length; i++)
        if (text[i] < 0x20 || text[i] == 0x7f)
            return false;
    return length && length <= PATH_ROOM && put_text(valid, text, length) == length && !memcmp(valid, text, length);
}

struct fetches { /* of a perf event: the first that is for a record */
    uint32_t n;
    rs_fetch how[];
};

static const rs_fetch *fetch_for(const struct fetches *all, const uint8_t *raw, size_t raw_length)
{
    for (uint32_t i = 0; i < all->n; i++) {
        const rs_fetch *how = &all->how[i];
        uint32_t k = 0;
        while (k < how->n_when && how->when[k].offset <= raw_length &&
               how->when[k].size <= raw_length - how->when[k].offset &&
               load(raw + how->when[k].offset, how->when[k].size) == how->when[k].value)
            k++;
        if (k == how->n_when)
            return how;
    }
    return NULL;
}

/* A pointer among the caller's arguments; 0 if there is none, or none of a 32-bit caller where one is expected. */
static uint64_t pointer_at(const rs_fetch *how, const uint8_t *base, size_t length, size_t offset, unsigned size)
{
    uint64_t address = offset <= length && size <= length - offset ? load(base + offset, size) : 0;
    return how->flags & RS_FETCH_32 && address >> 32 ? 0 : address;
}

/* How many bytes a text or block is long at most that a pointer among a record's arguments leads to. */
static size_t most_of(const rs_fetch *how, const uint8_t *base, size_t length)
{
    int32_t count = INT32_MAX;
    if (how->kind != RS_FETCH_NAME && how->count && how->count <= length && length - how->count >= 4)
        count = (int32_t)load(base + how->count, 4);
    size_t most = how->length < PATH_ROOM ? how->length : PATH_ROOM;
    return count < 0 ? 0 : (size_t)count < most ? (size_t)count : most;
}

/* `have`: what was read ahead of what the pointer leads to. */
static size_t fetch(const rs_fetch *how, const uint8_t *p, uint32_t size, struct fetched *f, uint8_t *out,
                    const struct ahead *have)
{
    uint32_t raw_length = (uint32_t)load(p + 32, 4);
    int32_t pid = (int32_t)load(p + 16, 4);
    const uint8_t *raw = p + 36, *more = raw + raw_length;
    size_t left = size - 36 - raw_length;
    int64_t n = 0;
    if (how->kind == RS_FETCH_ARGUMENTS) {
        uint64_t sp = 0, reserved = 0, copied = 0;
        if (left >= 16 && (f->abi = load(more, 8))) {
            sp = load(more + 8, 8);
            more += 16;
            left -= 16;
            if (left >= 8 && (reserved = load(more, 8)) > left)
                reserved = 0;
            if (reserved && reserved + 16 <= left)
                copied = load(more + 8 + reserved, 8);
            size_t end = 8 + (reserved ? (size_t)reserved + 8 : 0); /* PERF_SAMPLE_CGROUP comes behind */
            if (reserved + 24 <= left)
                f->cgroup = load(more + end, 8);
        }
        n = rs_fetch_arguments(pid, f->abi, sp, more + 8, copied < reserved ? copied : reserved, out, FETCH_ROOM,
                               &f->argc, &f->address, &f->complete);
        return n > 0 ? (size_t)n : 0;
    }
    if (how->front) {
        uint64_t at = pointer_at(how, raw, raw_length, how->front_offset, 8);
        if (!at || rs_read_memory(pid, at, out, how->front) < how->front)
            return 0;
    }
    bool within = how->flags & RS_FETCH_WITHIN;
    const uint8_t *base = within ? out : raw;
    size_t base_length = within ? how->front : raw_length;
    size_t want = most_of(how, base, base_length);
    f->address = pointer_at(how, base, base_length, how->offset, within ? 4 : 8);
    if (how->kind == RS_FETCH_NAME) { /* struct msghdr begins with a pointer and a length */
        uint8_t header[12];
        unsigned word = how->flags & RS_FETCH_32 ? 4 : 8;
        if (!f->address || rs_read_memory(pid, f->address, header, word + 4) < word + 4)
            return how->front;
        f->address = load(header, word);
        int32_t count = (int32_t)load(header + word, 4);
        want = count < 0 ? 0 : (size_t)count < want ? (size_t)count : want;
    }
    if (!f->address || !want)
        return how->front;
    out += how->front;
    size_t there = have ? have->length : 0;
    if (there)
        put(out, have->bytes, there);
    if (how->kind == RS_FETCH_TEXT) {
        size_t length = read_text(pid, f->address, out, want, there);
        return how->front + (is_plausible(out, length) ? length : 0);
    }
    if (there < want)
        n = rs_read_memory(pid, f->address + there, out + there, want - there);
    return how->front + there + (n > 0 ? (size_t)n : 0);
}

/* The record at `at` in a lane's kernel ring, whole (`room` is for one that wraps), and its size; 0: there is none. */
static uint32_t record_at(const struct lane *l, uint64_t at, uint64_t head, uint8_t *room, const uint8_t **record)
{
    uint64_t offset = at & (l->from_size - 1), left = head - at;
    const uint8_t *p = l->from_data + offset;
    uint32_t size = (left | at) % 8 ? 0 : (uint32_t)load(p + 6, 2);
    if (size < 32 || size % 8 || size > left)
        return 0;
    if (offset + size > l->from_size) {
        size_t first = (size_t)(l->from_size - offset);
        put(put(room, p, first), l->from_data, size - first);
        p = room;
    }
    *record = p;
    return size;
}

/* What is to be fetched for a record, or NULL for nothing. */
static const rs_fetch *fetch_of(const struct courier *c, const uint8_t *p, uint32_t size)
{
    bool sample = load(p, 4) == PERF_RECORD_SAMPLE && size >= 40;
    const struct fetches *all = sample ? map_get(&c->fetches, load(p + 8, 8)) : NULL;
    uint32_t raw_length = all ? (uint32_t)load(p + 32, 4) : 0;
    bool sound = all && raw_length <= size - 36 && raw_length < MAX_RECORD - FETCH_ROOM - 256;
    return sound ? fetch_for(all, p + 36, raw_length) : NULL;
}

/*
 * Read for several records of one process at once, which costs half as much as one by one: what a pointer among the
 * arguments leads to, its first bytes. Where it is not there, the kernel stops, and the rest is read as its turn comes.
 * How far it looked.
 */
static uint64_t look_ahead(struct courier *c, const struct lane *l, uint64_t head)
{
    struct iovec here[AHEAD], there[AHEAD];
    int32_t pid = 0;
    uint32_t size;
    const uint8_t *p;
    size_t n = 0;
    uint64_t at = l->at;
    for (; at < head && n < AHEAD && (size = record_at(l, at, head, c->record, &p)); at += size) {
        const rs_fetch *how = fetch_of(c, p, size);
        if (!how)
            continue;
        if ((how->kind != RS_FETCH_TEXT && how->kind != RS_FETCH_BLOCK) || how->front)
            break;
        size_t raw_length = (size_t)load(p + 32, 4), most = most_of(how, p + 36, raw_length);
        uint64_t address = pointer_at(how, p + 36, raw_length, how->offset, 8);
        if (!address || !most)
            continue;
        if (n && pid != (int32_t)load(p + 16, 4))
            break;
        pid = (int32_t)load(p + 16, 4);
        size_t step = first_step(address, most);
        c->ahead[n] = (struct ahead){.at = at};
        here[n] = (struct iovec){c->ahead[n].bytes, step};
        there[n++] = (struct iovec){(void *)(uintptr_t)address, step};
    }
    ssize_t got = n > 1 ? process_vm_readv(pid, here, n, there, n, 0) : 0;
    for (size_t i = c->n_ahead = 0; i < n && got >= (ssize_t)here[i].iov_len; i++) {
        c->ahead[c->n_ahead++].length = here[i].iov_len;
        got -= (ssize_t)here[i].iov_len;
    }
    return at;
}

/* Carry what a lane's kernel ring holds, and count that; false if the second ring is full. */
static bool carry(struct courier *c, struct lane *l, unsigned *carried)
{
    uint64_t head = __atomic_load_n(&l->from->data_head, __ATOMIC_ACQUIRE), seen = l->at;
    size_t next = c->n_ahead = 0; /* of what was read ahead */
    while (l->at < head) {
        if (l->at >= seen) {
            seen = look_ahead(c, l, head);
            next = 0;
        }
        const uint8_t *p;
        uint32_t size = record_at(l, l->at, head, c->record, &p);
        if (!size) {
            l->at = head; /* no record; see ring_load() */
            __atomic_store_n(&l->from->data_tail, l->at, __ATOMIC_RELEASE);
            break;
        }
        uint32_t made = size;
        const rs_fetch *how = fetch_of(c, p, size);
        if (how) {
            struct fetched f = {0};
            uint32_t raw_length = (uint32_t)load(p + 32, 4);
            uint8_t *out = put(c->made, p, 36 + raw_length);
            const struct ahead *have = next < c->n_ahead && c->ahead[next].at == l->at ? &c->ahead[next++] : NULL;
            f.length = fetch(how, p, size, &f, out + sizeof f, have);
            memcpy(out, &f, sizeof f);
            made = (36 + raw_length + (uint32_t)sizeof f + (uint32_t)f.length + 7) & ~7u;
            uint16_t length = (uint16_t)made;
            memcpy(c->made + 6, &length, 2);
            p = c->made;
        }
        uint64_t to_head = l->to->data_head;
        if (to_head - __atomic_load_n(&l->to->data_tail, __ATOMIC_ACQUIRE) + made > l->to_size)
            return false;
        uint64_t at = to_head & (l->to_size - 1);
        size_t first = l->to_size - at < made ? (size_t)(l->to_size - at) : made;
        put(l->to_data + at, p, first);
        put(l->to_data, p + first, made - first);
        /* the record is there before the head says so, and the head before the kernel's tail does */
        __atomic_store_n(&l->to->data_head, to_head + made, __ATOMIC_RELEASE);
        l->at += size;
        ++*carried;
        __atomic_store_n(&l->from->data_tail, l->at, __ATOMIC_RELEASE);
    }
    return true;
}

static void *courier_run(void *argument)
{
    struct courier *c = argument;
    struct pollfd *fds = NULL;
    size_t room = 0;
    uint64_t last = 0;
    unsigned before = 0;
    pthread_setname_np(pthread_self(), "ringside-fetch");
    pthread_mutex_lock(&c->lock);
    c->tid = (int)syscall(SYS_gettid);
    pthread_cond_signal(&c->started);
    while (!c->stop) {
        size_t n = 1;
        if (!grow((void **)&fds, &room, c->n_lanes + 1, sizeof *fds))
            break;
        fds[0] = (struct pollfd){.fd = c->wake, .events = POLLIN};
        for (size_t i = 0; i < c->n_lanes; i++)
            if (c->lanes[i].used)
                fds[n++] = (struct pollfd){.fd = c->lanes[i].fd, .events = POLLIN};
        int wait = c->full ? 1 : 1000; /* ms; a wake-up can be lost to a poll that found the ring empty */
        pthread_mutex_unlock(&c->lock);
        poll(fds, n, wait);
        uint64_t value;
        unsigned carried = 0;
        if (fds[0].revents && read(c->wake, &value, sizeof value) < 0) {
        }
        pthread_mutex_lock(&c->lock);
        c->full = false;
        for (size_t i = 0; i < c->n_lanes && !c->stop; i++)
            if (c->lanes[i].used && !carry(c, &c->lanes[i], &carried))
                c->full = true;
        c->recent += carried;
        /*
         * A wake-up for each record costs more than all the rest: where they come thick, but not many at a time by
         * themselves, wait for some. What was here may have been carried by the time that poll() tells of it.
         */
        uint64_t now = rs_clock();
        if (now - last > WINDOW) {
            before = now - last < 2 * WINDOW ? c->recent : 0;
            c->recent = 0;
            last = now;
        }
        if (carried && carried < MANY && (before >= MANY || c->recent >= MANY)) {
            pthread_mutex_unlock(&c->lock);
            nanosleep(&(struct timespec){.tv_nsec = PAUSE}, NULL);
            pthread_mutex_lock(&c->lock);
        }
    }
    pthread_mutex_unlock(&c->lock);
    free(fds);
    return NULL;
}

static void courier_wake(struct courier *c)
{
    uint64_t one = 1;
    if (write(c->wake, &one, sizeof one) < 0) {
    }
}

/* Start the thread, with real-time priority if that is allowed; its thread id, or -errno. */
int rs_courier_start(rs_engine *e, int priority)
{
    if (e->courier)
        return e->courier->tid;
    struct courier *c = calloc(1, sizeof *c);
    if (!c)
        return -ENOMEM;
    c->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->wake < 0) {
        free(c);
        return -errno;
    }
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->started, NULL);
    pthread_mutex_lock(&c->lock);
    int error = pthread_create(&c->thread, NULL, courier_run, c);
    if (error) {
        pthread_mutex_unlock(&c->lock);
        close(c->wake);
        free(c);
        return -error;
    }
    while (!c->tid)
        pthread_cond_wait(&c->started, &c->lock);
    pthread_mutex_unlock(&c->lock);
    struct sched_param p = {.sched_priority = priority};
    if (pthread_setschedparam(c->thread, SCHED_FIFO, &p))
        setpriority(PRIO_PROCESS, (id_t)c->tid, -20);
    e->courier = c;
    return c->tid;
}

static void lane_free(struct lane *l)
{
    munmap(l->from, l->from_mapped);
    free(l->to);
    *l = (struct lane){0};
}

static void courier_stop(rs_engine *e)
{
    struct courier *c = e->courier;
    if (!c)
        return;
    pthread_mutex_lock(&c->lock);
    c->stop = true;
    pthread_mutex_unlock(&c->lock);
    courier_wake(c);
    pthread_join(c->thread, NULL);
    for (size_t i = 0; i < c->n_lanes; i++)
        if (c->lanes[i].used)
            lane_free(&c->lanes[i]);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->started);
    close(c->wake);
    map_free(&c->fetches, true);
    free(c->lanes);
    free(c);
    e->courier = NULL;
}

/* Have memory read for each sample of this perf event, as the first of these says that is for it; none: no more. */
int rs_fetch_set(rs_engine *e, uint64_t id, const rs_fetch *fetches, uint32_t n_fetches)
{
    struct courier *c = e->courier;
    if (!c || n_fetches > MAX_FETCHES)
        return -EINVAL;
    for (uint32_t i = 0; i < n_fetches; i++) {
        const rs_fetch *how = &fetches[i];
        if (how->front > MAX_FRONT || how->n_when > sizeof how->when / sizeof *how->when)
            return -EINVAL;
        for (uint32_t k = 0; k < how->n_when; k++)
            if (how->when[k].size != 4 && how->when[k].size != 8)
                return -EINVAL;
    }
    struct fetches *copy = n_fetches ? malloc(sizeof *copy + n_fetches * sizeof *fetches) : NULL;
    if (n_fetches && !copy)
        return -ENOMEM;
    if (copy) {
        copy->n = n_fetches;
        memcpy(copy->how, fetches, n_fetches * sizeof *fetches);
    }
    pthread_mutex_lock(&c->lock);
    free(map_take(&c->fetches, id));
    bool ok = !copy || map_set(&c->fetches, id, copy);
    pthread_mutex_unlock(&c->lock);
    if (!ok)
        free(copy);
    return ok ? 0 : -ENOMEM;
}

/* As rs_ring_open(), of a ring whose records go through the courier. */
int rs_ring_prompt(rs_engine *e, int fd, int cpu, size_t pages)
{
    struct courier *c = e->courier;
    if (!c)
        return -EINVAL;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), length = (pages + 1) * page, i = 0;
    struct lane l = {.used = true, .fd = fd, .from_size = pages * page, .to_size = pages * page, .from_mapped = length};
    l.from = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (l.from == MAP_FAILED)
        return -errno;
    l.from_data = (uint8_t *)l.from + page;
    l.to = calloc(1, length);
    if (!l.to) {
        munmap(l.from, length);
        return -ENOMEM;
    }
    l.to_data = (uint8_t *)l.to + page;
    int ring = rs_ring_attach(e, l.to, pages, page, cpu);
    if (ring < 0) {
        lane_free(&l);
        return ring;
    }
    e->rings[ring].prompt = true;
    pthread_mutex_lock(&c->lock);
    while (i < c->n_lanes && c->lanes[i].used)
        i++;
    bool ok = grow((void **)&c->lanes, &c->n_lanes, i + 1, sizeof *c->lanes);
    if (ok)
        c->lanes[i] = l;
    pthread_mutex_unlock(&c->lock);
    if (!ok) {
        e->rings[ring] = (struct ring){0};
        lane_free(&l);
        return -ENOMEM;
    }
    courier_wake(c);
    return ring;
}

static void prompt_close(rs_engine *e, const struct ring *r)
{
    struct courier *c = e->courier;
    pthread_mutex_lock(&c->lock);
    for (size_t i = 0; i < c->n_lanes; i++)
        if (c->lanes[i].used && c->lanes[i].to == r->page)
            lane_free(&c->lanes[i]);
    pthread_mutex_unlock(&c->lock);
    courier_wake(c);
}

/* Hand on what the kernel has written, as the courier would: later records must not overtake it. */
static void courier_settle(rs_engine *e)
{
    struct courier *c = e->courier;
    bool waiting = false;
    for (size_t i = 0; c && i < c->n_lanes; i++) /* only this thread adds and removes lanes */
        if (c->lanes[i].used)
            waiting |= __atomic_load_n(&c->lanes[i].from->data_head, __ATOMIC_RELAXED) !=
                       __atomic_load_n(&c->lanes[i].from->data_tail, __ATOMIC_ACQUIRE);
    if (!waiting)
        return;
    unsigned carried = 0;
    pthread_mutex_lock(&c->lock); /* held while it carries; not while it pauses, which would be long to wait for */
    for (size_t i = 0; i < c->n_lanes; i++)
        if (c->lanes[i].used && !carry(c, &c->lanes[i], &carried))
            c->full = true;
    c->recent += carried;
    pthread_mutex_unlock(&c->lock);
}
