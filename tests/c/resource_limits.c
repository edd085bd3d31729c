/* The process is out of descriptors, threads or memory: calls return a status, and work again later. Each test runs
 * in its own process. */
#include "server.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>

/* Descriptors --------------------------------------------------------------------------------------------------------- */

enum { LIMIT = 256 };
static int taken[LIMIT], taken_count;

/* Opens all descriptors that the limit allows, except `but`. */
static void take_descriptors(int but) {
  struct rlimit limit = {LIMIT, LIMIT};
  CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  for (int fd; (fd = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0;) taken[taken_count++] = fd;
  CHECK_EQ(errno, EMFILE);
  while (but-- > 0 && taken_count > 0) close(taken[--taken_count]);
}

static void give_descriptors_back(void) {
  while (taken_count > 0) close(taken[--taken_count]);
}

/* The first connection needs descriptors for the runtime, too: it fails until there are enough. */
static void role_first_connection_without_descriptors_fails(void) {
  presence_conn *conn = NULL;
  int free_ones = 0;
  for (int32_t status = PRESENCE_INVALID; status != PRESENCE_OK; free_ones++) {
    presence_error error = {0, ""};
    CHECK(free_ones < 64);
    take_descriptors(free_ones);
    status = presence_connect(url, NULL, &conn, &error);
    give_descriptors_back();
    if (status == PRESENCE_OK) continue;
    CHECK_STATUS(status, PRESENCE_FULL);
    CHECK_EQ(error.status, status);
    CHECK_CONTAINS(error.message, "open files"); /* the system's words */
    CHECK(!conn);
  }
  CHECK(free_ones > 1);
  OK(presence_close(conn, TIMEOUT_MS));
}

/* Streams go on; a second connection and a queue's descriptor are refused. */
static void role_further_connections_without_descriptors_fail(void) {
  pair both = open_pair("c");
  presence_conn *conn = NULL;
  presence_queue *queue;
  presence_error error = {0, ""};
  OK(presence_queue_new(&queue));
  take_descriptors(0);
  for (int round = 0; round < 100; round++) {
    int32_t status = presence_connect(url, NULL, &conn, &error);
    CHECK_STATUS(status, PRESENCE_FULL);
    CHECK(!conn);
    CHECK_CONTAINS(error.message, "open files");
    CHECK(presence_queue_fd(queue) < 0);
    OK(send_text(both.sender, "goes on"));
    expect_data(both.gateway.queue, "goes on");
  }
  presence_queue *more;
  int32_t status = presence_queue_new(&more);
  if (status == PRESENCE_OK) presence_queue_free(more); /* it needs no descriptor until presence_queue_fd */
  give_descriptors_back();
  CHECK(presence_queue_fd(queue) >= 0);
  OK(presence_connect(url, NULL, &conn, &error));
  OK(presence_close(conn, TIMEOUT_MS));
  presence_queue_free(queue);
  close_pair(both);
}

/* The connection is lost while no descriptor is free: it is made again when there is one, and lanes go on. */
static void role_reconnect_waits_for_descriptors(void) {
  own_server server = new_server();
  pair both;
  both.worker = open_peer_at(server.url, "reconnect_max_ms=200");
  both.gateway = open_peer_at(server.url, "reconnect_max_ms=200");
  both.service = serve(both.worker, "pair");
  both.stream = request(both.gateway, "pair", "c", 1);
  both.sender = accept_request(both.worker);
  run_whole_stream(both.worker, both.gateway, "pair");
  kill_server(&server);
  while (stats_of(both.worker).connected || stats_of(both.gateway).connected) usleep(1000);
  take_descriptors(0);
  give_descriptors_back(); /* so that the new server can start */
  start_server(&server);
  take_descriptors(0);
  uint64_t connects = stats_of(both.worker).connects;
  usleep(300000); /* attempts fail meanwhile, unless it reconnected before */
  if (stats_of(both.worker).connects == connects) CHECK_EQ(stats_of(both.worker).connected, 0);
  OK(send_text(both.sender, "meanwhile"));
  give_descriptors_back();
  presence_event event;
  do CHECK_EQ(presence_queue_wait(both.gateway.queue, &event, 1, TIMEOUT_MS), 1);
  while (event.kind >= PRESENCE_EVENT_CONNECTED);
  CHECK_EQ(event.kind, PRESENCE_EVENT_DATA);
  CHECK(is_text(event.data, event.data_len, "meanwhile"));
  OK(presence_sender_end(both.sender));
  close_pair(both);
  kill_server(&server);
}

/* Memory -------------------------------------------------------------------------------------------------------------- */

static long address_space(void) {
  long pages;
  FILE *statm = fopen("/proc/self/statm", "r");
  CHECK(statm);
  CHECK_EQ(fscanf(statm, "%ld", &pages), 1);
  fclose(statm);
  return pages * sysconf(_SC_PAGESIZE);
}

/* Like ulimit -v, `more` bytes above the current use; 0: no limit. */
static void limit_memory(long more) {
  struct rlimit limit;
  CHECK_EQ(getrlimit(RLIMIT_AS, &limit), 0);
  limit.rlim_cur = more ? (rlim_t)(address_space() + more) : limit.rlim_max;
  CHECK_EQ(setrlimit(RLIMIT_AS, &limit), 0);
}

/* If the system has no more threads, connecting fails with a status. */
static void role_connect_without_threads_fails(void) {
  presence_conn *conn = NULL;
  presence_error error = {0, ""};
  limit_memory(1 << 20); /* less than a thread's stack */
  int32_t status = presence_connect(url, NULL, &conn, &error);
  limit_memory(0);
  CHECK_STATUS(status, PRESENCE_FULL);
  CHECK_EQ(error.status, status);
  CHECK_CONTAINS(error.message, "thread");
  CHECK(!conn);

  /* The runtime exists, and needs a further thread to resolve a name. */
  pair both = open_pair("c");
  char by_name[100];
  const char *port = strrchr(url, ':');
  CHECK(port);
  snprintf(by_name, sizeof by_name, "nats://localhost%s", port);
  limit_memory(1 << 20);
  status = presence_connect(by_name, NULL, &conn, &error);
  OK(send_text(both.sender, "goes on"));
  expect_data(both.gateway.queue, "goes on");
  limit_memory(0);
  CHECK(status == PRESENCE_DISCONNECTED || status == PRESENCE_INTERNAL);
  CHECK(!conn);
  OK(presence_connect(by_name, NULL, &conn, &error));
  OK(presence_close(conn, TIMEOUT_MS));
  close_pair(both);
}

/* Requests, sends and marks until memory is exhausted: the process ends as the host does it, or by the abort of
 * Rust's allocator. It never hangs, and nothing else goes wrong. */
static void role_exhausted_memory_aborts(void) {
  static char data[100000];
  const char *more = getenv("MORE");
  CHECK(more);
  pair both = open_pair("c");
  run_whole_stream(both.worker, both.gateway, "pair");
  limit_memory(atol(more));
  for (int i = 0; i < 1000; i++) {
    char id[1000];
    presence_stream *stream;
    presence_queue *queue;
    memset(id, 'x', sizeof id);
    snprintf(id, sizeof id - 1, "%d", i);
    (void)presence_mark_online(id, sizeof id);
    /* Any status is allowed. */
    if (presence_sender_send(both.sender, data, sizeof data)) {}
    if (presence_queue_new(&queue)) {}
    if (start_request(both.gateway.conn, both.gateway.queue, "pair", data, sizeof data, id, 10, NULL, 2, &stream, NULL)) {}
    presence_config_free(presence_config_new());
  }
  _exit(0);
}

static void exhausted_memory_aborts(void) {
  int aborted = 0;
  for (long more = 1 << 16; more <= 1 << 26; more *= 4) {
    char text[24];
    int status;
    snprintf(text, sizeof text, "%ld", more);
    CHECK_EQ(setenv("MORE", text, 1), 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      if (!freopen("/dev/null", "w", stderr)) _exit(126); /* hides the allocator's message */
      execl("/proc/self/exe", "test", url, "role_exhausted_memory_aborts", (char *)NULL);
      _exit(127);
    }
    CHECK_EQ(waitpid(child, &status, 0), child); /* its alarm ends it if it hangs */
    if (WIFSIGNALED(status)) CHECK_EQ(WTERMSIG(status), SIGABRT);
    else CHECK_EQ(WEXITSTATUS(status), 0);
    aborted += WIFSIGNALED(status);
  }
  CHECK(aborted > 0); /* memory was short */
}

static void first_connection_without_descriptors_fails(void) { expect_exit(start("role_first_connection_without_descriptors_fails"), 0); }
static void further_connections_without_descriptors_fail(void) { expect_exit(start("role_further_connections_without_descriptors_fail"), 0); }
static void reconnect_waits_for_descriptors(void) { expect_exit(start("role_reconnect_waits_for_descriptors"), 0); }
static void connect_without_threads_fails(void) { expect_exit(start("role_connect_without_threads_fails"), 0); }

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(role_first_connection_without_descriptors_fails);
  ROLE(role_further_connections_without_descriptors_fail);
  ROLE(role_reconnect_waits_for_descriptors);
  ROLE(role_connect_without_threads_fails);
  ROLE(role_exhausted_memory_aborts);
  RUN(first_connection_without_descriptors_fails);
  RUN(further_connections_without_descriptors_fail);
  RUN(reconnect_waits_for_descriptors);
  RUN(connect_without_threads_fails);
  RUN(exhausted_memory_aborts);
  return 0;
}
