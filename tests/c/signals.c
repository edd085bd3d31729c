/* A host with a fast timer, whose signals interrupt every call; a host that receives SIGTERM or calls exit while a
 * connection closes. Each runs in its own process. */
#include "peer.h"
#include <sys/time.h>

static pid_t server; /* the process ID of nats-server */
static pair both;

/* Frequent signals ---------------------------------------------------------------------------------------------------- */

static int ticks; /* atomic */

static void tick(int number) {
  (void)number;
  __atomic_add_fetch(&ticks, 1, __ATOMIC_SEQ_CST);
  errno = EINTR; /* like a handler that forgets to restore it */
}

enum { COUNT = 20000 };

static void *read_all(void *unused) {
  for (int i = 0; i < COUNT; i++) {
    presence_event event = expect(both.gateway.queue, PRESENCE_EVENT_DATA);
    CHECK(event.data_len == sizeof i && memcmp(event.data, &i, sizeof i) == 0);
  }
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  return unused;
}

/* Ten thousand signals a second, without SA_RESTART, on any thread: nothing fails, and no wait ends early. */
static void role_frequent_signals_interrupt_nothing(void) {
  struct sigaction own;
  struct itimerval often = {{0, 100}, {0, 100}}, never = {{0, 0}, {0, 0}};
  memset(&own, 0, sizeof own);
  own.sa_handler = tick;
  CHECK_EQ(sigaction(SIGALRM, &own, NULL), 0);
  CHECK_EQ(setitimer(ITIMER_REAL, &often, NULL), 0);
  both = open_pair("c");
  pthread_t reader = start_thread(read_all, NULL);
  for (int i = 0; i < COUNT; i++) OK(presence_sender_send_wait(both.sender, &i, sizeof i, -1));
  OK(presence_sender_end(both.sender));
  join_thread(reader);

  int before = __atomic_load_n(&ticks, __ATOMIC_SEQ_CST);
  int64_t since = now_ms();
  presence_event event;
  CHECK_EQ(presence_queue_wait(both.gateway.queue, &event, 1, 300), 0);
  CHECK(now_ms() - since >= 299);
  CHECK(__atomic_load_n(&ticks, __ATOMIC_SEQ_CST) > before + 100);
  OK(mark_client_offline("c"));
  OK(presence_listen_offline(both.gateway.conn));
  close_pair(both);
  CHECK_EQ(setitimer(ITIMER_REAL, &never, NULL), 0);
}

static void frequent_signals_interrupt_nothing(void) { expect_exit(start("role_frequent_signals_interrupt_nothing"), 0); }

/* Ending the process during a close ----------------------------------------------------------------------------------- */

enum { SENT = 1000 };

/* Serves one stream and closes the connection before nats-server has read its messages. `meanwhile` runs in another
 * thread once the close has begun. */
static void serve_and_close(void *(*meanwhile)(void *)) {
  peer self = open_peer();
  presence_service *service = serve(self, "drain");
  presence_sender *sender = accept_request(self);
  OK(send_text(sender, "begins"));
  run_whole_stream(self, second_queue(self), "drain");
  suspend(server);
  for (int i = 0; i < SENT; i++) OK(presence_sender_send(sender, &i, sizeof i));
  OK(presence_sender_end(sender));
  start_thread(meanwhile, self.conn);
  OK(presence_close(self.conn, -1));
  presence_sender_free(sender);
  presence_service_free(service);
  exit(7);
}

/* Returns when presence_close has begun: the handle is closed from then on. */
static void wait_for_close(void *conn) {
  presence_stats stats;
  while (presence_conn_stats((presence_conn *)conn, &stats) == PRESENCE_OK) usleep(100);
}

static void *terminate(void *conn) {
  wait_for_close(conn);
  for (int i = 0; i < 20; i++) {
    CHECK_EQ(kill(getpid(), SIGTERM), 0);
    usleep(1000);
  }
  resume(server);
  return NULL;
}

static void role_handles_sigterm(void) {
  struct sigaction own;
  memset(&own, 0, sizeof own);
  own.sa_handler = tick;
  CHECK_EQ(sigaction(SIGTERM, &own, NULL), 0);
  serve_and_close(terminate);
}

static void role_dies_of_sigterm(void) { serve_and_close(terminate); }

static void *call_exit(void *conn) {
  wait_for_close(conn);
  exit(8);
}

static void role_calls_exit(void) { serve_and_close(call_exit); }

static pid_t start_and_request(const char *role, peer gateway, presence_stream **stream) {
  pid_t other = start(role);
  *stream = request_with(gateway, "drain", "c", 1, "retries=100000");
  expect_data(gateway.queue, "begins");
  return other;
}

/* The close continues: all messages are drained, and the exit status is the host's. */
static void close_drains_despite_handled_sigterm(void) {
  peer gateway = open_peer();
  presence_stream *stream;
  pid_t other = start_and_request("role_handles_sigterm", gateway, &stream);
  for (int i = 0; i < SENT; i++) {
    presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
    CHECK(event.data_len == sizeof i && memcmp(event.data, &i, sizeof i) == 0);
  }
  expect(gateway.queue, PRESENCE_EVENT_END);
  expect_exit(other, 7);
  presence_stream_free(stream);
  close_peer(gateway);
}

/* The host ends at once. */
static void end_during_close(const char *role, int signal_number, int code) {
  peer gateway = open_peer();
  presence_stream *stream;
  pid_t other = start_and_request(role, gateway, &stream);
  int status;
  CHECK_EQ(waitpid(other, &status, 0), other); /* while nats-server is stopped */
  resume(server);
  CHECK_EQ(WIFSIGNALED(status) ? WTERMSIG(status) : 0, signal_number);
  if (!signal_number) CHECK_EQ(WEXITSTATUS(status), code);
  presence_stream_free(stream);
  close_peer(gateway);
}

static void unhandled_sigterm_during_close_ends_the_process(void) { end_during_close("role_dies_of_sigterm", SIGTERM, 0); }
static void exit_during_close_ends_the_process(void) { end_during_close("role_calls_exit", 0, 8); }

int main(int argc, char **argv) {
  begin(argc, argv);
  const char *pid = getenv("NATS_SERVER_PID");
  CHECK(pid && atoi(pid) > 1);
  server = atoi(pid);
  ROLE(role_frequent_signals_interrupt_nothing);
  ROLE(role_handles_sigterm);
  ROLE(role_dies_of_sigterm);
  ROLE(role_calls_exit);
  RUN_ON_BOTH(frequent_signals_interrupt_nothing);
  RUN_ON_BOTH(close_drains_despite_handled_sigterm);
  RUN_ON_BOTH(unhandled_sigterm_during_close_ends_the_process);
  RUN_ON_BOTH(exit_during_close_ends_the_process);
  return 0;
}
