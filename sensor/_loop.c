/* What an event loop does at each wake-up, in fewer steps: its timer, and sending. Part of _perf.c. */

enum { MAX_FRAMES = 16 };

/* A timer that can be waited for like any descriptor: that, or -errno. */
int rs_timer_open(void)
{
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

/*
 * Have a timer be readable every so many ns from now on. `same`: as was said the last time; then one that has been
 * readable goes on as it does, for setting it costs more.
 */
int rs_timer_every(int fd, uint64_t ns, int same)
{
    uint64_t count;
    if (same && read(fd, &count, sizeof count) == sizeof count)
        return 0;
    struct timespec every = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    return timerfd_settime(fd, 0, &(struct itimerspec){every, every}, NULL) ? -errno : 0;
}

/*
 * Write bytes to a socket as one gRPC message, in DATA frames (RFC 9113, 6.1) of a stream, of no more than `frame`
 * bytes each, without waiting. How many bytes of all that, headers included, the socket took, or -errno. What it did
 * not take is in `rest` then, if there is `room` for all.
 */
int64_t rs_send_message(int fd, const uint8_t *message, size_t length, uint32_t stream, uint32_t frame, uint8_t *rest,
                        size_t room)
{
    uint8_t heads[MAX_FRAMES][14]; /* a frame's: length, type, flags, stream; the message's: flags, length */
    struct iovec parts[2 * MAX_FRAMES];
    size_t n = 0;
    size_t frames = frame < 5 ? 0 : (length + 5 + frame - 1) / frame;
    if (!frames || frames > MAX_FRAMES || length > UINT32_MAX || length + 5 + 9 * frames > room)
        return -EMSGSIZE;
    for (size_t left = length + 5; left; n++) {
        size_t size = left < frame ? left : frame, own = n ? 0 : 5;
        uint32_t head[] = {htonl((uint32_t)size << 8), htonl(stream), htonl((uint32_t)length)};
        memcpy(heads[n], head, 4); /* the low byte: type 0, DATA */
        heads[n][4] = 0;
        memcpy(heads[n] + 5, head + 1, 4);
        heads[n][9] = 0;
        memcpy(heads[n] + 10, head + 2, 4);
        parts[2 * n] = (struct iovec){heads[n], 9 + own};
        parts[2 * n + 1] = (struct iovec){(void *)(uintptr_t)message, size - own};
        message += size - own;
        left -= size;
    }
    struct msghdr all = {.msg_iov = parts, .msg_iovlen = 2 * n};
    ssize_t sent = sendmsg(fd, &all, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN)
        return -errno;
    size_t skip = sent < 0 ? 0 : (size_t)sent;
    for (size_t i = 0; i < 2 * n; i++) {
        size_t gone = skip < parts[i].iov_len ? skip : parts[i].iov_len;
        rest = put(rest, (const uint8_t *)parts[i].iov_base + gone, parts[i].iov_len - gone);
        skip -= gone;
    }
    return sent < 0 ? 0 : sent;
}
