#include "plain.h"
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char host[256], port[16];
static const char *const *subjects;
static int subject_count;
static const char *group;
static int fd = -1;
static char buffer[65536];
static size_t filled;

static void send_all(const char *data, size_t length) {
  while (length && fd >= 0) {
    ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
    if (sent < 0 && errno != EINTR) return;
    if (sent > 0) data += sent, length -= (size_t)sent;
  }
}

static bool dial(void) {
  struct addrinfo *address;
  if (getaddrinfo(host, port, &(struct addrinfo){.ai_socktype = SOCK_STREAM}, &address)) return false;
  fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd >= 0 && connect(fd, address->ai_addr, address->ai_addrlen)) close(fd), fd = -1;
  freeaddrinfo(address);
  filled = 0;
  const char *hello = "CONNECT {\"verbose\":false,\"headers\":true,\"name\":\"plain C worker\"}\r\n";
  send_all(hello, strlen(hello));
  for (int i = 0; i < subject_count; i++) {
    char line[256];
    send_all(line, (size_t)snprintf(line, sizeof line, "SUB %s %s %d\r\n", subjects[i], group, i + 1));
  }
  send_all("PING\r\n", 6);
  return fd >= 0;
}

void plain_connect(const char *url, const char *const *to_subscribe, int count, const char *queue_group) {
  subjects = to_subscribe, subject_count = count, group = queue_group;
  if (sscanf(url, "nats://%255[^:]:%15[0-9]", host, port) != 2 || !dial()) {
    fprintf(stderr, "cannot connect to %s\n", url);
    exit(1);
  }
}

int plain_fd(void) { return fd; }

/* Handles the line of `length` bytes and the payload behind it. Returns the bytes of both, or 0 if some are missing. */
static size_t handle_line(size_t length, void (*handle)(const char *, const char *, size_t)) {
  char line[1024], reply[512];
  size_t headers = 0, size, after = length + 2;
  snprintf(line, sizeof line, "%.*s", (int)length, buffer);
  if (!strcmp(line, "PING")) send_all("PONG\r\n", 6);
  if (sscanf(line, "HMSG %*s %*s %511s %zu %zu", reply, &headers, &size) != 3) {
    headers = 0;
    if (sscanf(line, "MSG %*s %*s %511s %zu", reply, &size) != 2) return after;
  }
  if (size > sizeof buffer - 2048 || headers > size) { /* larger than any request of this demo */
    close(fd), fd = -1;
    return 0;
  }
  if (filled < after + size + 2) return 0;
  handle(reply, buffer + after + headers, size - headers);
  return after + size + 2;
}

void plain_read(void (*handle)(const char *reply, const char *data, size_t length)) {
  if (fd < 0 && !dial()) return;
  ssize_t count = recv(fd, buffer + filled, sizeof buffer - filled, MSG_DONTWAIT);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (count <= 0) {
    close(fd), fd = -1;
    return;
  }
  filled += (size_t)count;
  char *end;
  while (fd >= 0 && (end = memmem(buffer, filled, "\r\n", 2))) {
    size_t used = handle_line((size_t)(end - buffer), handle);
    if (!used) break;
    memmove(buffer, buffer + used, filled -= used);
  }
}

void plain_publish(const char *subject, const char *data) {
  char message[1024];
  int length = snprintf(message, sizeof message, "PUB %s %zu\r\n%s\r\n", subject, strlen(data), data);
  send_all(message, (size_t)length);
}
