/* Runs some streams from request to end, for tools/suppressions. An argument after the URL names the one fault that the
 * program then has. Without it the program is correct.
 *   clean URL [sender|config|memory|middle|race] */
#include <nats_presence.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(is_true)                                         \
  do {                                                         \
    if (!(is_true)) {                                          \
      fprintf(stderr, "line %d: %s\n", __LINE__, error.message); \
      exit(1);                                                 \
    }                                                          \
  } while (0)

static presence_error error;
static const char *fault = "none";
static char *volatile kept;
static int counter;

static bool has(const char *name) { return strcmp(fault, name) == 0; }

static void answer(presence_queue *queue) {
  presence_event event;
  CHECK(presence_queue_wait(queue, &event, 1, -1) == 1 && event.kind == PRESENCE_EVENT_REQUEST);
  CHECK(presence_sender_send(event.sender, "hello", 5) == PRESENCE_OK);
  CHECK(presence_sender_end(event.sender) == PRESENCE_OK);
  if (!has("sender")) presence_sender_free(event.sender);
}

static void read_to_the_end(presence_queue *queue) {
  presence_event event;
  char *copy = NULL;
  while (presence_queue_wait(queue, &event, 1, -1) == 1 && event.kind == PRESENCE_EVENT_DATA) {
    free(copy);
    copy = (char *)malloc(event.data_len);
    memcpy(copy, event.data, event.data_len);
  }
  CHECK(event.kind == PRESENCE_EVENT_END && copy && memcmp(copy, "hello", 5) == 0);
  free(copy);
}

static void *count(void *unused) {
  for (int i = 0; i < 1000; i++) counter++;
  return unused;
}

static void commit_fault(void) {
  if (has("config")) CHECK(presence_config_new());
  if (has("memory") || has("middle")) kept = (char *)malloc(1000) + 10;
  if (has("memory")) kept = NULL;
  if (has("race")) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, count, NULL) == 0);
    count(NULL);
    CHECK(pthread_join(thread, NULL) == 0);
  }
}

int main(int argc, char **argv) {
  presence_conn *conn;
  presence_queue *requests, *queue;
  presence_service *service;
  if (argc > 2) fault = argv[2];
  commit_fault();
  CHECK(presence_connect(argv[1], NULL, &conn, &error) == PRESENCE_OK);
  CHECK(presence_queue_new(&requests) == PRESENCE_OK && presence_queue_new(&queue) == PRESENCE_OK);
  CHECK(presence_serve(conn, requests, "clean", NULL, 0, 0, &service, &error) == PRESENCE_OK);
  for (int i = 0; i < 10; i++) { /* several: a pointer to the last sender may remain on the stack */
    presence_stream *stream;
    const presence_request_args args = {.size = sizeof args, .subject = "clean", .client = "client", .client_len = 6};
    CHECK(presence_request(conn, queue, &args, &stream, &error) == PRESENCE_OK);
    answer(requests);
    read_to_the_end(queue);
    presence_stream_free(stream);
  }
  presence_service_free(service);
  presence_queue_free(requests);
  presence_queue_free(queue);
  return presence_close(conn, 1000) != PRESENCE_OK;
}
