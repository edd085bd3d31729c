/* A host that loads the library with dlopen (as Python does), unloads it, and loads it again while its threads run. */
#include "usage.h"
#include <dlfcn.h>
#include <pthread.h>

/* The functions that are used; a program that is not linked with the library looks them up. */
static struct {
  int32_t (*connect)(const char *, const presence_config *, presence_conn **, presence_error *);
  int32_t (*stats)(const presence_conn *, presence_stats *);
  int32_t (*close)(presence_conn *, int64_t);
  int32_t (*queue_new)(presence_queue **);
  int64_t (*wait)(presence_queue *, presence_event *, size_t, int64_t);
  void (*queue_free)(presence_queue *);
  int32_t (*serve)(presence_conn *, presence_queue *, const char *, const char *, uint32_t, uint64_t,
                   presence_service **, presence_error *);
  void (*service_free)(presence_service *);
  int32_t (*request)(presence_conn *, presence_queue *, const presence_request_args *, presence_stream **,
                     presence_error *);
  void (*stream_free)(presence_stream *);
  int32_t (*send)(presence_sender *, const void *, size_t);
  int32_t (*end)(presence_sender *);
  void (*sender_free)(presence_sender *);
  int32_t (*mark_online)(const char *);
  int32_t (*mark_offline)(const char *);
  bool (*is_online)(const char *);
  uint64_t (*count)(void);
} use;

static void *load(void) {
  void *library = dlopen(getenv("NATS_PRESENCE_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
  if (!library) fprintf(stderr, "%s\n", dlerror());
  CHECK(library);
  struct {
    void *to;
    const char *name;
  } wanted[] = {
      {&use.connect, "presence_connect"},         {&use.stats, "presence_conn_stats"},
      {&use.close, "presence_close"},             {&use.queue_new, "presence_queue_new"},
      {&use.wait, "presence_queue_wait"},         {&use.queue_free, "presence_queue_free"},
      {&use.serve, "presence_serve"},             {&use.service_free, "presence_service_free"},
      {&use.request, "presence_request"},         {&use.stream_free, "presence_stream_free"},
      {&use.send, "presence_sender_send"},        {&use.end, "presence_sender_end"},
      {&use.sender_free, "presence_sender_free"}, {&use.mark_online, "mark_client_online"},
      {&use.mark_offline, "mark_client_offline"}, {&use.is_online, "is_client_online"},
      {&use.count, "presence_online_count"},
  };
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
    void *found = dlsym(library, wanted[i].name);
    CHECK(found);
    memcpy(wanted[i].to, &found, sizeof found);
  }
  return library;
}

static presence_event next(presence_queue *queue, int32_t kind) {
  presence_event event;
  CHECK_EQ(use.wait(queue, &event, 1, TIMEOUT_MS), 1);
  CHECK_EQ(event.kind, kind);
  return event;
}

/* Its thread-locals are destroyed when this thread ends: after the library was "unloaded". */
static void *mark(void *may_end) {
  CHECK_EQ(use.mark_online("of a thread"), PRESENCE_OK);
  pthread_barrier_wait((pthread_barrier_t *)may_end);
  pthread_barrier_wait((pthread_barrier_t *)may_end);
  return NULL;
}

/* Processes load the library, use it, "unload" it and exit, as plugins do. It is not loaded here yet. */
static void thousands_of_processes_load_and_unload(void) {
  enum { AT_ONCE = 20 };
  int count = is_long ? 10000 : 2000;
  int64_t since = now_us();
  for (int i = 0; i < count; i += AT_ONCE) {
    pid_t children[AT_ONCE];
    for (int k = 0; k < AT_ONCE; k++) {
      children[k] = fork();
      CHECK(children[k] >= 0);
      if (children[k] > 0) continue;
      alarm(60);
      void *library = load();
      CHECK_EQ(use.mark_online("c"), PRESENCE_OK);
      CHECK_EQ(use.count(), 1);
      CHECK_EQ(dlclose(library), 0);
      exit(k);
    }
    for (int k = 0; k < AT_ONCE; k++) expect_exit(children[k], k);
  }
  if (is_long) FIGURE("10,000 processes that dlopen, call, dlclose and exit: %.1f s", (double)(now_us() - since) / 1e6);
}

static void load_again(int count) {
  for (int i = 0; i < count; i++) {
    void *library = load();
    CHECK(use.is_online("kept"));
    CHECK_EQ(dlclose(library), 0);
  }
}

/* One process loads and "unloads" the library again and again: it stays, and nothing grows. */
static void reloading_keeps_state_and_memory(void) {
  void *library = load();
  CHECK(!use.is_online("kept"));
  CHECK_EQ(use.mark_online("kept"), PRESENCE_OK);
  CHECK_EQ(dlclose(library), 0);
  load_again(100);
  usage before = use_now();
  int64_t since = now_us();
  load_again(10000);
  if (is_long) FIGURE("10,000 times dlopen, a call and dlclose in one process: %.1f s", (double)(now_us() - since) / 1e6);
  check_no_growth(before);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  thousands_of_processes_load_and_unload();
  /* Before there are threads, whose thread-locals would keep the library loaded. */
  reloading_keeps_state_and_memory();
  presence_conn *conn;
  presence_queue *queue;
  presence_service *service;
  presence_stream *stream;
  presence_stats stats;
  pthread_barrier_t may_end;
  pthread_t thread;

  void *library = load();
  CHECK(use.is_online("kept"));

  CHECK_EQ(use.connect(url, NULL, &conn, NULL), PRESENCE_OK);
  CHECK_EQ(use.queue_new(&queue), PRESENCE_OK);
  CHECK_EQ(use.serve(conn, queue, "unload", NULL, 0, 0, &service, NULL), PRESENCE_OK);
  const presence_request_args args = {sizeof args, "unload", NULL, 0, "c", 1, 0, NULL};
  CHECK_EQ(use.request(conn, queue, &args, &stream, NULL), PRESENCE_OK);
  presence_sender *sender = next(queue, PRESENCE_EVENT_REQUEST).sender;
  CHECK_EQ(pthread_barrier_init(&may_end, NULL, 2), 0);
  CHECK_EQ(pthread_create(&thread, NULL, mark, &may_end), 0);
  pthread_barrier_wait(&may_end);

  for (int round = 0; round < 3; round++) {
    memset(&use, 0, sizeof use);
    CHECK_EQ(dlclose(library), 0);
    if (round == 0) {
      pthread_barrier_wait(&may_end);
      CHECK_EQ(pthread_join(thread, NULL), 0);
    }
    library = load();
    /* It is the same library, and its streams go on. */
    CHECK(use.is_online("kept") && use.is_online("of a thread") && use.is_online("c"));
    CHECK_EQ(use.stats(conn, &stats), PRESENCE_OK);
    CHECK_EQ(stats.connects, 1);
    CHECK_EQ(stats.streams, 1);
    CHECK_EQ(use.send(sender, "x", 1), PRESENCE_OK);
    CHECK_EQ(next(queue, PRESENCE_EVENT_DATA).data_len, 1);
  }
  CHECK_EQ(use.end(sender), PRESENCE_OK);
  next(queue, PRESENCE_EVENT_END);
  use.sender_free(sender);
  use.stream_free(stream);
  use.service_free(service);
  CHECK_EQ(use.mark_offline("kept"), PRESENCE_OK);
  CHECK_EQ(use.mark_offline("of a thread"), PRESENCE_OK);
  CHECK_EQ(use.count(), 0);

  /* The process ends with a connection open and the library "unloaded". */
  CHECK_EQ(dlclose(library), 0);
  return 0;
}
