/* Sends that are blocked while nats-server does not read: whatever ends the sender ends the wait. */
#include "peer.h"
#include <time.h>

enum { SIZE = 1 << 16 };

static char data[SIZE];

struct wait {
  presence_sender *sender;
  int32_t result;
};

static void *block_on_send(void *argument) {
  struct wait *self = (struct wait *)argument;
  self->result = presence_sender_send_wait(self->sender, data, SIZE, -1);
  return NULL;
}

static pair both;

/* The ways to end a sender. */
static void by_end(void) { OK(presence_sender_end(both.sender)); }
static void by_error(void) { OK(presence_sender_error(both.sender, "enough", 6)); }
static void by_mark(void) { OK(mark_client_offline("c")); }
static void by_session(void) {
  presence_session *session;
  OK(presence_session_open("c", 1, &session));
  presence_session_close(session);
}
static void by_close(void) { CHECK_STATUS(presence_close(both.worker.conn, 0), PRESENCE_TIMEOUT); }

static void check_wait_ends(void (*end)(void), int32_t expected) {
  const char *server = getenv("NATS_SERVER_PID");
  CHECK(server && atoi(server) > 1);
  both.worker = open_peer_with("send_buffer_bytes=200000");
  both.gateway = open_peer();
  both.service = serve(both.worker, "waits");
  both.stream = request(both.gateway, "waits", "c", 1);
  both.sender = accept_request(both.worker);

  suspend(atoi(server));
  int32_t status;
  do status = presence_sender_send_wait(both.sender, data, SIZE, 300);
  while (status == PRESENCE_OK);
  CHECK_STATUS(status, PRESENCE_TIMEOUT);
  struct wait wait = {both.sender, 1};
  pthread_t thread = start_thread(block_on_send, &wait);
  usleep(100000); /* most likely it is blocked by now; if not, the test still holds */
  end();
  struct timespec deadline;
  clock_gettime(CLOCK_REALTIME, &deadline);
  deadline.tv_sec += 5; /* nothing else would end it: the server is still stopped */
  int joined = pthread_timedjoin_np(thread, NULL, &deadline);
  resume(atoi(server));
  CHECK_EQ(joined, 0);
  CHECK_STATUS(wait.result, expected);

  presence_sender_free(both.sender);
  presence_stream_free(both.stream);
  presence_service_free(both.service);
  if (end != by_close) OK(presence_close(both.worker.conn, TIMEOUT_MS));
  presence_queue_free(both.worker.queue);
  close_peer(both.gateway);
}

static void mark_ends_a_blocked_send(void) { check_wait_ends(by_mark, PRESENCE_OFFLINE); }
static void last_session_ends_a_blocked_send(void) { check_wait_ends(by_session, PRESENCE_OFFLINE); }
static void close_ends_a_blocked_send(void) { check_wait_ends(by_close, PRESENCE_CLOSED); }
static void end_ends_a_blocked_send(void) { check_wait_ends(by_end, PRESENCE_CLOSED); }
static void error_ends_a_blocked_send(void) { check_wait_ends(by_error, PRESENCE_CLOSED); }

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN_ON_BOTH(mark_ends_a_blocked_send);
  RUN_ON_BOTH(last_session_ends_a_blocked_send);
  RUN_ON_BOTH(close_ends_a_blocked_send);
  RUN_ON_BOTH(end_ends_a_blocked_send);
  RUN_ON_BOTH(error_ends_a_blocked_send);
  return 0;
}
