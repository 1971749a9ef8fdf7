/* Plans and tests: from a kernel record to an event's body, and who wants it. Part of _perf.c. */

/*
 * Copy text, replacing what is not UTF-8 by U+FFFD, since a protobuf string that is not UTF-8 makes
 * receivers refuse the whole message. One replacement for each maximal ill-formed part, as in Python's
 * errors="replace" (Unicode 15, section 3.9, "U+FFFD Substitution of Maximal Subparts").
 */
static size_t put_text(uint8_t *out, const uint8_t *s, size_t length)
{
    uint8_t *start = out;
    size_t i = 0;
    while (i < length) {
        while (i + 8 <= length && !(load(s + i, 8) & 0x8080808080808080u)) { /* nearly all text is nothing else */
            memcpy(out, s + i, 8);
            out += 8;
            i += 8;
        }
        if (i == length)
            break;
        uint8_t c = s[i];
        if (c < 0x80) {
            *out++ = c;
            i++;
            continue;
        }
        unsigned more = c >= 0xc2 && c <= 0xdf ? 1 : (c & 0xf0) == 0xe0 ? 2 : c >= 0xf0 && c <= 0xf4 ? 3 : 0;
        uint8_t low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
        uint8_t high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
        unsigned good = 0;
        while (good < more && i + 1 + good < length && s[i + 1 + good] >= low && s[i + 1 + good] <= high) {
            good++;
            low = 0x80;
            high = 0xbf;
        }
        if (more && good == more) {
            out = put(out, s + i, more + 1);
        } else {
            out = put(out, (const uint8_t *)"\xef\xbf\xbd", 3);
        }
        i += good + 1;
    }
    return (size_t)(out - start);
}

/* Linear in practice: on a mismatch only the last '*' is tried again (lib/glob.c has the same rules). */
int rs_glob(const uint8_t *pattern, size_t pattern_length, const uint8_t *text, size_t length)
{
    size_t p = 0, t = 0, star = SIZE_MAX, star_text = 0;
    while (t < length) {
        bool ok = false;
        size_t next = p;
        if (p < pattern_length) {
            uint8_t c = pattern[p];
            if (c == '*') {
                star = ++p;
                star_text = t;
                continue;
            }
            next = p + 1;
            if (c == '?') {
                ok = true;
            } else if (c == '[') {
                size_t q = p + 1;
                bool inverted = q < pattern_length && pattern[q] == '!', inside = false, closed = false;
                q += inverted;
                for (size_t first = q; q < pattern_length; q++) {
                    if (pattern[q] == ']' && q > first) {
                        closed = true;
                        break;
                    }
                    uint8_t from = pattern[q], to = from;
                    if (q + 2 < pattern_length && pattern[q + 1] == '-' && pattern[q + 2] != ']') {
                        to = pattern[q + 2];
                        q += 2;
                    }
                    inside |= text[t] >= from && text[t] <= to;
                }
                if (closed) {
                    ok = inside != inverted;
                    next = q + 1;
                } else {
                    ok = text[t] == '[';
                }
            } else if (c == '\\' && p + 1 < pattern_length) {
                ok = pattern[p + 1] == text[t];
                next = p + 2;
            } else {
                ok = c == text[t];
            }
        }
        if (ok) {
            p = next;
            t++;
        } else if (star != SIZE_MAX) {
            p = star;
            t = ++star_text;
        } else {
            return 0;
        }
    }
    while (p < pattern_length && pattern[p] == '*')
        p++;
    return p == pattern_length;
}

struct text {
    const uint8_t *at;
    size_t length;
};

static struct text part(const uint8_t *base, size_t base_length, size_t offset, size_t length)
{
    if (offset >= base_length)
        return (struct text){base, 0};
    return (struct text){base + offset, length < base_length - offset ? length : base_length - offset};
}

static struct text to_nul(struct text t)
{
    return (struct text){t.at, t.length ? strnlen((const char *)t.at, t.length) : 0};
}

/* The text or bytes behind a __data_loc word: offset in its low half, length in its high half. */
static struct text data_loc(const uint8_t *raw, size_t raw_length, size_t offset)
{
    if (offset > raw_length || raw_length - offset < 4)
        return (struct text){raw, 0};
    uint32_t word = (uint32_t)load(raw + offset, 4);
    return part(raw, raw_length, word & 0xffff, word >> 16);
}

int rs_tests_run(const rs_test *tests, uint32_t n_tests, const uint8_t *pool, size_t pool_length, const uint8_t *raw,
                 size_t raw_length, const uint8_t *side, size_t side_length)
{
    int32_t at = 0;
    for (uint32_t steps = 0; at >= 0 && (uint32_t)at < n_tests && steps < n_tests; steps++) {
        const rs_test *t = &tests[at];
        const uint8_t *base = t->flags & RS_SIDE ? side : raw;
        size_t base_length = t->flags & RS_SIDE ? side_length : raw_length;
        bool yes = false;
        if (t->kind == RS_TEST_INT) {
            if (t->offset <= base_length && t->size <= base_length - t->offset) {
                uint64_t v = load(base + t->offset, t->size), w = t->value;
                if (t->flags & RS_SWAP)
                    v = swap(v, t->size);
                if (t->flags & RS_SIGNED)
                    v = sign_extend(v, t->size);
                yes = v & w; /* RS_BITS */
                if (t->flags & RS_SIGNED) { /* keeps the order, as unsigned numbers */
                    v ^= 1ull << 63;
                    w ^= 1ull << 63;
                }
                switch (t->cmp) {
                case RS_EQ: yes = v == w; break;
                case RS_NE: yes = v != w; break;
                case RS_LT: yes = v < w; break;
                case RS_LE: yes = v <= w; break;
                case RS_GT: yes = v > w; break;
                case RS_GE: yes = v >= w; break;
                }
            }
        } else if (t->text <= pool_length && t->length <= pool_length - t->text) {
            struct text have = t->flags & RS_DATA_LOC ? data_loc(base, base_length, t->offset)
                                                      : part(base, base_length, t->offset, t->size);
            const uint8_t *want = pool + t->text;
            size_t n = t->length;
            uint8_t named[UNIX_PATH];
            if (t->flags & RS_ABSTRACT && have.length && have.length <= sizeof named && !*have.at) {
                memcpy(named, have.at, have.length);
                named[0] = '@';
                have.at = named;
            }
            have = to_nul(have);
            if (t->cmp == RS_GLOB)
                yes = rs_glob(want, n, have.at, have.length);
            else
                yes = (n == have.length && (!n || !memcmp(have.at, want, n))) == (t->cmp == RS_EQ);
        }
        at = yes ? t->yes : t->no;
    }
    return at == RS_ACCEPT;
}

/* set_data_loc(), kernel/trace/trace_probe_kernel.h */
#define FAULT "(fault)"

static struct text text_of(const rs_op *op, const uint8_t *base, size_t base_length)
{
    struct text t = op->op == RS_OP_STRING || op->op == RS_OP_BYTES
                        ? data_loc(base, base_length, op->offset)
                        : part(base, base_length, op->offset, op->length);
    if (op->op == RS_OP_STRING || (op->op == RS_OP_CHARS && !(op->flags & RS_ABSTRACT && t.length && !*t.at)))
        t = to_nul(t);
    return t;
}

/*
 * What most plans are full of: an integer that is written as it lies there, unless it is zero. Eight bytes
 * are read and masked (`value`), whatever its size. Only where C has looked at the plan, not in the API.
 */
enum { OP_PLAIN = 255 };

static size_t plan_prepare(rs_op *ops, uint32_t n_ops)
{
    size_t extent = 0;
    for (uint32_t i = 0; i < n_ops; i++) {
        bool whole = ops[i].size == 8 || (ops[i].op == RS_OP_UINT && !(ops[i].flags & RS_SIGNED));
        whole = whole && (ops[i].op == RS_OP_UINT || ops[i].op == RS_OP_INT);
        if (whole && !(ops[i].flags & ~RS_SIGNED) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) {
            ops[i].op = OP_PLAIN;
            ops[i].value = UINT64_MAX >> (64 - 8 * ops[i].size);
            ops[i].flags = 0;
            extent = ops[i].offset + 8u > extent ? ops[i].offset + 8u : extent;
        }
    }
    return extent;
}

/* Length and text; `abstract`: a leading NUL is written as '@'. */
static uint8_t *put_string(uint8_t *out, const uint8_t *s, size_t length, bool abstract)
{
    uint8_t *text = out + varint_length(length);
    size_t n = put_text(text, s, length);
    if (abstract && n && !*text)
        *text = '@';
    if (varint_length(n) != varint_length(length))
        memmove(out + varint_length(n), text, n);
    return put_length(out, n) + n;
}

/* Run a plan over a record; the length of what it wrote, or a negative errno. */
static int64_t plan_run(const rs_op *ops, uint32_t n_ops, const uint8_t *pool, size_t pool_length,
                        const uint8_t *raw, size_t raw_length, const uint8_t *side, size_t side_length, uint8_t *out,
                        size_t room, bool whole)
{
    uint8_t *start = out, *end = out + room, *opened[MAX_DEPTH];
    unsigned depth = 0;
    size_t reserve = 32 * (size_t)n_ops + pool_length + SLACK; /* all but texts */

    if (room < reserve)
        return -ENOSPC;
    for (uint32_t i = 0; i < n_ops; i++) {
        const rs_op *op = &ops[i];
        if (op->op == OP_PLAIN && whole) {
            uint64_t v;
            memcpy(&v, raw + op->offset, 8);
            v &= op->value;
            if (v) {
                memcpy(out, op->tag, sizeof op->tag);
                out = put_varint(out + op->tag_length, v);
            }
            continue;
        }
        const uint8_t *base = op->flags & RS_SIDE ? side : raw;
        size_t base_length = op->flags & RS_SIDE ? side_length : raw_length;
        uint64_t v = 0;

        switch (op->op) {
        case OP_PLAIN: /* at the end of a record, where eight bytes can't be read */
        case RS_OP_UINT:
        case RS_OP_INT:
        case RS_OP_ZIGZAG:
        case RS_OP_BOOL:
        case RS_OP_UNLESS:
            if (op->offset > base_length || op->size > base_length - op->offset) {
                if (op->op == RS_OP_UNLESS)
                    i = op->jump - 1;
                continue; /* the record is shorter than its format said: absent, not zero */
            }
            v = load(base + op->offset, op->size);
            if (op->flags & RS_SWAP)
                v = swap(v, op->size);
            if (op->op == RS_OP_INT || op->flags & RS_SIGNED)
                v = sign_extend(v, op->size);
            if (op->op == RS_OP_UNLESS) {
                if (op->length ? !(v & op->length) : v != op->value)
                    i = op->jump - 1;
                continue;
            }
            if (op->op == RS_OP_BOOL)
                v = v != 0;
            if (!v && !(op->flags & RS_KEEP_ZERO))
                continue;
            if (op->op == RS_OP_ZIGZAG)
                v = v << 1 ^ (uint64_t)((int64_t)v >> 63);
            memcpy(out, op->tag, sizeof op->tag);
            out = put_varint(out + op->tag_length, v);
            continue;
        case RS_OP_CONST:
            if (op->text > pool_length || op->length > pool_length - op->text)
                return -EINVAL;
            out = put(out, pool + op->text, op->length);
            continue;
        case RS_OP_RAW:
            if (op->length > 16 || op->offset > base_length || op->length > base_length - op->offset)
                continue;
            for (uint32_t k = 0; k < op->length; k++)
                v |= base[op->offset + k];
            if (!v && !(op->flags & RS_KEEP_ZERO))
                continue;
            out = put(put(out, op->tag, op->tag_length), base + op->offset, op->length);
            continue;
        case RS_OP_CHARS:
        case RS_OP_STRING:
        case RS_OP_BYTES:
        case RS_OP_BLOCK: {
            struct text t = text_of(op, base, base_length);
            if (!t.length && !(op->flags & RS_KEEP_ZERO))
                continue;
            if (op->flags & RS_FAULTY && t.length == sizeof FAULT - 1 && !memcmp(t.at, FAULT, t.length))
                continue;
            if ((size_t)(end - out) < 3 * t.length + reserve)
                return -ENOSPC;
            out = put(out, op->tag, op->tag_length);
            if (op->op == RS_OP_BYTES || op->op == RS_OP_BLOCK) {
                out = put(put_length(out, t.length), t.at, t.length);
                continue;
            }
            out = put_string(out, t.at, t.length, op->flags & RS_ABSTRACT);
            continue;
        }
        case RS_OP_TEXTS:
            for (size_t at = 0, n; at < side_length; at += n + 1) {
                n = strnlen((const char *)side + at, side_length - at);
                if (n == side_length - at)
                    break; /* a part of one */
                if ((size_t)(end - out) < 3 * n + reserve)
                    return -ENOSPC;
                out = put_string(put(out, op->tag, op->tag_length), side + at, n, false);
            }
            continue;
        case RS_OP_BEGIN:
            if (depth == MAX_DEPTH)
                return -EINVAL;
            out = put(out, op->tag, op->tag_length);
            opened[depth++] = out++;
            continue;
        case RS_OP_END: {
            if (!depth)
                return -EINVAL;
            uint8_t *at = opened[--depth];
            size_t n = (size_t)(out - at - 1);
            unsigned more = varint_length(n) - 1;
            if (more) {
                memmove(at + 1 + more, at + 1, n);
                out += more;
            }
            put_length(at, n);
            continue;
        }
        case RS_OP_FETCHED:
            if (side_length <= op->offset)
                i = op->jump - 1;
            continue;
        default:
            return -EINVAL;
        }
    }
    return depth ? -EINVAL : out - start;
}

int64_t rs_plan_run(const rs_op *ops, uint32_t n_ops, const uint8_t *pool, size_t pool_length, const uint8_t *raw,
                    size_t raw_length, const uint8_t *side, size_t side_length, uint8_t *out, size_t room)
{
    return plan_run(ops, n_ops, pool, pool_length, raw, raw_length, side, side_length, out, room, false);
}

/* How many fields 1 (events) an encoded GetEventsResponse has, -EINVAL if it is none. */
int64_t rs_count_events(const uint8_t *response, size_t length)
{
    int64_t count = 0;
    for (size_t at = 0; at < length; count++) {
        uint64_t size = 0;
        uint8_t tag = response[at++];
        for (unsigned shift = 0; at < length && shift < 63; shift += 7) {
            size |= (uint64_t)(response[at] & 0x7f) << shift;
            if (!(response[at++] & 0x80))
                break;
        }
        if ((tag & 7) != 2 || size > length - at)
            return -EINVAL;
        at += size;
        count -= tag >> 3 != 1;
    }
    return count;
}
