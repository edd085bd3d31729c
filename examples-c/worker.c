/*
 * A worker: streams pieces to many clients from one thread, and stops for each the moment it leaves.
 *
 *   worker [URL [SUBJECT [GROUP [PIECES [DELAY_MS]]]]]
 *
 * Every stream has PIECES messages, one each DELAY_MS milliseconds. At its end a line tells the client, how many
 * messages were sent, and why it ended. Several workers in one GROUP share the requests. SIGINT and SIGTERM stop it.
 */
#define _POSIX_C_SOURCE 200809L
#include <nats_presence.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_STREAMS = 1000, MAX_EVENTS = 64, NO_PIECE = -1 };

/* A stream that is being answered. A real worker would keep its results so far here. */
struct job {
  presence_sender *sender; /* NULL: this place is free */
  char client[1025]; /* An id has at most 1024 bytes. */
  uint64_t sent;
  int64_t due; /* When the next piece is due, by now_ms; NO_PIECE while the sender is blocked. */
};

static struct job jobs[MAX_STREAMS];
static size_t job_count;
static presence_queue *queue;
static atomic_bool stopping;
static uint64_t pieces = 1000;
static int64_t delay_ms = 100;

static void check(const char *what, int32_t status, const presence_error *error) {
  if (status == PRESENCE_OK) return;
  fprintf(stderr, "%s: %s\n", what, error ? error->message : presence_status_text(status));
  exit(1);
}

static int64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int64_t number(const char *text, const char *what) {
  char *end;
  long long value = strtoll(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < 0 || value > 1000000000) {
    fprintf(stderr, "%s is \"%s\": a number from 0 to 1000000000 is needed\n", what, text);
    exit(2);
  }
  return value;
}

static void begin(const presence_event *request) {
  /* We own the sender now: it lives until we free it, and may be used at any time until then. */
  if (job_count == MAX_STREAMS) {
    presence_sender_error(request->sender, "server busy", strlen("server busy"));
    presence_sender_free(request->sender);
    return;
  }
  struct job *job = jobs;
  while (job->sender) job++;
  job_count++;
  job->sender = request->sender;
  /* The sender's events have this tag from now on, so that handle() finds the job. */
  check("presence_sender_set_tag", presence_sender_set_tag(job->sender, (uint64_t)(job - jobs)), NULL);
  job->sent = 0;
  job->due = now_ms();
  /* The event's text is valid only until the next wait, and is not NUL-terminated. */
  snprintf(job->client, sizeof job->client, "%.*s", (int)request->client_len, request->client);
}

/* Ends a job, and frees its place in the table. */
static void finish(struct job *job, const char *why) {
  printf("%s: sent %" PRIu64 ", %s\n", job->client[0] ? job->client : "(anonymous)", job->sent, why);
  presence_sender_free(job->sender);
  job->sender = NULL;
  job_count--;
}

static void handle(const presence_event *event) {
  switch (event->kind) {
    case PRESENCE_EVENT_REQUEST:
      begin(event);
      break;
    case PRESENCE_EVENT_STOPPED: /* Mostly PRESENCE_OFFLINE: the client left. */
      finish(&jobs[event->tag], presence_status_text(event->status));
      break;
    case PRESENCE_EVENT_WRITABLE: /* The sender is writable again after PRESENCE_FULL. */
      jobs[event->tag].due = now_ms();
      break;
    case PRESENCE_EVENT_DISCONNECTED:
    case PRESENCE_EVENT_LOG:
      fprintf(stderr, "worker: %.*s\n", (int)event->data_len, (const char *)event->data);
      break;
    default: /* Later versions may add kinds of events. */
      break;
  }
}

/* Sends the next piece, and ends the stream after the last one. */
static void advance(struct job *job) {
  if (job->sent < pieces) {
    char piece[32];
    int length = snprintf(piece, sizeof piece, "piece %" PRIu64, job->sent);
    int32_t status = presence_sender_send(job->sender, piece, (size_t)length);
    if (status == PRESENCE_FULL) { /* Sending never blocks: go on with the others. */
      job->due = NO_PIECE;
      return;
    }
    if (status != PRESENCE_OK) { /* A freed sender has no more events, so STOPPED does not follow. */
      finish(job, presence_status_text(status));
      return;
    }
    job->sent++;
    job->due += delay_ms;
  }
  if (job->sent == pieces) {
    int32_t status = presence_sender_end(job->sender); /* The client may have left meanwhile. */
    finish(job, status == PRESENCE_OK ? "all" : presence_status_text(status));
  }
}

/* Sends all pieces that are due. Returns the milliseconds until the next one is, or -1 if there is none. */
static int64_t advance_all(void) {
  int64_t now = now_ms(), next = -1;
  for (struct job *job = jobs; job < jobs + MAX_STREAMS; job++) {
    if (job->sender && job->due != NO_PIECE && job->due <= now) advance(job);
    if (!job->sender || job->due == NO_PIECE) continue;
    int64_t wait = job->due > now ? job->due - now : 0;
    if (next < 0 || wait < next) next = wait;
  }
  return next;
}

/* Signals get their own thread, which wakes the loop: presence_queue_wake may be called from any thread. */
static void *wait_for_signal(void *signals) {
  int signal;
  sigwait(signals, &signal);
  atomic_store(&stopping, true);
  presence_queue_wake(queue);
  return NULL;
}

int main(int argc, char **argv) {
  const char *url = argc > 1 ? argv[1] : "nats://127.0.0.1:4222";
  const char *subject = argc > 2 ? argv[2] : "demo.stream";
  const char *group = argc > 3 ? argv[3] : "workers";
  if (argc > 4) pieces = (uint64_t)number(argv[4], "PIECES");
  if (argc > 5) delay_ms = number(argv[5], "DELAY_MS");
  setvbuf(stdout, NULL, _IOLBF, 0);

  presence_error error;
  presence_conn *conn;
  presence_service *service;
  presence_config *config = presence_config_new(); /* Options are text, set by name; the header lists them. */
  check("presence_config_set", presence_config_set(config, "name", "worker in C"), NULL);
  check("presence_connect", presence_connect(url, config, &conn, &error), &error);
  presence_config_free(config);

  check("presence_queue_new", presence_queue_new(&queue), NULL);
  check("presence_conn_watch", presence_conn_watch(conn, queue, 0), NULL);

  pthread_t signal_thread;
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, NULL);
  if (pthread_create(&signal_thread, NULL, wait_for_signal, &signals)) return perror("pthread_create"), 1;
  pthread_detach(signal_thread);

  check("presence_serve", presence_serve(conn, queue, subject, group, MAX_STREAMS, 0, &service, &error), &error);
  printf("serving %s\n", subject);

  presence_event events[MAX_EVENTS];
  while (!atomic_load(&stopping)) {
    int64_t count = presence_queue_wait(queue, events, MAX_EVENTS, advance_all());
    if (count < 0) check("presence_queue_wait", (int32_t)count, NULL);
    for (int64_t i = 0; i < count; i++) handle(&events[i]);
  }

  /* Take no more requests, end the running streams, and wait (a second at most) until the server has everything. */
  presence_service_free(service);
  for (struct job *job = jobs; job < jobs + MAX_STREAMS; job++) {
    if (!job->sender) continue;
    presence_sender_error(job->sender, "the worker is stopping", strlen("the worker is stopping"));
    finish(job, "the worker is stopping");
  }
  int32_t status = presence_close(conn, 1000);
  presence_queue_free(queue);
  check("presence_close", status, NULL);
  return 0;
}
