/*
 * worker URL SUBJECT OPTIONS: serves SUBJECT on lanes, and SUBJECT.0 on level 0, with one thread for all streams.
 */
#include "soak.h"

typedef struct stream {
  struct stream *next;
  presence_sender *sender;
  uint64_t key;
  long count, sent, burst, pause;
  int64_t due;
  size_t size;
  bool is_full; /* until WRITABLE */
  char what[8];
  size_t client_len;
  char client[64];
} stream;

static stream *streams;
static long served, accepted_after, unwarranted;

/* The stream has ended: no further send may be accepted. */
static void finish(stream *s) {
  for (int i = 0; i < FURTHER; i++) accepted_after += presence_sender_send(s->sender, "more", 4) == PRESENCE_OK;
  presence_sender_free(s->sender);
  s->sender = NULL;
  served++;
}

static void begin(const presence_event *event) {
  char text[128];
  stream *s = calloc(1, sizeof *s);
  snprintf(text, sizeof text, "%.*s", (int)event->data_len, event->data);
  unsigned long long key;
  if (sscanf(text, "%llu %ld %zu %ld %ld %7s", &key, &s->count, &s->size, &s->burst, &s->pause, s->what) != 6 ||
      event->client_len > sizeof s->client) {
    check(PRESENCE_INVALID, "request", text);
  }
  s->sender = event->sender;
  s->key = key;
  memcpy(s->client, event->client, s->client_len = event->client_len);
  s->next = streams;
  streams = s;
}

static void go_on(stream *s, int64_t now) {
  int32_t status = PRESENCE_OK;
  for (long i = 0; i < s->burst && s->sent < s->count && status == PRESENCE_OK; i++) {
    status = presence_sender_send(s->sender, content(s->key, (uint64_t)s->sent, s->size), s->size);
    s->sent += status == PRESENCE_OK;
  }
  s->due = now + s->pause;
  s->is_full = status == PRESENCE_FULL;
  if (s->is_full) return;
  if (status == PRESENCE_OK) {
    if (s->sent < s->count) return;
    if (strcmp(s->what, "mark") == 0) presence_mark_offline(s->client, s->client_len);
    else if (strcmp(s->what, "fail") == 0) presence_sender_error(s->sender, "asked for", 9);
    else presence_sender_end(s->sender);
  }
  finish(s);
}

static void handle(const presence_event *event) {
  if (event->kind == PRESENCE_EVENT_REQUEST) begin(event);
  for (stream *s = streams; s; s = s->next) {
    if (s->sender != event->sender || !event->sender) continue;
    if (event->kind == PRESENCE_EVENT_WRITABLE) s->is_full = false;
    if (event->kind == PRESENCE_EVENT_STOPPED) {
      unwarranted += !presence_sender_is_closed(s->sender);
      finish(s);
    }
  }
}

int main(int argc, char **argv) {
  presence_queue *queue;
  presence_service *services[2];
  presence_conn *conns[2];
  presence_error error = {0};
  static presence_event events[256];
  char subject[64], more[128], line[64];
  if (argc != 4) return 2;
  setvbuf(stdout, NULL, _IOLBF, 0);
  setvbuf(stdin, NULL, _IONBF, 0);
  check(presence_queue_new(&queue), "queue", "");
  for (int i = 0; i < 2; i++) {
    conns[i] = open_conn(argv[1], argv[3], i == 0);
    snprintf(subject, sizeof subject, i ? "%s.0" : "%s", argv[2]);
    check(presence_serve(conns[i], queue, subject, "soak", 0, 0, &services[i], &error), "serve", error.message);
  }
  puts("{\"event\": \"ready\"}");
  struct pollfd fds[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = presence_queue_fd(queue), .events = POLLIN}};
  for (int64_t told = 0;;) {
    poll(fds, 2, streams ? 2 : 100);
    bool is_asked = fds[0].revents != 0;
    if (is_asked && !fgets(line, sizeof line, stdin)) break;
    int64_t count = presence_queue_wait(queue, events, 256, 0), now = now_ms();
    for (int64_t i = 0; i < count; i++) handle(&events[i]);
    for (stream **at = &streams, *s; (s = *at);) {
      if (s->sender && !s->is_full && s->due <= now) go_on(s, now);
      if (s->sender) at = &s->next;
      else *at = s->next, free(s);
    }
    if (now < told + STATS_MS && !is_asked) continue;
    told = now;
    if (is_asked) malloc_trim(0); /* the "quiet" command, when all streams have ended */
    snprintf(more, sizeof more, ", \"served\": %ld, \"accepted_after\": %ld, \"unwarranted\": %ld", served, accepted_after,
             unwarranted);
    tell_stats(is_asked ? "quiet" : "stats", conns, more);
  }
  for (int i = 0; i < 2; i++) presence_close(conns[i], 1000), presence_service_free(services[i]);
  for (stream *s; (s = streams);) {
    presence_sender_free(s->sender);
    streams = s->next;
    free(s);
  }
  presence_queue_free(queue);
}
