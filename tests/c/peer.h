/* Workers and gateways for tests: connections of this process, each with its own queue. */
#ifndef PEER_H
#define PEER_H

#include "check.h"
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>

typedef struct peer {
  presence_conn *conn;
  presence_queue *queue;
} peer;

/* True if new connections use lanes; processes that a test starts inherit this from its environment. */
static inline bool on_lanes(void) {
  const char *lanes = getenv("LANES");
  return !lanes || strcmp(lanes, "true") == 0;
}

/* presence_request, with its arguments in one line. */
static inline presence_status start_request(presence_conn *conn, presence_queue *queue, const char *subject,
                                            const void *data, size_t data_len, const char *client, size_t client_len,
                                            const presence_config *config, uint64_t tag, presence_stream **stream,
                                            presence_error *error) {
  const presence_request_args args = {sizeof args, subject, data, data_len, client, client_len, tag, config};
  return presence_request(conn, queue, &args, stream, error);
}

/* The status of a sender whose stream was cancelled: level 0 can only announce that the client left. */
#define CANCELLED (on_lanes() ? PRESENCE_CANCELLED : PRESENCE_OFFLINE)

/* Sets options, "KEY=VALUE KEY=VALUE...", or none (NULL). */
static inline void set_options(presence_config *config, const char *options) {
  char key[64], value[128];
  for (int length; options && sscanf(options, " %63[^= ]=%127[^ ]%n", key, value, &length) == 2; options += length) {
    OK(presence_config_set(config, key, value));
  }
  CHECK(!options || !*options);
}

/* Connects with options. */
static inline peer open_peer_with(const char *options) {
  peer self;
  presence_config *config = presence_config_new();
  presence_error error;
  OK(presence_config_set(config, "lanes", on_lanes() ? "true" : "false"));
  set_options(config, options);
  OK(presence_connect(url, config, &self.conn, &error));
  OK(presence_queue_new(&self.queue));
  presence_config_free(config);
  return self;
}

static inline peer open_peer(void) { return open_peer_with(NULL); }

/* The same connection with another queue. */
static inline peer second_queue(peer other) {
  OK(presence_queue_new(&other.queue));
  return other;
}

static inline void close_peer(peer self) {
  OK(presence_close(self.conn, TIMEOUT_MS));
  presence_queue_free(self.queue);
}

/* The number of threads of a process that are not stopped. */
static inline int count_running(pid_t process) {
  char path[300];
  int count = 0;
  snprintf(path, sizeof path, "/proc/%d/task", (int)process);
  DIR *tasks = opendir(path);
  CHECK(tasks);
  for (struct dirent *task; (task = readdir(tasks));) {
    char state = 0;
    if (*task->d_name == '.') continue;
    snprintf(path, sizeof path, "/proc/%d/task/%s/stat", (int)process, task->d_name);
    FILE *stat = fopen(path, "r");
    if (!stat) continue; /* the thread has ended meanwhile */
    count += fscanf(stat, "%*d (%*[^)]) %c", &state) != 1 || state != 'T';
    fclose(stat);
  }
  closedir(tasks);
  return count;
}

/* Stops a process and returns when all its threads are stopped. (kill alone does not wait for that.) */
static inline void suspend(pid_t process) {
  CHECK_EQ(kill(process, SIGSTOP), 0);
  while (count_running(process) > 0) usleep(100);
}

static inline void resume(pid_t process) { CHECK_EQ(kill(process, SIGCONT), 0); }

/* Returns the next event of a queue, which must be of this kind. */
#define expect(queue, kind) expect_at(queue, kind, __FILE__, __LINE__)
static inline presence_event expect_at(presence_queue *queue, int32_t kind, const char *file, int line) {
  presence_event event;
  memset(&event, 0, sizeof event);
  int64_t count = presence_queue_wait(queue, &event, 1, TIMEOUT_MS);
  if (count != 1 || event.kind != kind) {
    begin_failure(file, line);
    fprintf(stderr, "wait gives %d, event %d (status %d, \"%.*s\") instead of event %d", (int)count, (int)event.kind,
            (int)event.status, (int)event.data_len, event.data ? (const char *)event.data : "", (int)kind);
    end_failure();
  }
  /* Fields that an event of its kind does not have are NULL, and others are not: Go rejects invalid addresses. */
  bool may_be_of_a_service = kind == PRESENCE_EVENT_CONNECTED || kind == PRESENCE_EVENT_DISCONNECTED;
  CHECK(may_be_of_a_service || !event.subject == (kind != PRESENCE_EVENT_REQUEST));
  CHECK(kind != PRESENCE_EVENT_DATA || (event.data && !event.client));
  CHECK(kind != PRESENCE_EVENT_REQUEST || (event.data && event.client));
  CHECK(kind != PRESENCE_EVENT_END || !event.data_len);
  CHECK(((uintptr_t)event.client | (uintptr_t)event.subject | (uintptr_t)event.data) != 1);
  return event;
}

/* Returns the next event, which must be of this kind and have this status. */
#define expect_status(queue, kind, expected) expect_status_at(queue, kind, expected, __FILE__, __LINE__)
static inline presence_event expect_status_at(presence_queue *queue, int32_t kind, int32_t status, const char *file,
                                              int line) {
  presence_event event = expect_at(queue, kind, file, line);
  if (event.status != status) {
    begin_failure(file, line);
    fprintf(stderr, "event %d has status %d (%.*s), not %d", (int)kind, (int)event.status, (int)event.data_len,
            (const char *)event.data, (int)status);
    end_failure();
  }
  return event;
}

/* Checks that the queue is empty. */
static inline void expect_nothing(presence_queue *queue) {
  presence_event event;
  CHECK_EQ(presence_queue_wait(queue, &event, 1, 0), 0);
}

static inline bool is_text(const void *data, size_t length, const char *text) {
  return length == strlen(text) && memcmp(data, text, length) == 0;
}

#define expect_data(queue, text)                                         \
  do {                                                                   \
    presence_event event_ = expect(queue, PRESENCE_EVENT_DATA);          \
    CHECK(is_text(event_.data, event_.data_len, text));                  \
  } while (0)

static inline presence_service *serve(peer worker, const char *subject) {
  presence_service *service;
  OK(presence_serve(worker.conn, worker.queue, subject, NULL, 0, 0, &service, NULL));
  return service;
}

/* Requests a stream with options. */
static inline presence_stream *request_with(peer gateway, const char *subject, const char *client, uint64_t tag,
                                            const char *options) {
  presence_stream *stream;
  presence_config *config = presence_config_new();
  set_options(config, options);
  OK(start_request(gateway.conn, gateway.queue, subject, NULL, 0, client, strlen(client), config, tag, &stream, NULL));
  presence_config_free(config);
  return stream;
}

static inline presence_stream *request(peer gateway, const char *subject, const char *client, uint64_t tag) {
  return request_with(gateway, subject, client, tag, NULL);
}

/* The sender of the next request. */
static inline presence_sender *accept_request(peer worker) {
  return expect(worker.queue, PRESENCE_EVENT_REQUEST).sender;
}

static inline int32_t send_text(presence_sender *sender, const char *text) {
  return presence_sender_send(sender, text, strlen(text));
}

static inline uint32_t status_word(const presence_sender *sender) {
  return __atomic_load_n(presence_sender_status_word(sender), __ATOMIC_RELAXED);
}

static inline presence_stats stats_of(peer self) {
  presence_stats stats;
  OK(presence_conn_stats(self.conn, &stats));
  return stats;
}

/* Runs one whole stream: when it has ended, the gateway knows the lane of every stream before it. */
static inline void run_whole_stream(peer worker, peer gateway, const char *subject) {
  presence_stream *stream = request(gateway, subject, "", 0);
  presence_sender *sender = accept_request(worker);
  OK(presence_sender_end(sender));
  CHECK(expect(gateway.queue, PRESENCE_EVENT_END).stream == stream);
  presence_sender_free(sender);
  presence_stream_free(stream);
}

/* A worker and a gateway, each with its own connection, and one stream between them. */
typedef struct pair {
  peer worker, gateway;
  presence_service *service;
  presence_stream *stream;
  presence_sender *sender;
} pair;

/* Opens a pair with options of the request. */
static inline pair open_pair_with(const char *client, const char *options) {
  pair self;
  self.worker = open_peer();
  self.gateway = open_peer();
  self.service = serve(self.worker, "pair");
  self.stream = request_with(self.gateway, "pair", client, 1, options);
  self.sender = accept_request(self.worker);
  return self;
}

static inline pair open_pair(const char *client) { return open_pair_with(client, NULL); }

static inline void close_pair(pair self) {
  presence_sender_free(self.sender);
  presence_stream_free(self.stream);
  presence_service_free(self.service);
  close_peer(self.gateway);
  close_peer(self.worker);
}

static inline pthread_t start_thread(void *(*body)(void *), void *argument) {
  pthread_t thread;
  CHECK_EQ(pthread_create(&thread, NULL, body, argument), 0);
  return thread;
}

static inline void join_thread(pthread_t thread) { CHECK_EQ(pthread_join(thread, NULL), 0); }

#endif
