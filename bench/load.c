/* Loads for the benchmarks: load WHAT SECONDS RATE, at RATE a second or flat out if it is 0. Prints how
   many were issued and how many a second. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void one_syscall(void)
{
    syscall(SYS_getppid);
}

static void one_exec(void)
{
    pid_t child = vfork();
    if (!child) {
        execl("/bin/true", "/bin/true", "an argument", "", "another", (char *)0);
        _exit(127);
    }
    waitpid(child, NULL, 0);
}

static void one_open(void)
{
    int fd = open("/etc/hostname", O_RDONLY | O_CLOEXEC);
    if (fd >= 0)
        close(fd);
}

static void one_seek(void)
{
    lseek(-1, 0, SEEK_CUR);
}

static void one_connect(void)
{
    static struct sockaddr_in address;
    address.sin_family = AF_INET;
    address.sin_port = htons(9);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    connect(fd, (struct sockaddr *)&address, sizeof address);
    close(fd);
}

/* A turn is two switches between tasks; the other is in the cgroup that $LOAD_CGROUP names. */
static void one_turn(void)
{
    static int there[2], back[2];
    char byte = 0;
    if (!there[1]) {
        if (pipe(there) || pipe(back))
            _exit(1);
        if (!fork()) {
            int cgroup = open(getenv("LOAD_CGROUP"), O_WRONLY);
            if (cgroup < 0 || write(cgroup, "0", 1) != 1)
                _exit(1);
            close(there[1]);
            close(back[0]);
            while (read(there[0], &byte, 1) == 1 && write(back[1], &byte, 1) == 1)
                ;
            _exit(0);
        }
        close(there[0]);
        close(back[1]);
    }
    if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
        _exit(1);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*one)(void);
    } loads[] = {{"syscalls", one_syscall}, {"execs", one_exec}, {"opens", one_open}, {"seeks", one_seek}, {"connects", one_connect}, {"turns", one_turn}};
    void (*one)(void) = NULL;
    for (size_t i = 0; argc == 4 && i < sizeof loads / sizeof *loads; i++)
        if (!strcmp(argv[1], loads[i].name))
            one = loads[i].one;
    if (!one) {
        fprintf(stderr, "usage: load syscalls|execs|opens|seeks|connects|turns SECONDS RATE\n");
        return 2;
    }
    double seconds = atof(argv[2]), rate = atof(argv[3]), start = now(), end = start + seconds, t = start;
    long issued = 0;
    while (t < end) {
        if (!rate) {
            for (int i = 0; i < 256; i++)
                one();
            issued += 256;
        } else { /* in ticks of a millisecond, or one by one if that is slower */
            long due = (long)((t - start) * rate) + 1;
            for (; issued < due; issued++)
                one();
            double next = start + (double)issued / rate;
            if (next < t + 0.001 && rate > 1000)
                next = t + 0.001;
            struct timespec wait = {(time_t)next, (long)((next - (double)(time_t)next) * 1e9)};
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wait, NULL);
        }
        t = now();
    }
    printf("%ld %.0f\n", issued, (double)issued / (now() - start));
    return 0;
}
