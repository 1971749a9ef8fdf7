/* bpf(2), as far as small programs of ours need it. Part of _perf.c. */

static long bpf(int command, union bpf_attr *attr)
{
    return syscall(SYS_bpf, command, attr, sizeof *attr);
}

static uint64_t address_of(const void *p)
{
    return (uint64_t)(uintptr_t)p;
}

/* Create a map; the descriptor, or -errno. */
int rs_bpf_map(uint32_t type, uint32_t key_size, uint32_t value_size, uint32_t entries)
{
    union bpf_attr attr = {0};
    attr.map_type = type;
    attr.key_size = key_size;
    attr.value_size = value_size;
    attr.max_entries = entries;
    long fd = bpf(BPF_MAP_CREATE, &attr);
    return fd < 0 ? -errno : (int)fd;
}

static int map_do(int command, int map, const uint8_t *key, const uint8_t *other)
{
    union bpf_attr attr = {0};
    attr.map_fd = (uint32_t)map;
    attr.key = address_of(key);
    attr.value = address_of(other); /* next_key, in the same place */
    return bpf(command, &attr) ? -errno : 0;
}

/* Set a map's element, or, without a value, delete it; of the sizes that the map was created with. */
int rs_bpf_map_set(int map, const uint8_t *key, const uint8_t *value)
{
    return map_do(value ? BPF_MAP_UPDATE_ELEM : BPF_MAP_DELETE_ELEM, map, key, value);
}

/* The key behind this one, or, with NULL, the first; -ENOENT if it was the last. */
int rs_bpf_map_next(int map, const uint8_t *key, uint8_t *next)
{
    return map_do(BPF_MAP_GET_NEXT_KEY, map, key, next);
}

/* A copy of a map's element; -ENOENT if there is none. */
int rs_bpf_map_get(int map, const uint8_t *key, uint8_t *value)
{
    return map_do(BPF_MAP_LOOKUP_ELEM, map, key, value);
}

/* Load a program for tracepoints; the descriptor, or -errno. With a log, the verifier says there what it did. */
int rs_bpf_program(const char *name, const uint8_t *code, uint32_t count, uint8_t *log, uint32_t log_size)
{
    union bpf_attr attr = {0};
    attr.prog_type = BPF_PROG_TYPE_TRACEPOINT;
    attr.insns = address_of(code);
    attr.insn_cnt = count;
    attr.license = address_of("GPL"); /* most of what is called here is for such only */
    attr.log_buf = address_of(log);
    attr.log_size = log ? log_size : 0;
    attr.log_level = log && log_size ? 1 : 0;
    strncpy(attr.prog_name, name, sizeof attr.prog_name - 1);
    long fd = bpf(BPF_PROG_LOAD, &attr);
    return fd < 0 ? -errno : (int)fd;
}

/* How often a program did not run, another one running on that CPU; -ENOTSUP where that is not counted. */
int64_t rs_bpf_missed(int program)
{
    /* struct bpf_prog_info, of which the headers here may not have all: recursion_misses came with 5.12 */
    enum { MISSES = 208, INFO = 216 };
    uint8_t info[INFO] = {0};
    union bpf_attr attr = {0};
    attr.info.bpf_fd = (uint32_t)program;
    attr.info.info_len = sizeof info;
    attr.info.info = address_of(info);
    if (bpf(BPF_OBJ_GET_INFO_BY_FD, &attr))
        return -errno;
    return attr.info.info_len < MISSES + 8 ? -ENOTSUP : (int64_t)load(info + MISSES, 8);
}

/* Have a program run for each record of a tracepoint's perf event, whether that is enabled or not. */
int rs_perf_program(int fd, int program)
{
    return ioctl(fd, PERF_EVENT_IOC_SET_BPF, program) ? -errno : 0;
}
