/*
 * gateway URL LANES [KEY=VALUE]...: a gateway in C; LANES is the option of that name, true or false, and others may
 * follow. It reads commands from standard input and prints events to standard output.
 *
 *   request SUBJECT CLIENT TEXT
 *   leave CLIENT
 *
 * It prints each message, the end or error of each stream, and refused requests. It exits at the end of its input.
 */
#include <nats_presence.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX = 64 };

/* A stream's tag is its number here. */
static struct {
  presence_stream *stream;
  char client[64];
} streams[MAX];

static void request(presence_conn *conn, presence_queue *queue, const char *subject, const char *client, const char *text) {
  presence_error error = {0};
  int tag = 0;
  while (streams[tag].stream) tag++;
  snprintf(streams[tag].client, sizeof streams[tag].client, "%s", client);
  const presence_request_args args = {.size = sizeof args,
                                      .subject = subject,
                                      .data = text,
                                      .data_len = strlen(text),
                                      .client = client,
                                      .client_len = strlen(client),
                                      .tag = (uint64_t)tag};
  if (presence_request(conn, queue, &args, &streams[tag].stream, &error)) {
    printf("{\"event\": \"error\", \"client\": \"%s\", \"status\": %d, \"text\": \"%s\"}\n", client, error.status, error.message);
  }
}

static void print_event(const presence_event *event) {
  const char *client = streams[event->tag].client;
  int length = (int)event->data_len;
  switch (event->kind) {
    case PRESENCE_EVENT_DATA:
      printf("{\"event\": \"data\", \"client\": \"%s\", \"data\": \"%.*s\"}\n", client, length, event->data);
      break;
    case PRESENCE_EVENT_END:
      printf("{\"event\": \"end\", \"client\": \"%s\"}\n", client);
      break;
    case PRESENCE_EVENT_ERROR:
      printf("{\"event\": \"error\", \"client\": \"%s\", \"status\": %d, \"text\": \"%.*s\", \"code\": %d}\n", client,
             event->status, length, event->data, event->error_code);
      break;
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
  presence_error error = {0};
  presence_event events[64];
  presence_config *config = presence_config_new();
  if (argc < 3 || presence_config_set(config, "lanes", argv[2]) || set_options(config, argv + 3) || presence_queue_new(&queue) ||
      presence_connect(argv[1], config, &conn, &error)) {
    fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  presence_config_free(config);
  setvbuf(stdout, NULL, _IOLBF, 0);
  setvbuf(stdin, NULL, _IONBF, 0); /* poll does not see what a buffer already holds */
  puts("{\"event\": \"ready\"}");
  struct pollfd fds[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = presence_queue_fd(queue), .events = POLLIN}};
  for (;;) {
    poll(fds, 2, -1);
    int64_t count = presence_queue_wait(queue, events, 64, 0);
    for (int64_t i = 0; i < count; i++) print_event(&events[i]);
    if (!fds[0].revents) continue;
    char line[256], subject[64], client[64], text[64];
    if (!fgets(line, sizeof line, stdin)) break;
    if (sscanf(line, "request %63s %63s %63[^\n]", subject, client, text) == 3) request(conn, queue, subject, client, text);
    if (sscanf(line, "leave %63s", client) == 1) mark_client_offline(client);
  }
  presence_close(conn, 1000);
  for (int i = 0; i < MAX; i++) presence_stream_free(streams[i].stream);
  presence_queue_free(queue);
}
