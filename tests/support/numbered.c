/* numbered CALL REST STEP: makes a system call, its first argument 0, STEP, 2 * STEP, ..., until its standard input
   ends, but 10,000 times at least: 100 flat out, then REST ms of rest, for on two cores whoever reads of them wants to
   live too. Prints how many it made. */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    long call = argc > 1 ? atol(argv[1]) : 0, number = 0;
    int rest = argc > 2 ? atoi(argv[2]) : 1;
    struct pollfd end = {.fd = 0, .events = POLLIN};
    long step = argc > 3 ? atol(argv[3]) : 1;
    do
        for (int i = 0; i < 100; i++, number++)
            syscall(call, 1L << 32 | number * step, 0, 0, 0, 0, 0); /* a mark, for a shell makes such calls too */
    while (!poll(&end, 1, rest) || number < 10000);
    printf("%ld\n", number);
    return 0;
}
