/* Numbers, varints, growing arrays and a map: what the rest of the engine is made of. */
#ifndef RINGSIDE_BYTES_H
#define RINGSIDE_BYTES_H

static inline uint64_t load(const uint8_t *p, unsigned size)
{
    switch (size) {
    case 1:
        return *p;
    case 2: {
        uint16_t v;
        memcpy(&v, p, 2);
        return v;
    }
    case 4: {
        uint32_t v;
        memcpy(&v, p, 4);
        return v;
    }
    default: {
        uint64_t v;
        memcpy(&v, p, 8);
        return v;
    }
    }
}

static inline uint64_t sign_extend(uint64_t v, unsigned size)
{
    unsigned shift = 64 - 8 * size;
    return (uint64_t)((int64_t)(v << shift) >> shift);
}

static inline uint64_t swap(uint64_t v, unsigned size)
{
    return __builtin_bswap64(v) >> (64 - 8 * size);
}

static inline unsigned varint_length(uint64_t v)
{
    return ((unsigned)(63 ^ __builtin_clzll(v | 1)) * 9 + 73) / 64; /* bits over seven, rounded up */
}

/*
 * A base-128 varint. The seven-bit groups of up to eight bytes are spread over as many bytes at once;
 * eight are written, however many count, so there must be room for ten.
 */
static inline uint8_t *put_varint(uint8_t *out, uint64_t v)
{
    if (v < 0x80) {
        *out = (uint8_t)v;
        return out + 1;
    }
    if (v < 1ull << 56) {
        unsigned n = varint_length(v);
        v = (v & 0x000000000fffffffu) | (v & 0x00fffffff0000000u) << 4;
        v = (v & 0x00003fff00003fffu) | (v & 0x0fffc0000fffc000u) << 2;
        v = (v & 0x007f007f007f007fu) | (v & 0x3f803f803f803f80u) << 1;
        v |= 0x8080808080808080u & ((1ull << 8 * (n - 1)) - 1);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        v = __builtin_bswap64(v);
#endif
        memcpy(out, &v, 8);
        return out + n;
    }
    while (v >= 0x80) {
        *out++ = (uint8_t)(v | 0x80);
        v >>= 7;
    }
    *out++ = (uint8_t)v;
    return out;
}

/* The same where what comes behind is there already: not a byte too much. */
static inline uint8_t *put_length(uint8_t *out, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *out++ = (uint8_t)(v | 0x80);
    *out++ = (uint8_t)v;
    return out;
}

static inline uint8_t *put(uint8_t *out, const uint8_t *from, size_t length)
{
    if (length)
        memcpy(out, from, length);
    return out + length;
}

/* The same in steps of SLACK bytes, which spares the call: both sides have that much more room. */
enum { SLACK = 32 };

/* A function that is full of these: one move a step where the CPU has 32 bytes wide registers, chosen at load time. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

typedef uint8_t step __attribute__((vector_size(SLACK), aligned(1), may_alias));

static inline uint8_t *put_fast(uint8_t *out, const uint8_t *from, size_t length)
{
    uint8_t *end = out + length;
    for (uint8_t *at = out; at < end; at += SLACK, from += SLACK)
        *(step *)at = *(const step *)from;
    return end;
}

static inline uint8_t *put_tag(uint8_t *out, const rs_tag *tag)
{
    memcpy(out, tag->bytes, sizeof tag->bytes); /* all of it: a fixed size is one move */
    return out + tag->length;
}

static bool grow(void **array, size_t *room, size_t need, size_t item)
{
    if (need <= *room)
        return true;
    size_t more = *room ? *room : 16;
    while (more < need)
        more *= 2;
    void *p = realloc(*array, more * item);
    if (!p)
        return false;
    memset((char *)p + *room * item, 0, (more - *room) * item);
    *array = p;
    *room = more;
    return true;
}

uint64_t rs_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_RAW, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- a map from numbers to pointers: open addressing, linear probing ---------------------------- */

struct slot {
    uint64_t key; /* + 1; 0 is free */
    void *value;
};

struct map {
    struct slot *slots;
    size_t room, used;
};

/* Neighbours, as pids often are, stay together: eight of them share two cache lines. */
static inline size_t map_slot(const struct map *m, uint64_t key)
{
    return (size_t)((((key >> 3) * 0x9e3779b97f4a7c15u) >> 32 << 3) | (key & 7)) & (m->room - 1);
}

static inline void *map_get(const struct map *m, uint64_t key)
{
    if (!m->room)
        return NULL;
    for (size_t i = map_slot(m, key);; i = (i + 1) & (m->room - 1)) {
        if (m->slots[i].key == key + 1)
            return m->slots[i].value;
        if (!m->slots[i].key)
            return NULL;
    }
}

static inline void map_prefetch(const struct map *m, uint64_t key)
{
    if (m->room)
        __builtin_prefetch(&m->slots[map_slot(m, key)]);
}

static bool map_set(struct map *m, uint64_t key, void *value)
{
    if (2 * (m->used + 1) > m->room) {
        struct map bigger = {.room = m->room ? 2 * m->room : 64};
        bigger.slots = calloc(bigger.room, sizeof *bigger.slots);
        if (!bigger.slots)
            return false;
        for (size_t i = 0; i < m->room; i++)
            if (m->slots[i].key)
                map_set(&bigger, m->slots[i].key - 1, m->slots[i].value);
        free(m->slots);
        *m = bigger;
    }
    size_t i = map_slot(m, key);
    while (m->slots[i].key && m->slots[i].key != key + 1)
        i = (i + 1) & (m->room - 1);
    m->used += !m->slots[i].key;
    m->slots[i] = (struct slot){key + 1, value};
    return true;
}

static void *map_take(struct map *m, uint64_t key)
{
    if (!m->room)
        return NULL;
    size_t i = map_slot(m, key), mask = m->room - 1;
    while (m->slots[i].key != key + 1) {
        if (!m->slots[i].key)
            return NULL;
        i = (i + 1) & mask;
    }
    void *value = m->slots[i].value;
    m->used--;
    for (size_t j = (i + 1) & mask; m->slots[j].key; j = (j + 1) & mask) {
        size_t home = map_slot(m, m->slots[j].key - 1);
        if (((j - home) & mask) >= ((j - i) & mask)) {
            m->slots[i] = m->slots[j];
            i = j;
        }
    }
    m->slots[i] = (struct slot){0};
    return value;
}

static void map_free(struct map *m, bool values)
{
    for (size_t i = 0; values && i < m->room; i++)
        if (m->slots[i].key)
            free(m->slots[i].value);
    free(m->slots);
    *m = (struct map){0};
}

#endif
