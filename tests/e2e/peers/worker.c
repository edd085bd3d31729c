/*
 * worker URL SUBJECT LANES [KEY=VALUE]...: a worker in C that does what requests say, with one thread for all streams.
 *
 *   count N     N messages "CLIENT 0", "CLIENT 1", ...
 *   endless     the same, until "finish" is read from standard input
 *   fail TEXT   one message, then an error
 *   code N TEXT the same, with this code
 *
 * It prints when it is ready, and for each stream the number of messages sent, the presence_status with which it ended,
 * and how many of a hundred further sends were accepted. It exits at the end of its input.
 */
#include <nats_presence.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX = 64, BURST = 10, FURTHER = 100 };

struct stream {
  presence_sender *sender; /* NULL: free */
  char client[64], request[64];
  long sent;
};

static struct stream streams[MAX];
static bool is_finishing;

static int32_t send_next(struct stream *s) {
  char text[128];
  int length = snprintf(text, sizeof text, "%s %ld", s->client, s->sent);
  int32_t status = presence_sender_send(s->sender, text, (size_t)length);
  if (status == PRESENCE_OK) s->sent++;
  return status;
}

/* The stream has ended: no further send may be accepted. */
static void finish(struct stream *s, int32_t why) {
  long sent = s->sent;
  for (int i = 0; i < FURTHER; i++) send_next(s);
  printf("{\"event\": \"done\", \"client\": \"%s\", \"sent\": %ld, \"why\": %d, \"accepted\": %ld}\n", s->client, sent,
         why, s->sent - sent);
  presence_sender_free(s->sender);
  s->sender = NULL;
}

static void begin(const presence_event *event) {
  struct stream *s = streams;
  while (s->sender) s++;
  *s = (struct stream){.sender = event->sender};
  memcpy(s->client, event->client, event->client_len);
  memcpy(s->request, event->data, event->data_len);
}

/* Sends part of what the request asks for; less when the sender is full. */
static void go_on(struct stream *s) {
  bool is_endless = strcmp(s->request, "endless") == 0, has_code = strncmp(s->request, "code ", 5) == 0;
  bool fails = has_code || strncmp(s->request, "fail ", 5) == 0;
  long count = fails ? 1 : is_endless ? (is_finishing ? 0 : s->sent + BURST) : atol(s->request + strlen("count "));
  int32_t status = PRESENCE_OK;
  for (int i = 0; i < BURST && s->sent < count && status == PRESENCE_OK; i++) status = send_next(s);
  if (status == PRESENCE_OK && s->sent >= count && (!is_endless || is_finishing)) {
    char *text = s->request + strlen("fail ");
    int32_t code = has_code ? (int32_t)strtol(text, &text, 10) : 0;
    if (has_code) finish(s, presence_sender_error_code(s->sender, code, text + 1, strlen(text + 1)));
    else finish(s, fails ? presence_sender_error(s->sender, text, strlen(text)) : presence_sender_end(s->sender));
  } else if (status != PRESENCE_OK && status != PRESENCE_FULL) {
    finish(s, status);
  }
}

static void handle(const presence_event *event) {
  if (event->kind == PRESENCE_EVENT_REQUEST) begin(event);
  if (event->kind == PRESENCE_EVENT_STOPPED) {
    for (int i = 0; i < MAX; i++) if (streams[i].sender == event->sender) finish(&streams[i], event->status);
  }
}

/* Options are KEY=VALUE. */
static int32_t set_options(presence_config *config, char **options) {
  int32_t status = PRESENCE_OK;
  for (; *options && status == PRESENCE_OK; options++) {
    char *value = *options, *key = strsep(&value, "=");
    status = presence_config_set(config, key, value);
  }
  return status;
}

int main(int argc, char **argv) {
  presence_conn *conn;
  presence_queue *queue;
  presence_service *service;
  presence_error error = {0};
  presence_event events[16];
  presence_config *config = presence_config_new();
  if (argc < 4 || presence_config_set(config, "lanes", argv[3]) || set_options(config, argv + 4) || presence_queue_new(&queue) ||
      presence_connect(argv[1], config, &conn, &error) ||
      presence_serve(conn, queue, argv[2], "workers", 0, 0, &service, &error)) {
    fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  presence_config_free(config);
  setvbuf(stdout, NULL, _IOLBF, 0);
  puts("{\"event\": \"ready\"}");
  struct pollfd fds[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = presence_queue_fd(queue), .events = POLLIN}};
  for (bool is_busy = false;;) {
    poll(fds, 2, is_busy ? 1 : -1);
    if (fds[0].revents) {
      char line[16];
      if (read(STDIN_FILENO, line, sizeof line) <= 0) break;
      is_finishing = true; /* the only command */
    }
    int64_t count = presence_queue_wait(queue, events, 16, 0);
    for (int64_t i = 0; i < count; i++) handle(&events[i]);
    is_busy = count > 0;
    for (int i = 0; i < MAX; i++) {
      if (streams[i].sender) go_on(&streams[i]), is_busy = true;
    }
  }
  presence_close(conn, 1000);
  for (int i = 0; i < MAX; i++) presence_sender_free(streams[i].sender);
  presence_service_free(service);
  presence_queue_free(queue);
}
