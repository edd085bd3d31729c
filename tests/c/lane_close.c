/* A connection closes while streams run on a lane: what was sent before arrives, and the other end is informed. */
#include "content.h"

enum { STREAMS = 20, SIZE = 1000 };

typedef struct crowd {
  peer worker, gateway;
  presence_service *service;
  presence_stream *streams[STREAMS];
  presence_sender *senders[STREAMS];
  uint64_t sent[STREAMS];
} crowd;

static crowd open_crowd(void) {
  crowd self;
  self.worker = open_peer();
  self.gateway = open_peer();
  self.service = serve(self.worker, "crowd");
  for (uint64_t i = 0; i < STREAMS; i++) {
    self.streams[i] = request(self.gateway, "crowd", "c", i);
    self.senders[i] = accept_request(self.worker);
    self.sent[i] = 0;
  }
  run_whole_stream(self.worker, self.gateway, "crowd");
  return self;
}

/* Both connections must be closed already. */
static void free_crowd(crowd *self) {
  for (int i = 0; i < STREAMS; i++) {
    presence_sender_free(self->senders[i]);
    presence_stream_free(self->streams[i]);
  }
  presence_service_free(self->service);
  presence_queue_free(self->worker.queue);
  presence_queue_free(self->gateway.queue);
}

/* Sends on all streams in turn until the lane is full. */
static void send_much(crowd *self) {
  unsigned char message[SIZE];
  for (int i = 0;; i = (i + 1) % STREAMS) {
    fill_content(message, SIZE, (uint64_t)i, self->sent[i]);
    int32_t status = presence_sender_send(self->senders[i], message, SIZE);
    if (status == PRESENCE_FULL) return;
    OK(status);
    self->sent[i]++;
  }
}

/* The worker closes: everything it sent arrives, then the end, or an error for streams it did not end. Nobody reads
 * meanwhile. */
static void worker_close_delivers_what_was_sent(void) {
  crowd self = open_crowd();
  send_much(&self);
  for (int i = 0; i < STREAMS; i += 2) OK(presence_sender_end(self.senders[i]));
  OK(presence_close(self.worker.conn, TIMEOUT_MS));
  for (int i = 0; i < STREAMS; i++) CHECK_STATUS(send_text(self.senders[i], "late"), PRESENCE_CLOSED);
  uint64_t received[STREAMS] = {0};
  for (int ended = 0; ended < STREAMS;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(self.gateway.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_DATA) {
      CHECK_CONTENT(&event, SIZE, event.tag, received[event.tag]);
      received[event.tag]++;
      continue;
    }
    CHECK_EQ(event.kind, event.tag % 2 ? PRESENCE_EVENT_ERROR : PRESENCE_EVENT_END);
    CHECK_STATUS(event.status, event.tag % 2 ? PRESENCE_REMOTE : PRESENCE_OK);
    CHECK_EQ(received[event.tag], self.sent[event.tag]);
    if (event.tag % 2) CHECK(event.data_len > 0);
    ended++;
  }
  expect_nothing(self.gateway.queue);
  for (int i = 1; i < STREAMS; i += 2) { /* streams that were not ended get STOPPED; some became writable before */
    presence_event event;
    do CHECK_EQ(presence_queue_wait(self.worker.queue, &event, 1, TIMEOUT_MS), 1);
    while (event.kind == PRESENCE_EVENT_WRITABLE);
    CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
    CHECK_STATUS(event.status, PRESENCE_CLOSED);
  }
  OK(presence_close(self.gateway.conn, TIMEOUT_MS));
  free_crowd(&self);
}

/* The gateway closes with many messages unread: its streams have ended, and the senders stop. */
static void gateway_close_stops_the_senders(void) {
  crowd self = open_crowd();
  send_much(&self);
  OK(presence_close(self.gateway.conn, TIMEOUT_MS));
  for (int stopped = 0; stopped < STREAMS;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(self.worker.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_WRITABLE) continue;
    CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
    CHECK_STATUS(event.status, PRESENCE_CANCELLED);
    stopped++;
  }
  for (int ended = 0; ended < STREAMS;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(self.gateway.queue, &event, 1, 0), 1);
    if (event.kind == PRESENCE_EVENT_DATA) continue;
    CHECK_EQ(event.kind, PRESENCE_EVENT_ERROR);
    CHECK_STATUS(event.status, PRESENCE_CLOSED);
    ended++;
  }
  expect_nothing(self.gateway.queue);
  OK(presence_close(self.worker.conn, TIMEOUT_MS));
  free_crowd(&self);
}

static void *close_conn(void *conn) {
  int64_t since = now_ms();
  OK(presence_close((presence_conn *)conn, TIMEOUT_MS));
  CHECK(now_ms() - since < 10000);
  return NULL;
}

/* Both ends close at once: each stream and each sender ends once. */
static void both_ends_close_at_once(void) {
  for (int round = 0; round < 20; round++) {
    crowd self = open_crowd();
    if (round % 2) send_much(&self);
    pthread_t threads[] = {start_thread(close_conn, self.worker.conn), start_thread(close_conn, self.gateway.conn)};
    for (int i = 0; i < 2; i++) join_thread(threads[i]);
    int ended = 0, stopped = 0;
    presence_event event;
    while (presence_queue_wait(self.gateway.queue, &event, 1, 0) == 1) {
      if (event.kind == PRESENCE_EVENT_DATA) continue;
      CHECK_EQ(event.kind, PRESENCE_EVENT_ERROR);
      CHECK(event.status == PRESENCE_CLOSED || event.status == PRESENCE_REMOTE);
      ended++;
    }
    while (presence_queue_wait(self.worker.queue, &event, 1, 0) == 1) {
      if (event.kind == PRESENCE_EVENT_WRITABLE) continue;
      CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
      CHECK(event.status == PRESENCE_CLOSED || event.status == PRESENCE_CANCELLED);
      stopped++;
    }
    CHECK_EQ(ended, STREAMS);
    CHECK_EQ(stopped, STREAMS);
    free_crowd(&self);
  }
}

/* With no time to drain, the other end still learns of the close: by what arrived, or because the peer is gone. */
static void close_without_drain_time_ends_the_streams(void) {
  for (int round = 0; round < 20; round++) {
    crowd self = open_crowd();
    peer closes = round % 2 ? self.worker : self.gateway, other = round % 2 ? self.gateway : self.worker;
    if (round % 4 > 1) send_much(&self);
    int32_t status = presence_close(closes.conn, 0);
    CHECK(status == PRESENCE_OK || status == PRESENCE_TIMEOUT);
    for (int ended = 0; ended < STREAMS;) {
      presence_event event;
      CHECK_EQ(presence_queue_wait(other.queue, &event, 1, TIMEOUT_MS), 1);
      if (event.kind == PRESENCE_EVENT_DATA || event.kind == PRESENCE_EVENT_WRITABLE) continue;
      CHECK_EQ(event.kind, round % 2 ? PRESENCE_EVENT_ERROR : PRESENCE_EVENT_STOPPED);
      if (event.status != PRESENCE_PEER_GONE) CHECK_STATUS(event.status, round % 2 ? PRESENCE_REMOTE : PRESENCE_CANCELLED);
      ended++;
    }
    OK(presence_close(other.conn, TIMEOUT_MS));
    free_crowd(&self);
  }
}

/* Processes that exit right after a close ---------------------------------------------------------------------------- */

static void send_close_and_exit(void) {
  peer self = open_peer();
  presence_service *service = serve(self, "leave");
  presence_sender *sender = accept_request(self);
  unsigned char message[SIZE];
  for (uint64_t i = 0; i < 20000; i++) {
    fill_content(message, SIZE, 1, i);
    OK(presence_sender_send_wait(sender, message, SIZE, TIMEOUT_MS));
  }
  OK(presence_sender_end(sender));
  OK(presence_close(self.conn, TIMEOUT_MS));
  (void)service;
  _exit(0);
}

static void worker_exits_right_after_close(void) {
  peer gateway = open_peer();
  pid_t worker = start("send_close_and_exit");
  presence_stream *stream = request_with(gateway, "leave", "c", 1, "retries=100000");
  for (uint64_t i = 0; i < 20000; i++) {
    presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
    CHECK_CONTENT(&event, SIZE, 1, i);
  }
  expect(gateway.queue, PRESENCE_EVENT_END);
  expect_exit(worker, 0);
  presence_stream_free(stream);
  close_peer(gateway);
}

static void read_close_and_exit(void) {
  peer self = open_peer();
  (void)request(self, "leave", "c", 1);
  (void)request(self, "leave", "c", 2);
  expect_data(self.queue, "first");
  expect_data(self.queue, "first");
  OK(presence_close(self.conn, TIMEOUT_MS));
  _exit(0);
}

static void gateway_exits_right_after_close(void) {
  peer worker = open_peer_with("peer_grace_ms=60000"); /* so that peer detection is not what stops the senders */
  presence_service *service = serve(worker, "leave");
  pid_t gateway = start("read_close_and_exit");
  presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
  for (int i = 0; i < 2; i++) OK(send_text(senders[i], "first"));
  for (int i = 0; i < 2; i++) expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_CANCELLED);
  expect_exit(gateway, 0);
  int64_t since = now_ms();
  while (stats_of(worker).lanes > 0) { /* the lane is gone, too */
    CHECK(now_ms() - since < TIMEOUT_MS);
    usleep(1000);
  }
  for (int i = 0; i < 2; i++) presence_sender_free(senders[i]);
  presence_service_free(service);
  close_peer(worker);
}

/* The peer is stopped: close waits for its whole timeout and reports that not everything arrived. */
static void read_until_error(void) {
  peer self = open_peer();
  presence_stream *stream = request(self, "leave", "c", 1);
  presence_event event;
  do CHECK_EQ(presence_queue_wait(self.queue, &event, 1, TIMEOUT_MS), 1);
  while (event.kind == PRESENCE_EVENT_DATA);
  CHECK_EQ(event.kind, PRESENCE_EVENT_ERROR);
  presence_stream_free(stream);
  close_peer(self);
}

static void close_times_out_while_the_peer_is_stopped(void) {
  peer worker = open_peer();
  presence_service *service = serve(worker, "leave");
  pid_t gateway = start("read_until_error");
  presence_sender *sender = accept_request(worker);
  OK(send_text(sender, "first"));
  suspend(gateway);
  for (int i = 0; i < 100; i++) OK(send_text(sender, "more"));
  int64_t since = now_ms();
  CHECK_STATUS(presence_close(worker.conn, 300), PRESENCE_TIMEOUT);
  CHECK(now_ms() - since >= 290 && now_ms() - since < 3000);
  resume(gateway);
  expect_exit(gateway, 0);
  presence_sender_free(sender);
  presence_service_free(service);
  presence_queue_free(worker.queue);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(send_close_and_exit);
  ROLE(read_close_and_exit);
  ROLE(read_until_error);
  if (is_selected("read_until_error")) return 0;
  RUN(worker_close_delivers_what_was_sent);
  RUN(gateway_close_stops_the_senders);
  RUN(both_ends_close_at_once);
  RUN(close_without_drain_time_ends_the_streams);
  RUN(worker_exits_right_after_close);
  RUN(gateway_exits_right_after_close);
  RUN(close_times_out_while_the_peer_is_stopped);
  return 0;
}
