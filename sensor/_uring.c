/* io_uring(7), as far as one request of ours needs it. Part of _perf.c. */

struct uring {
    int fd;
    uint8_t *rings, *entries;
    size_t rings_length, entries_length;
};

static int uring_open(struct uring *u, struct io_uring_params *params)
{
    u->fd = (int)syscall(SYS_io_uring_setup, 1, params);
    if (u->fd < 0)
        return -errno;
    if (!(params->features & IORING_FEAT_SINGLE_MMAP))
        return -ENOTSUP; /* before 5.4 */
    size_t submissions = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
    size_t completions = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    u->rings_length = submissions > completions ? submissions : completions;
    u->entries_length = params->sq_entries * sizeof(struct io_uring_sqe);
    int way = PROT_READ | PROT_WRITE, how = MAP_SHARED | MAP_POPULATE;
    u->rings = mmap(NULL, u->rings_length, way, how, u->fd, IORING_OFF_SQ_RING);
    if (u->rings == MAP_FAILED)
        return -errno;
    u->entries = mmap(NULL, u->entries_length, way, how, u->fd, IORING_OFF_SQES);
    return u->entries == MAP_FAILED ? -errno : 0;
}

/* Make one request, a struct io_uring_sqe, and wait for its end, whatever that is. 0, or -errno if no request could
 * be made. */
int rs_uring_request(const uint8_t *request)
{
    struct uring u = {.fd = -1, .rings = MAP_FAILED, .entries = MAP_FAILED};
    struct io_uring_params params = {0};
    int result = uring_open(&u, &params);
    if (!result) {
        memcpy(u.entries, request, sizeof(struct io_uring_sqe));
        *(uint32_t *)(u.rings + params.sq_off.array) = 0;
        __atomic_store_n((uint32_t *)(u.rings + params.sq_off.tail), 1, __ATOMIC_RELEASE);
        if (syscall(SYS_io_uring_enter, u.fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
            result = -errno;
    }
    if (u.entries != MAP_FAILED)
        munmap(u.entries, u.entries_length);
    if (u.rings != MAP_FAILED)
        munmap(u.rings, u.rings_length);
    if (u.fd >= 0)
        close(u.fd);
    return result;
}
