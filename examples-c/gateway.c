/*
 * A gateway: requests a stream for each of several clients and prints what comes. The first one leaves in the middle.
 *
 *   gateway [URL [SUBJECT [CLIENT...]]]
 *
 * A real gateway has a connection to each client's browser, in the same event loop, and forwards to it what is printed
 * here. Its loop waits on many file descriptors; a queue gives it one for all streams: presence_queue_fd.
 * SIGINT and SIGTERM stop the gateway. It exits with 0 when each stream ended, or was left by its client.
 */
#define _POSIX_C_SOURCE 200809L
#include <nats_presence.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>

enum { MAX_CLIENTS = 100, MAX_EVENTS = 64, ENOUGH = 5 };

struct client {
  const char *id;
  presence_stream *stream; /* NULL: it has ended. */
  uint64_t received;
};

static struct client clients[MAX_CLIENTS];
static size_t client_count, running;
static int exit_status;

static void check(const char *what, int32_t status, const presence_error *error) {
  if (status == PRESENCE_OK) return;
  fprintf(stderr, "%s: %s\n", what, error ? error->message : presence_status_text(status));
  exit(1);
}

static void request(presence_conn *conn, presence_queue *queue, const char *subject, size_t number) {
  struct client *client = &clients[number];
  presence_error error;
  presence_config *config = presence_config_new();
  /* If nobody serves the subject yet, ask again: 20 times, 100 ms apart. */
  check("presence_config_set", presence_config_set(config, "retries", "20"), NULL);
  presence_request_args args = {
    .size = sizeof args,
    .subject = subject,
    .data = "hello",
    .data_len = 5,
    .client = client->id,
    .client_len = strlen(client->id),
    .tag = number, /* our own number: each event of the stream carries it */
    .config = config,
  };
  check("presence_request", presence_request(conn, queue, &args, &client->stream, &error), &error);
  presence_config_free(config);
  running++;
}

static void finish(struct client *client) {
  presence_stream_free(client->stream);
  client->stream = NULL;
  running--;
}

static void handle(const presence_event *event) {
  if (event->kind == PRESENCE_EVENT_DISCONNECTED || event->kind == PRESENCE_EVENT_LOG) {
    fprintf(stderr, "gateway: %.*s\n", (int)event->data_len, (const char *)event->data);
    return;
  }
  if (!event->stream) return;
  struct client *client = &clients[event->tag];
  switch (event->kind) {
    case PRESENCE_EVENT_DATA:
      client->received++;
      printf("%s: %.*s\n", client->id, (int)event->data_len, (const char *)event->data);
      /* The first client closes its tab. This one call ends its streams here and stops its worker. */
      if (client == &clients[0] && client->received == ENOUGH)
        check("mark_client_offline", mark_client_offline(client->id), NULL);
      break;
    case PRESENCE_EVENT_END:
      printf("%s: end after %" PRIu64 "\n", client->id, client->received);
      finish(client);
      break;
    case PRESENCE_EVENT_ERROR: /* The status is for programs, the text for people. A stream ends once. */
      printf("%s: %.*s after %" PRIu64 "\n", client->id, (int)event->data_len, (const char *)event->data,
             client->received);
      if (event->status != PRESENCE_OFFLINE) exit_status = 1;
      finish(client);
      break;
    default:
      break;
  }
}

int main(int argc, char **argv) {
  static const char *const ids[] = {"client-1", "client-2", "client-3"};
  const char *url = argc > 1 ? argv[1] : "nats://127.0.0.1:4222";
  const char *subject = argc > 2 ? argv[2] : "demo.stream";
  if (argc > 3 + MAX_CLIENTS) return fprintf(stderr, "at most %d clients\n", MAX_CLIENTS), 2;
  client_count = argc > 3 ? (size_t)argc - 3 : sizeof ids / sizeof *ids;
  for (size_t i = 0; i < client_count; i++) clients[i].id = argc > 3 ? argv[3 + i] : ids[i];
  setvbuf(stdout, NULL, _IOLBF, 0);

  presence_error error;
  presence_conn *conn;
  presence_queue *queue;
  check("presence_connect", presence_connect(url, NULL, &conn, &error), &error);
  check("presence_queue_new", presence_queue_new(&queue), NULL);
  check("presence_conn_watch", presence_conn_watch(conn, queue, 0), NULL);
  int queue_fd = presence_queue_fd(queue);
  if (queue_fd < 0) check("presence_queue_fd", queue_fd, NULL);

  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  sigprocmask(SIG_BLOCK, &signals, NULL);
  int signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);
  if (signal_fd < 0) return perror("signalfd"), 1;

  for (size_t i = 0; i < client_count; i++) request(conn, queue, subject, i);

  struct pollfd fds[] = {{.fd = queue_fd, .events = POLLIN}, {.fd = signal_fd, .events = POLLIN}};
  while (running > 0) {
    if (poll(fds, 2, -1) < 0) return perror("poll"), 1;
    if (fds[1].revents) break;
    /* The descriptor stays readable as long as there are events: no need to take all of them now. */
    presence_event events[MAX_EVENTS];
    int64_t count = presence_queue_wait(queue, events, MAX_EVENTS, 0);
    if (count < 0) check("presence_queue_wait", (int32_t)count, NULL);
    for (int64_t i = 0; i < count; i++) handle(&events[i]);
  }

  /* Freeing a running stream cancels it. Then wait, a second at most, until the server has everything. */
  for (size_t i = 0; i < client_count; i++) presence_stream_free(clients[i].stream);
  int32_t status = presence_close(conn, 1000);
  presence_queue_free(queue);
  check("presence_close", status, NULL);
  return exit_status;
}
