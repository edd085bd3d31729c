/*
 * worker URL SUBJECT GROUP PIECES PAUSE_MS: a worker that sends pieces, and stops when the client leaves.
 *
 * One thread serves all streams. It sleeps until an event arrives or a piece is due. It prints events on standard
 * output, one JSON object per line, and exits at the end of its standard input.
 */
#include <nats_presence.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MAX_STREAMS = 64, RETRY_DELAY_MS = 300 };

struct stream {
  presence_sender *sender; /* NULL: this slot is free */
  char name[64];           /* the request's payload */
  int made;
  bool is_stopped; /* after RETRY_DELAY_MS the worker tries to send once more */
  int64_t due_ns;  /* when the next piece, or that last attempt, is due */
};

static struct stream streams[MAX_STREAMS];
static int pieces, pause_ms;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void begin(const presence_event *request) {
  struct stream *s = streams;
  while (s < streams + MAX_STREAMS && s->sender) s++;
  if (s == streams + MAX_STREAMS) {
    presence_sender_error(request->sender, "server busy", 11);
    presence_sender_free(request->sender);
    return;
  }
  *s = (struct stream){.sender = request->sender, .due_ns = now_ns()};
  snprintf(s->name, sizeof s->name, "%.*s", (int)request->data_len, (const char *)request->data);
  printf("{\"event\": \"begin\", \"at\": %" PRId64 ", \"stream\": \"%s\"}\n", now_ns(), s->name);
}

static void report_done(struct stream *s, int32_t status) {
  printf("{\"event\": \"done\", \"at\": %" PRId64 ", \"stream\": \"%s\", \"made\": %d, \"sent\": %" PRIu64
         ", \"status\": %d}\n",
         now_ns(), s->name, s->made, presence_sender_send_count(s->sender), status);
}

static void release(struct stream *s) {
  presence_sender_free(s->sender);
  s->sender = NULL;
}

/* The client has left: STOPPED arrived, or a send was refused before that. */
static void stop(struct stream *s, int32_t status) {
  if (s->is_stopped) return;
  report_done(s, status);
  s->is_stopped = true;
  s->due_ns = now_ns() + RETRY_DELAY_MS * INT64_C(1000000);
}

static void send_piece(struct stream *s) {
  char piece[96];
  int length = snprintf(piece, sizeof piece, "%s piece %d", s->name, s->made++);
  int32_t status = presence_sender_send(s->sender, piece, (size_t)length);
  s->due_ns += pause_ms * INT64_C(1000000);
  if (status != PRESENCE_OK) stop(s, status);
}

static void step(struct stream *s) {
  if (s->is_stopped) {
    int32_t status = presence_sender_send(s->sender, "too late", 8);
    printf("{\"event\": \"late\", \"at\": %" PRId64 ", \"stream\": \"%s\", \"status\": %d}\n", now_ns(), s->name,
           status);
    release(s);
  } else if (s->made < pieces) {
    send_piece(s);
  } else {
    int32_t status = presence_sender_end(s->sender);
    if (status != PRESENCE_OK) {
      stop(s, status);
    } else {
      report_done(s, status);
      release(s);
    }
  }
}

static void handle(const presence_event *event) {
  if (event->kind == PRESENCE_EVENT_REQUEST) begin(event);
  for (int i = 0; event->kind == PRESENCE_EVENT_STOPPED && i < MAX_STREAMS; i++) {
    if (streams[i].sender == event->sender) stop(&streams[i], event->status);
  }
}

/* Handles the streams that are due. Returns the milliseconds until the next one is due; -1 if there is none. */
static int handle_due_streams(void) {
  int64_t next = INT64_MAX, now = now_ns();
  for (struct stream *s = streams; s < streams + MAX_STREAMS; s++) {
    if (s->sender && s->due_ns <= now) step(s);
    if (s->sender && s->due_ns < next) next = s->due_ns;
  }
  if (next == INT64_MAX) return -1;
  return next > now ? (int)((next - now + 999999) / 1000000) : 0;
}

int main(int argc, char **argv) {
  presence_conn *conn;
  presence_queue *queue;
  presence_service *service;
  presence_stats stats;
  presence_event events[16];
  presence_error error = {0};
  if (argc != 6) return fprintf(stderr, "usage: worker URL SUBJECT GROUP PIECES PAUSE_MS\n"), 2;
  pieces = atoi(argv[4]);
  pause_ms = atoi(argv[5]);
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (presence_queue_new(&queue) || presence_connect(argv[1], NULL, &conn, &error) ||
      presence_serve(conn, queue, argv[2], argv[3], 0, 0, &service, &error)) {
    return fprintf(stderr, "%s\n", error.message), 1;
  }
  printf("{\"event\": \"ready\", \"at\": %" PRId64 "}\n", now_ns());
  struct pollfd fds[] = {{.fd = presence_queue_fd(queue), .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
  while (!fds[1].revents) {
    poll(fds, 2, handle_due_streams());
    int64_t count = presence_queue_wait(queue, events, 16, 0);
    for (int64_t i = 0; i < count; i++) handle(&events[i]);
  }
  presence_conn_stats(conn, &stats);
  printf("{\"event\": \"totals\", \"at\": %" PRId64 ", \"running\": %" PRIu64 ", \"online\": %" PRIu64 "}\n", now_ns(),
         stats.senders, presence_online_count());
  presence_close(conn, 1000);
  presence_service_free(service);
  presence_queue_free(queue);
}
