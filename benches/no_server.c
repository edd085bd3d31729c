/* Bytes without nats-server: one process writes them to another one over TCP on this machine, 64 KiB at a time.
 *
 * no_server BYTES
 */
#include "bench.h"
#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/wait.h>

static char block[64 * 1024];

static int must_open(int fd, const char *what)
{
    must(fd >= 0, what, "failed");
    return fd;
}

static void write_all(const struct sockaddr_in *address, size_t bytes)
{
    int fd = must_open(socket(AF_INET, SOCK_STREAM, 0), "socket");
    must(connect(fd, (const struct sockaddr *)address, sizeof *address) == 0, "connect", "failed");
    while (bytes > 0) {
        ssize_t written = write(fd, block, bytes < sizeof block ? bytes : sizeof block);
        must(written > 0, "write", "failed");
        bytes -= (size_t)written;
    }
    close(fd);
}

int main(int argc, char **argv)
{
    size_t bytes = number(argc, argv, 1), received = 0;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = must_open(socket(AF_INET, SOCK_STREAM, 0), "socket");
    must(bind(listener, (struct sockaddr *)&address, size) == 0, "bind", "failed");
    must(getsockname(listener, (struct sockaddr *)&address, &size) == 0, "getsockname", "failed");
    must(listen(listener, 1) == 0, "listen", "failed");
    pid_t writer = fork();
    must(writer >= 0, "fork", "failed");
    if (writer == 0) {
        write_all(&address, bytes);
        return 0;
    }

    int fd = must_open(accept(listener, NULL, NULL), "accept");
    int64_t start = now_ns();
    for (ssize_t got; (got = read(fd, block, sizeof block)) != 0; received += (size_t)got)
        must(got > 0, "read", "failed");
    double seconds = (double)(now_ns() - start) / 1e9;
    int status;
    must(waitpid(writer, &status, 0) == writer && status == 0 && received == bytes, "writer", "bytes were lost");
    printf("{\"gb_per_s\": %.3f}\n", (double)bytes / seconds / 1e9);
    return 0;
}
