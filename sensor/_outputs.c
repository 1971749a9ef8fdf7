/* Outputs: who gets an event, encoding it, and keeping what waits for its container. Part of _perf.c. */

int rs_output_set(rs_engine *e, uint32_t output, size_t flush_at, uint64_t since, uint64_t until, uint64_t limit,
                  uint64_t interval, uint32_t include_self)
{
    if (output >= 1u << 20 || !flush_at)
        return -EINVAL;
    if (!grow((void **)&e->outputs, &e->n_outputs, output + 1, sizeof *e->outputs) ||
        !grow((void **)&e->wanting, &e->wanting_room, e->n_outputs, sizeof *e->wanting) ||
        !grow((void **)&e->ready, &e->ready_room, e->n_outputs, sizeof *e->ready))
        return -ENOMEM;
    struct output *o = &e->outputs[output];
    if (!o->used)
        *o = (struct output){.used = true};
    o->flush_at = flush_at;
    o->since = since;
    o->until = until ? until : UINT64_MAX;
    o->left = limit ? limit : UINT64_MAX;
    o->interval = interval;
    o->include_self = include_self;
    o->plain = !since && !until && !limit && !interval && !o->containers;
    return 0;
}

int rs_output_containers(rs_engine *e, uint32_t output, const uint8_t *bits, size_t length)
{
    if (output >= e->n_outputs || !e->outputs[output].used)
        return -EINVAL;
    uint8_t *copy = malloc(length ? length : 1);
    if (!copy)
        return -ENOMEM;
    put(copy, bits, length);
    free(e->outputs[output].containers);
    e->outputs[output].containers = copy;
    e->outputs[output].container_bytes = length;
    e->outputs[output].plain = false;
    return 0;
}

/* Take an output off the list of those to flush, on which it stands once at most. */
static void not_ready(rs_engine *e, uint32_t output)
{
    if (!e->outputs[output].ready)
        return;
    size_t kept = 0;
    for (size_t i = 0; i < e->n_ready; i++)
        if (e->ready[i] != output)
            e->ready[kept++] = e->ready[i];
    e->n_ready = kept;
    e->outputs[output].ready = false;
}

/* Strike an output from what is held: its number may be given to another before that is let go. */
static void strike_held(rs_engine *e, uint32_t output)
{
    for (size_t at = 0; at < e->hold_length;) {
        struct held h;
        memcpy(&h, e->hold + at, sizeof h);
        for (uint32_t i = 0; i < h.n_outputs; i++) {
            uint8_t *number = e->hold + at + sizeof h + 4 * (size_t)i;
            if (load(number, 4) == output)
                memcpy(number, &(uint32_t){UINT32_MAX}, 4);
        }
        at += h.total;
    }
}

void rs_output_clear(rs_engine *e, uint32_t output)
{
    if (output >= e->n_outputs)
        return;
    not_ready(e, output);
    strike_held(e, output);
    free(e->outputs[output].data);
    free(e->outputs[output].containers);
    e->outputs[output] = (struct output){0};
}

/* The first output behind this one (-1: of all) that has gathered something, or -1. */
int64_t rs_output_next(const rs_engine *e, int64_t after)
{
    for (size_t i = (size_t)(after + 1); i < e->n_outputs; i++)
        if (e->outputs[i].events)
            return (int64_t)i;
    return -1;
}

void rs_output_batch(const rs_engine *e, uint32_t output, rs_batch *batch)
{
    *batch = (rs_batch){0};
    if (output >= e->n_outputs)
        return;
    const struct output *o = &e->outputs[output];
    *batch = (rs_batch){o->data, o->length, o->events, o->first_time, o->last_time};
}

void rs_output_reset(rs_engine *e, uint32_t output)
{
    if (output >= e->n_outputs)
        return;
    e->outputs[output].length = 0;
    e->outputs[output].events = 0;
    not_ready(e, output);
}

uint64_t rs_output_left(const rs_engine *e, uint32_t output)
{
    return output < e->n_outputs ? e->outputs[output].left : 0;
}

/* Whether an output lets this container's events pass. */
static inline bool takes(const struct output *o, uint32_t container)
{
    return !o->containers || (container / 8 < o->container_bytes && o->containers[container / 8] >> (container % 8) & 1);
}

static inline bool wants(const struct output *o, uint64_t time, bool self, uint32_t container)
{
    if (o->plain && !self)
        return true;
    if (!o->used || time < o->since || time >= o->until || !o->left || (self && !o->include_self))
        return false;
    if (!takes(o, container))
        return false;
    return !o->interval || time >= o->next_time;
}

/* Encode one event, once, and append it to each of the outputs; 0 if memory is short. */
WIDE
static uint64_t deliver(rs_engine *e, const uint32_t *outputs, size_t n_outputs, uint64_t time, int cpu, int32_t tid,
                        struct process *p, const struct container *c, bool with_lineage, const uint8_t *body,
                        size_t length)
{
    static struct process nobody;
    if (!p)
        p = &nobody;
    struct text line = with_lineage && p != &nobody ? lineage_of(e, p) : (struct text){NULL, 0};
    size_t event = e->id_length + p->head + c->head + varint_length(e->sequence) + e->tags.time.length +
                   varint_length(time) + line.length + length + c->tail;
    if (tid > 0)
        event += e->tags.tid.length + varint_length((uint64_t)tid);
    if (cpu > 0)
        event += e->tags.cpu.length + varint_length((uint64_t)cpu);
    size_t outer = e->publish_length + varint_length(event) + event;
    size_t total = 1 + varint_length(outer) + outer;
    const uint8_t *made = NULL;

    for (size_t i = 0; i < n_outputs; i++) {
        struct output *o = &e->outputs[outputs[i]];
        if (o->length + total + ROOM_BEHIND > o->room) {
            size_t room = o->room ? 2 * o->room : o->flush_at + 4096;
            while (room < o->length + total + ROOM_BEHIND)
                room *= 2;
            uint8_t *data = realloc(o->data, room);
            if (!data)
                continue;
            o->data = data;
            o->room = room;
        }
        uint8_t *out = o->data + o->length;
        if (made) {
            put_fast(out, made, total);
        } else {
            made = out;
            *out++ = e->tags.events.bytes[0];
            out = put_varint(out, outer);
            out = put_fast(out, e->publish, e->publish_length);
            out = put_varint(out, event);
            out = put_fast(out, e->id, e->id_length);
            out = put_fast(out, p->bytes, p->head);
            out = put_fast(out, c->bytes, c->head);
            out = put_varint(out, e->sequence);
            out = put_varint(put_tag(out, &e->tags.time), time);
            out = put(out, line.at, line.length);
            out = put_fast(out, body, length);
            out = put_fast(out, c->bytes + c->head, c->tail);
            if (tid > 0)
                out = put_varint(put_tag(out, &e->tags.tid), (uint64_t)tid);
            if (cpu > 0)
                put_varint(put_tag(out, &e->tags.cpu), (uint64_t)cpu);
        }
        if (!o->events++)
            o->first_time = time;
        o->last_time = time;
        o->length += total;
        if (o->interval)
            o->next_time = time + o->interval;
        if (o->left != UINT64_MAX)
            o->left--;
        if (!o->ready && (o->length >= o->flush_at || !o->left)) {
            o->ready = true;
            e->ready[e->n_ready++] = outputs[i];
        }
        e->counters.delivered++;
    }
    if (!made)
        return 0;
    e->counters.events++;
    uint64_t sequence = e->sequence;
    next_sequence(e);
    return sequence;
}

/* Keep what can't go out yet; false if there is no room to. */
static bool hold(rs_engine *e, struct held h, const uint32_t *outputs, const uint8_t *bytes, const uint8_t *side)
{
    size_t total = (sizeof h + h.n_outputs * sizeof *outputs + h.length + h.side_length + 7) & ~(size_t)7;
    if (!e->hold)
        e->hold = malloc(HOLD_ROOM);
    if (!e->hold || e->hold_length + total > HOLD_ROOM) {
        e->counters.hold_full++;
        return false;
    }
    h.total = (uint32_t)total;
    uint8_t *out = put(e->hold + e->hold_length, (const uint8_t *)&h, sizeof h);
    out = put(put(out, (const uint8_t *)outputs, h.n_outputs * sizeof *outputs), bytes, h.length);
    put(out, side, h.side_length);
    e->hold_length += total;
    e->counters.held++;
    return true;
}

/* Fill `wanting` with those of the outputs that want such an event, each once; their number. */
static size_t choose(rs_engine *e, const uint32_t *outputs, size_t n_outputs, uint64_t time, bool self,
                     uint32_t container)
{
    size_t n = 0;
    for (size_t i = 0; i < n_outputs; i++) {
        size_t k = 0;
        while (k < n && e->wanting[k] != outputs[i])
            k++;
        if (k == n && outputs[i] < e->n_outputs && wants(&e->outputs[outputs[i]], time, self, container))
            e->wanting[n++] = outputs[i];
    }
    return n;
}

/* Hand an event with a ready body (the field of Event's oneof, tag and all, and what comes before) to those
   outputs that want it. `container` counts for an event of no process. Returns its sequence number, or 0 if
   nobody took it, or if it waits for its container. */
uint64_t rs_emit(rs_engine *e, const uint32_t *outputs, uint32_t n_outputs, uint64_t time, int cpu, int32_t pid,
                 int32_t tid, uint32_t container, const uint8_t *body, size_t length)
{
    struct process *p = pid > 0 ? process_of(e, pid) : NULL;
    publish_now(e);
    if (p && container_of(e, p->container)->flags & RS_HOLD && length <= MAX_RECORD && n_outputs <= e->n_outputs) {
        struct held h = {0, (uint32_t)length, 0, p->container, UINT32_MAX, time, cpu, pid, tid, n_outputs};
        if (hold(e, h, outputs, body, NULL))
            return 0;
    }
    size_t n = choose(e, outputs, n_outputs, time, pid == e->self_pid, p ? p->container : container);
    if (!n)
        return 0;
    uint8_t *copy = length > e->body_room ? malloc(length + SLACK) : e->body; /* deliver() reads SLACK more */
    if (!copy)
        return 0;
    put(copy, body, length);
    uint64_t sequence = deliver(e, e->wanting, n, time, cpu, tid, p, container_of(e, p ? p->container : 0), false,
                                copy, length);
    if (copy != e->body)
        free(copy);
    return sequence;
}
