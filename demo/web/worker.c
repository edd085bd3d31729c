/*
 * worker MODE URL TEXT: computes answers, word by word, with a Markov model over a book.
 *
 * MODE is "presence" or "plain". "plain" does the same with nothing but NATS: it publishes each word to the request's
 * reply subject, and never learns that the client has left.
 *
 * One thread serves all streams. It sleeps until an event arrives or a word is due. It prints events on standard
 * output, one JSON object per line, and exits at the end of its standard input.
 */
#include <nats_presence.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#include "model.h"
#include "plain.h"

enum { MAX_STREAMS = 256, MAX_TIMES = 64, REPORT_MS = 100 };

struct stream {
  bool is_running;
  presence_sender *sender; /* NULL in mode plain */
  char reply[512];         /* mode plain: where the words are published */
  char name[80];
  struct context context;
  int length, made, pause_ms;
  const char *unsent; /* the word that a send returned PRESENCE_FULL for */
  int64_t due_ns;
  int64_t times[MAX_TIMES]; /* when the words were made that were not reported yet */
  int unreported;
};

static struct stream streams[MAX_STREAMS];
static int running;
static uint64_t sent;
static bool is_plain;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Reports when words were made, and how much CPU time this process has used. */
static void report_work(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  int64_t cpu_us = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * INT64_C(1000000) + usage.ru_utime.tv_usec +
                   usage.ru_stime.tv_usec;
  printf("{\"event\": \"work\", \"at\": %" PRId64 ", \"cpu_us\": %" PRId64 ", \"sent\": %" PRIu64
         ", \"running\": %d, \"made\": {",
         now_ns(), cpu_us, sent, running);
  const char *separator = "";
  for (struct stream *s = streams; s < streams + MAX_STREAMS; s++) {
    if (!s->is_running || !s->unreported) continue;
    printf("%s\"%s\": [", separator, s->name);
    for (int i = 0; i < s->unreported; i++) printf("%s%" PRId64, i ? ", " : "", s->times[i]);
    printf("]");
    s->unreported = 0;
    separator = ", ";
  }
  printf("}}\n");
}

static void finish(struct stream *s, int32_t status) {
  int64_t at = now_ns();
  report_work();
  running--;
  printf("{\"event\": \"done\", \"at\": %" PRId64 ", \"stream\": \"%s\", \"status\": %d, \"running\": %d}\n", at,
         s->name, status, running);
  presence_sender_free(s->sender);
  *s = (struct stream){0};
}

static void refuse(presence_sender *sender, const char *reply, const char *text) {
  char message[128];
  snprintf(message, sizeof message, "__STREAM_ERROR__:%s", text);
  if (sender) {
    presence_sender_error(sender, text, strlen(text));
    presence_sender_free(sender);
  } else {
    plain_publish(reply, message);
  }
}

/* Begins the answer to a request, whose payload is "NAME LENGTH PAUSE_MS PROMPT". */
static void begin(presence_sender *sender, const char *reply, const char *data, size_t data_length) {
  char request[1200], prompt[1024] = "";
  struct stream *s = streams;
  while (s < streams + MAX_STREAMS && s->is_running) s++;
  if (s == streams + MAX_STREAMS) {
    refuse(sender, reply, "server busy");
    return;
  }
  *s = (struct stream){.sender = sender, .due_ns = now_ns()};
  snprintf(s->reply, sizeof s->reply, "%s", reply);
  snprintf(request, sizeof request, "%.*s", (int)data_length, data);
  if (sscanf(request, "%79[A-Za-z0-9_.-] %d %d %1023[^\n]", s->name, &s->length, &s->pause_ms, prompt) < 3 ||
      s->length < 1 || s->pause_ms < 0) {
    refuse(sender, reply, "the request is not NAME LENGTH PAUSE_MS PROMPT");
    return;
  }
  s->is_running = true;
  running++;
  model_begin(&s->context, s->name, prompt);
  if (sender) presence_sender_set_tag(sender, (uint64_t)(s - streams) + 1);
  printf("{\"event\": \"begin\", \"at\": %" PRId64 ", \"stream\": \"%s\", \"length\": %d, \"running\": %d}\n", now_ns(),
         s->name, s->length, running);
}

static void begin_plain(const char *reply, const char *data, size_t length) { begin(NULL, reply, data, length); }

/* Makes and sends one word, or the end. */
static void step(struct stream *s) {
  static const uint32_t never;
  const uint32_t *status_word = s->sender ? presence_sender_status_word(s->sender) : &never;
  if (s->made == s->length) {
    if (s->sender) {
      finish(s, presence_sender_end(s->sender));
    } else {
      plain_publish(s->reply, "__STREAM_END__");
      finish(s, 0);
    }
    return;
  }
  const char *word = s->unsent ? s->unsent : model_next(&s->context, status_word);
  if (!word) {
    finish(s, (int32_t)*status_word); /* the client left while this word was being computed */
    return;
  }
  if (!s->unsent) {
    s->made++;
    s->times[s->unreported++] = now_ns();
    if (s->unreported == MAX_TIMES) report_work();
  }
  s->unsent = NULL;
  int32_t status = PRESENCE_OK;
  if (s->sender) {
    status = presence_sender_send(s->sender, word, strlen(word));
  } else {
    plain_publish(s->reply, word);
  }
  if (status == PRESENCE_FULL) {
    s->unsent = word;
    s->due_ns = INT64_MAX; /* until WRITABLE */
  } else if (status != PRESENCE_OK) {
    finish(s, status);
  } else {
    s->due_ns += s->pause_ms * INT64_C(1000000);
    sent++;
  }
}

static void handle(const presence_event *event) {
  struct stream *s = event->tag ? &streams[event->tag - 1] : NULL;
  if (event->kind == PRESENCE_EVENT_REQUEST)
    begin(event->sender, "", (const char *)event->data, event->data_len);
  else if (event->kind == PRESENCE_EVENT_STOPPED && s && s->sender == event->sender)
    finish(s, event->status);
  else if (event->kind == PRESENCE_EVENT_WRITABLE && s && s->sender == event->sender)
    s->due_ns = now_ns();
}

/* Handles the streams that are due. Returns the milliseconds until the next one is due, or until a report is. */
static int handle_due_streams(void) {
  int64_t next = INT64_MAX, now = now_ns();
  for (struct stream *s = streams; s < streams + MAX_STREAMS; s++) {
    if (s->is_running && s->due_ns <= now) step(s);
    if (s->is_running && s->due_ns < next) next = s->due_ns;
  }
  now = now_ns();
  int64_t ms = next == INT64_MAX ? REPORT_MS : next > now ? (next - now + 999999) / 1000000 : 0;
  return ms < REPORT_MS ? (int)ms : REPORT_MS;
}

int main(int argc, char **argv) {
  presence_conn *conn = NULL;
  presence_queue *queue = NULL;
  presence_service *services[2];
  presence_config *config = presence_config_new();
  presence_event events[16];
  presence_error error = {0};
  if (argc != 4) return fprintf(stderr, "usage: worker MODE URL TEXT\n"), 2;
  is_plain = !strcmp(argv[1], "plain");
  setvbuf(stdout, NULL, _IOLBF, 0);
  model_load(argv[3]);

  struct pollfd fds[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.events = POLLIN}};
  static const char *const plain[] = {"plain.any", "plain.c"}, *const subjects[] = {"presence.any", "presence.c"};
  if (is_plain) {
    plain_connect(argv[2], plain, 2, "workers");
  } else {
    if (presence_config_set(config, "name", "C worker") || presence_config_set(config, "heartbeat_ms", "1000") ||
        presence_queue_new(&queue) || presence_connect(argv[2], config, &conn, &error) ||
        presence_serve(conn, queue, subjects[0], "workers", MAX_STREAMS, 0, &services[0], &error) ||
        presence_serve(conn, queue, subjects[1], "workers", MAX_STREAMS, 0, &services[1], &error))
      return fprintf(stderr, "%s\n", error.message), 1;
    fds[1].fd = presence_queue_fd(queue);
  }
  report_work();
  printf("{\"event\": \"ready\", \"at\": %" PRId64 "}\n", now_ns());
  int64_t reported = now_ns();
  bool was_running = false;
  while (!fds[0].revents) {
    if (is_plain) fds[1].fd = plain_fd();
    poll(fds, 2, handle_due_streams());
    if (is_plain) plain_read(begin_plain);
    int64_t count = is_plain ? 0 : presence_queue_wait(queue, events, 16, 0);
    for (int64_t i = 0; i < count; i++) handle(&events[i]);
    if ((running || was_running) && now_ns() - reported >= REPORT_MS * INT64_C(1000000)) {
      report_work();
      reported = now_ns();
      was_running = running;
    }
  }
  if (conn) presence_close(conn, 1000);
  presence_queue_free(queue);
  presence_config_free(config);
}
