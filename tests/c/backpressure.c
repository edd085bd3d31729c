/* Backpressure: a full send buffer, a slow reader, a server that does not read. */
#include "peer.h"

static pid_t server; /* the process ID of nats-server */

/* A pair whose worker has a send buffer of a chosen size. */
static pair open_pair_with_buffer(const char *client, const char *send_buffer_bytes) {
  pair self;
  self.worker = open_peer_with(send_buffer_bytes);
  self.gateway = open_peer();
  self.service = serve(self.worker, "flow");
  /* The window is large: the reader reads when everything has been sent. */
  self.stream = request_with(self.gateway, "flow", client, 1, "stream_buffer_bytes=67108864");
  self.sender = accept_request(self.worker);
  return self;
}

/* Reads `count` messages of a stream, numbered from `first`. */
static void read_numbers(peer gateway, int first, int count) {
  for (int i = first; i < first + count; i++) {
    presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
    CHECK(event.data_len == sizeof i && memcmp(event.data, &i, sizeof i) == 0);
  }
}

static void full_is_followed_by_writable(void) {
  pair both = open_pair_with_buffer("c", "send_buffer_bytes=1000");
  int sent = 0;
  for (int round = 0; round < 100; round++) {
    int32_t status;
    while ((status = presence_sender_send(both.sender, &sent, sizeof sent)) == PRESENCE_OK) sent++;
    CHECK_STATUS(status, PRESENCE_FULL);
    CHECK_EQ(presence_sender_send_count(both.sender), sent);
    CHECK_EQ(status_word(both.sender), 0); /* still allowed to send, only blocked */
    CHECK(expect(both.worker.queue, PRESENCE_EVENT_WRITABLE).sender == both.sender);
  }
  OK(presence_sender_end(both.sender)); /* an end is accepted even when the buffer is full */
  read_numbers(both.gateway, 0, sent);
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  close_pair(both);
}

static void send_wait_blocks_until_writable(void) {
  enum { COUNT = 20000 };
  pair both = open_pair_with_buffer("c", "send_buffer_bytes=1000");
  for (int i = 0; i < COUNT; i++) OK(presence_sender_send_wait(both.sender, &i, sizeof i, -1));
  OK(presence_sender_end(both.sender));
  read_numbers(both.gateway, 0, COUNT);
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  close_pair(both);
}

/* A message larger than the whole buffer is sent alone. */
static void message_larger_than_the_send_buffer(void) {
  pair both = open_pair_with_buffer("c", "send_buffer_bytes=1000");
  char large[5000];
  memset(large, 'x', sizeof large);
  for (int i = 0; i < 10; i++) {
    OK(presence_sender_send_wait(both.sender, large, sizeof large, TIMEOUT_MS));
    CHECK_EQ(expect(both.gateway.queue, PRESENCE_EVENT_DATA).data_len, sizeof large);
  }
  close_pair(both);
}

struct wait {
  presence_sender *sender;
  int32_t result;
};

static void *block_on_send(void *argument) {
  static const char data[1 << 16] = {0};
  struct wait *wait = (struct wait *)argument;
  wait->result = presence_sender_send_wait(wait->sender, data, sizeof data, -1);
  return NULL;
}

/* nats-server does not read: the pending bytes stay within their limit, and whatever ends a sender ends its wait. */
static void stopped_server_bounds_the_send_buffer(void) {
  enum { SIZE = 1 << 16, SOCKETS = 24 << 20 /* the most that the system's buffers hold */ };
  static char data[SIZE];
  pair both = open_pair_with_buffer("leaves", "send_buffer_bytes=200000");
  presence_stream *streams[] = {request(both.gateway, "flow", "ends", 2), request(both.gateway, "flow", "stays", 3)};
  presence_sender *ends = accept_request(both.worker), *stays = accept_request(both.worker);

  suspend(server);
  int64_t accepted = 0;
  int32_t status;
  while ((status = presence_sender_send_wait(stays, data, SIZE, 300)) == PRESENCE_OK) {
    accepted += SIZE;
    CHECK(accepted <= SOCKETS);
  }
  CHECK_STATUS(status, PRESENCE_TIMEOUT);
  CHECK_STATUS(presence_sender_send(stays, data, SIZE), PRESENCE_FULL);
  CHECK(stats_of(both.worker).bytes_waiting > 0);
  CHECK(stats_of(both.worker).bytes_waiting <= 200000 + 4096); /* ends are always accepted */

  struct wait waits[] = {{both.sender, 0}, {ends, 0}};
  pthread_t threads[] = {start_thread(block_on_send, &waits[0]), start_thread(block_on_send, &waits[1])};
  usleep(50000); /* most likely they are blocked by now; if not, the test still holds */
  OK(mark_client_offline("leaves"));
  OK(presence_sender_end(ends));
  for (int i = 0; i < 2; i++) join_thread(threads[i]);
  CHECK_STATUS(waits[0].result, PRESENCE_OFFLINE);
  CHECK_STATUS(waits[1].result, PRESENCE_CLOSED);

  resume(server);
  /* The sender that was refused becomes writable; it may have become so before, because the system's buffers grow. */
  for (int stopped = 0, writable = 0; stopped + writable < 2;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(both.worker.queue, &event, 1, TIMEOUT_MS), 1);
    stopped += event.kind == PRESENCE_EVENT_STOPPED && event.sender == both.sender;
    writable += event.kind == PRESENCE_EVENT_WRITABLE && event.sender == stays;
    CHECK(stopped < 2 && writable < 2);
  }
  OK(presence_sender_send_wait(stays, "last", 4, TIMEOUT_MS));
  OK(presence_sender_end(stays));
  /* Everything accepted arrives, and the end of "ends"; "leaves" ended at once. */
  int64_t received = 0;
  for (int ended = 0; ended < 3;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(both.gateway.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_DATA) {
      CHECK_EQ(event.tag, 3);
      received += (int64_t)event.data_len;
    } else {
      CHECK_EQ(event.kind, event.tag == 1 ? PRESENCE_EVENT_ERROR : PRESENCE_EVENT_END);
      ended++;
    }
  }
  CHECK_EQ(received, accepted + 4);
  presence_sender_free(ends);
  presence_sender_free(stays);
  for (int i = 0; i < 2; i++) presence_stream_free(streams[i]);
  close_pair(both);
}

/* Close waits for its whole timeout and reports that the server may not have everything. */
static void close_times_out_while_the_server_is_stopped(void) {
  peer self = open_peer();
  suspend(server);
  CHECK_STATUS(presence_close(self.conn, 100), PRESENCE_TIMEOUT);
  resume(server);
  CHECK_STATUS(presence_close(self.conn, 100), PRESENCE_CLOSED);
  presence_queue_free(self.queue);
}

/* A stream whose messages are not read ends, and no other does. (On a lane its worker is blocked: see lane_streams.c.) */
static void slow_reader_ends_its_own_stream(void) {
  enum { COUNT = 1000, ROOM = 20000 };
  peer worker = open_peer(), gateway = open_peer(), watch = second_queue(gateway);
  OK(presence_conn_watch(gateway.conn, watch.queue, 7));
  presence_service *service = serve(worker, "flow");
  presence_stream *slow = request_with(gateway, "flow", "slow", 1, "stream_buffer_bytes=20000");
  presence_stream *other = request(gateway, "flow", "other", 2);
  presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
  for (int i = 0; i < COUNT; i++) {
    int32_t status = presence_sender_send_wait(senders[0], &i, sizeof i, TIMEOUT_MS);
    CHECK(status == PRESENCE_OK || status == PRESENCE_OFFLINE); /* it may be stopped already */
    OK(presence_sender_send_wait(senders[1], &i, sizeof i, TIMEOUT_MS));
  }
  OK(presence_sender_end(senders[1]));
  /* The worker is stopped as if the client had left. Until then the reader has read nothing. */
  CHECK(expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE).sender == senders[0]);

  int next[] = {0, 0};
  bool has_ended[] = {false, false};
  while (!has_ended[0] || !has_ended[1]) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(gateway.queue, &event, 1, TIMEOUT_MS), 1);
    int which = event.tag == 1 ? 0 : 1;
    switch (event.kind) {
      case PRESENCE_EVENT_DATA:
        CHECK(!has_ended[which]);
        CHECK(memcmp(event.data, &next[which], sizeof(int)) == 0);
        next[which]++;
        break;
      case PRESENCE_EVENT_ERROR:
        CHECK_EQ(event.status, PRESENCE_FULL);
        CHECK(event.stream == slow);
        has_ended[0] = true;
        break;
      default:
        CHECK_EQ(event.kind, PRESENCE_EVENT_END);
        CHECK(event.stream == other);
        has_ended[1] = true;
    }
  }
  CHECK_EQ(next[0], ROOM / (64 + (int)sizeof(int))); /* the messages that fit, each counted with 64 extra bytes */
  CHECK_EQ(next[1], COUNT);
  expect_nothing(gateway.queue);
  /* The LOG event has the connection's tag: the stream's tag is not used after its last event. */
  CHECK_EQ(expect_status(watch.queue, PRESENCE_EVENT_LOG, PRESENCE_FULL).tag, 7);
  presence_queue_free(watch.queue);
  for (int i = 0; i < 2; i++) presence_sender_free(senders[i]);
  presence_stream_free(slow);
  presence_stream_free(other);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* When a connection holds many unread messages, the streams with a large share end and the others go on. */
static void receive_buffer_limit_ends_the_largest_streams(void) {
  enum { SIZE = 1000, WEIGHT = SIZE + 64, LIMIT = 640000, PART = LIMIT / 64 };
  peer worker = open_peer(), gateway = open_peer_with("receive_buffer_bytes=640000");
  presence_service *service = serve(worker, "flow");
  presence_stream *streams[3];
  presence_sender *senders[3];
  int sent[] = {LIMIT / WEIGHT, PART / WEIGHT, 2 * PART / WEIGHT}, received[3] = {0};
  char message[SIZE] = {0};
  for (uint64_t i = 0; i < 2; i++) {
    streams[i] = request(gateway, "flow", "", i);
    senders[i] = accept_request(worker);
    for (int k = 0; k < sent[i]; k++) OK(presence_sender_send_wait(senders[i], message, SIZE, TIMEOUT_MS));
    if (i == 0) continue;
    for (int k = 0; k < 2; k++) OK(presence_sender_send_wait(senders[k], message, SIZE, TIMEOUT_MS)); /* one too many for each */
  }
  uint64_t all = (uint64_t)(sent[0] + sent[1] + 2);
  for (int64_t deadline = now_ms() + TIMEOUT_MS; stats_of(gateway).messages_in < all; usleep(1000)) CHECK(now_ms() < deadline);
  for (int ended = 0; ended < 2;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(gateway.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_DATA) {
      received[event.tag]++;
    } else {
      CHECK_EQ(event.kind, PRESENCE_EVENT_ERROR);
      CHECK_STATUS(event.status, PRESENCE_FULL);
      CHECK(memmem(event.data, event.data_len, "receive_buffer_bytes", 20));
      ended++;
    }
  }
  for (int i = 0; i < 2; i++) CHECK_EQ(received[i], sent[i]);
  /* Messages that were read no longer count. */
  streams[2] = request(gateway, "flow", "", 2);
  senders[2] = accept_request(worker);
  for (int k = 0; k < sent[2]; k++) OK(presence_sender_send_wait(senders[2], message, SIZE, TIMEOUT_MS));
  OK(presence_sender_end(senders[2]));
  for (int k = 0; k < sent[2]; k++) CHECK_EQ(expect(gateway.queue, PRESENCE_EVENT_DATA).data_len, SIZE);
  expect(gateway.queue, PRESENCE_EVENT_END);
  for (int i = 0; i < 3; i++) {
    presence_sender_free(senders[i]);
    presence_stream_free(streams[i]);
  }
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* The limit applies to unread messages, not to the whole stream. */
static void reader_that_keeps_up_is_never_cut_off(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "flow");
  presence_stream *stream = request_with(gateway, "flow", "c", 1, "stream_buffer_bytes=1000");
  presence_sender *sender = accept_request(worker);
  for (int i = 0; i < 1000; i++) {
    OK(presence_sender_send_wait(sender, &i, sizeof i, TIMEOUT_MS)); /* on a lane, blocks until credit arrives */
    read_numbers(gateway, i, 1);
  }
  OK(presence_sender_end(sender));
  expect(gateway.queue, PRESENCE_EVENT_END);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  const char *pid = getenv("NATS_SERVER_PID");
  CHECK(pid && atoi(pid) > 1);
  server = atoi(pid);
  RUN_ON_BOTH(full_is_followed_by_writable);
  RUN_ON_BOTH(send_wait_blocks_until_writable);
  RUN_ON_BOTH(message_larger_than_the_send_buffer);
  RUN_ON_BOTH(stopped_server_bounds_the_send_buffer);
  RUN_ON_BOTH(close_times_out_while_the_server_is_stopped);
  RUN_ON_LEVEL_0(slow_reader_ends_its_own_stream);
  RUN_ON_LEVEL_0(receive_buffer_limit_ends_the_largest_streams);
  RUN_ON_BOTH(reader_that_keeps_up_is_never_cut_off);
  return 0;
}
