/* Sources: what the kernel's events feed, and the perf events that feed them. Part of _perf.c. */

static bool copy_array(void **to, const void *from, size_t bytes)
{
    free(*to);
    *to = malloc(bytes ? bytes : 1);
    if (*to && bytes)
        memcpy(*to, from, bytes);
    return *to;
}

int rs_source_set(rs_engine *e, uint32_t source, uint32_t flags, const rs_op *ops, uint32_t n_ops,
                  const uint8_t *pool, size_t pool_length, uint32_t key_offset, uint32_t key_size)
{
    if (source >= 1u << 20 || n_ops > MAX_OPS || pool_length > MAX_RECORD)
        return -EINVAL;
    for (uint32_t i = 0; i < n_ops; i++) {
        bool jumps = ops[i].op == RS_OP_UNLESS || ops[i].op == RS_OP_FETCHED;
        if ((jumps && (ops[i].jump <= i || ops[i].jump > n_ops)) || ops[i].tag_length > sizeof ops[i].tag)
            return -EINVAL; /* only forward, so that every plan ends */
        bool sized = ops[i].op <= RS_OP_BOOL || ops[i].op == RS_OP_UNLESS;
        if (ops[i].op != RS_OP_CONST && sized && ops[i].size != 1 && ops[i].size != 2 && ops[i].size != 4 &&
            ops[i].size != 8)
            return -EINVAL;
    }
    if (!grow((void **)&e->sources, &e->n_sources, source + 1, sizeof *e->sources))
        return -ENOMEM;
    struct source *s = &e->sources[source];
    source_free(s);
    s->flags = flags;
    s->key_offset = key_offset;
    s->key_size = key_size;
    s->any = s->others = NO_ENTRY;
    if (!copy_array((void **)&s->ops, ops, n_ops * sizeof *ops) ||
        !copy_array((void **)&s->pool, pool, pool_length))
        return -ENOMEM;
    s->extent = plan_prepare(s->ops, n_ops);
    s->n_ops = n_ops;
    s->pool_length = pool_length;
    s->used = true;
    return 0;
}

int rs_source_route(rs_engine *e, uint32_t source, const rs_entry *entries, uint32_t n_entries,
                    const rs_test *tests, uint32_t n_tests, const uint8_t *pool, size_t pool_length)
{
    if (source >= e->n_sources || !e->sources[source].used)
        return -EINVAL;
    for (uint32_t i = 0; i < n_entries; i++)
        if (entries[i].output >= e->n_outputs || entries[i].first_test >= (int32_t)n_tests)
            return -EINVAL;
    for (uint32_t i = 0; i < n_tests; i++)
        if (tests[i].kind == RS_TEST_INT && tests[i].size != 1 && tests[i].size != 2 && tests[i].size != 4 &&
            tests[i].size != 8)
            return -EINVAL;
    struct source *s = &e->sources[source];
    s->n_entries = s->n_tests = 0;
    s->any = s->others = NO_ENTRY;
    free(s->by_key);
    s->by_key = NULL;
    if (!copy_array((void **)&s->entries, entries, n_entries * sizeof *entries) ||
        !copy_array((void **)&s->tests, tests, n_tests * sizeof *tests) ||
        !copy_array((void **)&s->test_pool, pool, pool_length))
        return -ENOMEM;
    s->n_entries = n_entries;
    s->n_tests = n_tests;
    s->test_pool_length = pool_length;
    for (uint32_t i = n_entries; i-- > 0;) {
        rs_entry *n = &s->entries[i];
        int32_t *list = n->any ? &s->any : &s->others;
        if (!n->any && n->key >= 0 && n->key < KEYS) {
            if (!s->by_key) {
                s->by_key = malloc(KEYS * sizeof *s->by_key);
                if (!s->by_key)
                    return -ENOMEM;
                for (int k = 0; k < KEYS; k++)
                    s->by_key[k] = NO_ENTRY;
            }
            list = &s->by_key[n->key];
        }
        n->next = *list;
        *list = (int32_t)i;
    }
    return 0;
}

/*
 * Take a part of the record itself for the caller's memory: `length` bytes at `offset`, or as many as the
 * integer at `count_offset` (0: no such) says, if that is less. For probes that fetch a block of memory.
 */
int rs_source_view(rs_engine *e, uint32_t source, uint32_t offset, uint32_t length, uint32_t count_offset)
{
    if (source >= e->n_sources || !e->sources[source].used)
        return -EINVAL;
    e->sources[source].view = offset;
    e->sources[source].view_length = length;
    e->sources[source].view_count = count_offset;
    return 0;
}

/* How many of its records were of containers that no output wants, ever. */
uint64_t rs_source_elsewhere(const rs_engine *e, uint32_t source)
{
    return source < e->n_sources ? e->sources[source].elsewhere : 0;
}

int rs_event_set(rs_engine *e, uint64_t id, uint32_t source, uint32_t order, uint64_t from, uint64_t until)
{
    if (source >= e->n_sources || !e->sources[source].used)
        return -EINVAL;
    struct event *v = map_get(&e->events, id);
    uint64_t generation = v ? v->generation : ++e->generations, end = v ? v->end : UINT64_MAX;
    if (!v) {
        v = malloc(sizeof *v);
        if (!v || !map_set(&e->events, id, v)) {
            free(v);
            return -ENOMEM;
        }
    }
    *v = (struct event){source, order, from, until ? until : UINT64_MAX, end, generation};
    return 0;
}

/* From then on it writes no records, though some may still be in the ring. */
void rs_event_end(rs_engine *e, uint64_t id, uint64_t time)
{
    struct event *v = map_get(&e->events, id);
    if (v)
        v->end = time;
}

void rs_event_clear(rs_engine *e, uint64_t id)
{
    free(map_take(&e->events, id));
    e->cached_event = NULL;
}
