/*
 * Makes requests through a ring of io_uring(7) as it is told to on standard input: how many requests, bytes and
 * pointers; the bytes, to which requests point; where in them pointers are, each an offset to begin with; the
 * requests, each a struct io_uring_sqe and a mask: of `addr` (1), of `off` (2), that are such offsets too. Their
 * results go to standard output, in their order. It ends with its input.
 *
 * The first argument is the flags of io_uring_setup(2). Sockets are there from FIRST on, and the first of them is
 * the ring's file number 0.
 */
#define _GNU_SOURCE
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FIRST = 100, MOST = 64 };

static struct {
    struct io_uring_sqe entry;
    uint64_t pointers;
} requests[MOST];
static uint8_t data[1 << 16];

static void must(int holds, const char *what)
{
    if (!holds) {
        perror(what);
        exit(1);
    }
}

int main(int count, char **arguments)
{
    must(count == 2, "usage: uring FLAGS");
    struct io_uring_params p = {.flags = (uint32_t)atoi(arguments[1]), .sq_thread_idle = 1};
    int ring = (int)syscall(SYS_io_uring_setup, MOST, &p);
    must(ring >= 0, "io_uring_setup");
    size_t length = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), way = PROT_READ | PROT_WRITE;
    uint8_t *rings = mmap(NULL, length, (int)way, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entries = mmap(NULL, p.sq_entries * sizeof *entries, (int)way, MAP_SHARED, ring, IORING_OFF_SQES);
    must(rings != MAP_FAILED && entries != MAP_FAILED, "mmap");
    uint32_t *array = (uint32_t *)(rings + p.sq_off.array), *tail = (uint32_t *)(rings + p.sq_off.tail);
    uint32_t *head = (uint32_t *)(rings + p.cq_off.head);
    struct io_uring_cqe *completions = (struct io_uring_cqe *)(rings + p.cq_off.cqes);

    static const int sockets[][2] = {{AF_INET, SOCK_STREAM}, {AF_UNIX, SOCK_STREAM}, {AF_INET, SOCK_DGRAM}};
    for (int i = 0; i < 3; i++)
        must(dup2(socket(sockets[i][0], sockets[i][1], 0), FIRST + i) == FIRST + i, "socket");
    must(!syscall(SYS_io_uring_register, ring, IORING_REGISTER_FILES, &(int){FIRST}, 1), "io_uring_register");

    uint32_t told[3], places[MOST];
    while (fread(told, sizeof told, 1, stdin)) {
        uint32_t n = told[0];
        must(n <= MOST && told[1] <= sizeof data && told[2] <= MOST && fread(data, 1, told[1], stdin) == told[1] &&
                 fread(places, sizeof *places, told[2], stdin) == told[2] &&
                 fread(requests, sizeof *requests, n, stdin) == n,
             "input");
        for (uint32_t i = 0; i < told[2]; i++)
            *(uint64_t *)(data + places[i]) += (uintptr_t)data;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t at = (*tail + i) % p.sq_entries;
            entries[at] = requests[i].entry;
            entries[at].addr += requests[i].pointers & 1 ? (uintptr_t)data : 0;
            entries[at].off += requests[i].pointers & 2 ? (uintptr_t)data : 0;
            entries[at].user_data = i;
            array[at] = at;
        }
        __atomic_store_n(tail, *tail + n, __ATOMIC_RELEASE);
        uint32_t how = IORING_ENTER_GETEVENTS | (p.flags & IORING_SETUP_SQPOLL ? IORING_ENTER_SQ_WAKEUP : 0);
        must(syscall(SYS_io_uring_enter, ring, n, n, how, NULL, 0) >= 0, "io_uring_enter");
        int32_t results[MOST] = {0};
        for (uint32_t i = 0; i < n; i++, ++*head)
            results[completions[*head % p.cq_entries].user_data] = completions[*head % p.cq_entries].res;
        must(fwrite(results, sizeof *results, n, stdout) == n && !fflush(stdout), "output");
    }
    return 0;
}
