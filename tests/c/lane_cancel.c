/* On a lane, ending one stream stops its sender only: the client and its other streams go on. */
#include "peer.h"
#include <sched.h>

static pid_t server; /* the process ID of nats-server */

static void check_stopped(presence_sender *sender, int32_t why) {
  CHECK(presence_sender_is_closed(sender));
  CHECK_EQ(status_word(sender), (uint32_t)why);
  CHECK_STATUS(send_text(sender, "late"), why);
  CHECK_STATUS(presence_sender_send_wait(sender, "late", 4, -1), why);
  CHECK_STATUS(presence_sender_error(sender, "late", 4), why);
  CHECK_STATUS(presence_sender_end(sender), why);
}

static void expect_stopped(peer worker, presence_sender *sender, int32_t why) {
  presence_event event = expect_status(worker.queue, PRESENCE_EVENT_STOPPED, why);
  CHECK(event.sender == sender && !event.stream);
  CHECK(is_text(event.client, event.client_len, "c"));
  check_stopped(sender, why);
}

/* Two streams of one client; the gateway ends the first. */
enum how { CANCELLED_BY_CALL, FREED, TIMED_OUT, HOWS };

static void cancel_stops_only_its_own_sender(void) {
  for (int how = 0; how < HOWS; how++) {
    peer worker = open_peer(), gateway = open_peer(), watch = second_queue(gateway);
    OK(presence_watch(watch.queue, 0));
    presence_service *service = serve(worker, "two");
    presence_stream *first = request_with(gateway, "two", "c", 1, how == TIMED_OUT ? "timeout_ms=500" : NULL);
    presence_stream *second = request(gateway, "two", "c", 2);
    presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
    OK(send_text(senders[0], "first"));
    expect_data(gateway.queue, "first");
    expect(watch.queue, PRESENCE_EVENT_ONLINE);

    if (how == CANCELLED_BY_CALL) OK(presence_stream_cancel(first));
    if (how == FREED) presence_stream_free(first);
    if (how != FREED) {
      presence_event last = expect_status(gateway.queue, PRESENCE_EVENT_ERROR,
                                          how == TIMED_OUT ? PRESENCE_TIMEOUT : PRESENCE_CANCELLED);
      CHECK(last.stream == first && last.tag == 1 && last.data_len > 0);
    }
    expect_stopped(worker, senders[0], PRESENCE_CANCELLED);
    CHECK_STATUS(presence_stream_cancel(first), PRESENCE_CLOSED);
    CHECK_STATUS(presence_stream_consumed(first, 1), PRESENCE_CLOSED);

    CHECK(is_client_online("c"));
    OK(send_text(senders[1], "goes on"));
    expect_data(gateway.queue, "goes on");
    OK(presence_sender_end(senders[1]));
    expect(gateway.queue, PRESENCE_EVENT_END);
    CHECK_EQ(stats_of(gateway).offline_out, 0);
    CHECK_EQ(stats_of(worker).offline_in, 0);
    CHECK_EQ(stats_of(worker).senders, 0);
    CHECK_EQ(stats_of(gateway).streams, 0);
    /* the client was online until its last stream ended */
    expect(watch.queue, PRESENCE_EVENT_OFFLINE);
    expect_nothing(watch.queue);
    expect_nothing(gateway.queue);
    expect_nothing(worker.queue);
    for (int i = 0; i < 2; i++) presence_sender_free(senders[i]);
    presence_stream_free(first);
    presence_stream_free(second);
    presence_service_free(service);
    presence_queue_free(watch.queue);
    close_peer(gateway);
    close_peer(worker);
  }
}

/* A client that is marked online stays online when its only stream is cancelled. */
static void cancel_leaves_the_client_online(void) {
  pair both = open_pair("c");
  run_whole_stream(both.worker, both.gateway, "pair");
  OK(mark_client_online("c"));
  OK(presence_stream_cancel(both.stream));
  expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED);
  expect_stopped(both.worker, both.sender, PRESENCE_CANCELLED);
  CHECK(is_client_online("c"));
  OK(mark_client_offline("c"));
  close_pair(both);
}

/* An anonymous stream can be stopped, too. */
static void cancel_stops_an_anonymous_stream(void) {
  pair both = open_pair("");
  OK(send_text(both.sender, "first"));
  expect_data(both.gateway.queue, "first");
  OK(presence_stream_cancel(both.stream));
  presence_event event = expect_status(both.worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_CANCELLED);
  CHECK(event.sender == both.sender && event.client_len == 0);
  check_stopped(both.sender, PRESENCE_CANCELLED);
  close_pair(both);
}

/* Cancels before the worker has received the request: the server is stopped meanwhile. */
static void cancel_before_accept(void) {
  for (int how = 0; how < HOWS; how++) {
    peer worker = open_peer(), gateway = open_peer();
    presence_service *service = serve(worker, "early");
    OK(mark_client_online("c")); /* so that its departure is not announced */
    suspend(server);
    presence_stream *stream = request_with(gateway, "early", "c", 1, how == TIMED_OUT ? "timeout_ms=1" : NULL);
    if (how == CANCELLED_BY_CALL) OK(presence_stream_cancel(stream));
    if (how == FREED) presence_stream_free(stream);
    if (how != FREED) expect(gateway.queue, PRESENCE_EVENT_ERROR);
    resume(server);
    presence_sender *sender = accept_request(worker);
    expect_stopped(worker, sender, PRESENCE_CANCELLED);
    expect_nothing(gateway.queue);
    CHECK_EQ(stats_of(gateway).streams, 0);
    OK(mark_client_offline("c"));
    presence_sender_free(sender);
    presence_stream_free(stream);
    presence_service_free(service);
    close_peer(gateway);
    close_peer(worker);
  }
}

/* Cancels right after the request, again and again: whichever way request, ACCEPT and CANCEL race, each stream ends
 * once. */
static void cancel_right_after_the_request(void) {
  enum { ROUNDS = 500 };
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "early");
  OK(mark_client_online("c"));
  for (int round = 0; round < ROUNDS; round++) {
    presence_stream *stream = request(gateway, "early", "c", 1);
    if (round % 3 == 1) sched_yield();
    if (round % 3 == 2) usleep((useconds_t)round);
    if (round % 2) OK(presence_stream_cancel(stream));
    else presence_stream_free(stream);
    presence_sender *sender = accept_request(worker);
    expect_stopped(worker, sender, PRESENCE_CANCELLED);
    if (round % 2) expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED);
    expect_nothing(gateway.queue);
    presence_sender_free(sender);
    presence_stream_free(stream);
  }
  CHECK_EQ(stats_of(gateway).streams, 0);
  CHECK_EQ(stats_of(worker).senders, 0);
  OK(mark_client_offline("c"));
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* The cancel crosses the worker's end: each side sees one of the two, once. */
static void cancel_races_the_workers_end(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "cross");
  for (int round = 0; round < 500; round++) {
    presence_stream *stream = request(gateway, "cross", "", 1);
    presence_sender *sender = accept_request(worker);
    OK(send_text(sender, "x"));
    expect_data(gateway.queue, "x");
    int32_t ended, cancelled;
    if (round % 2) {
      ended = presence_sender_end(sender);
      cancelled = presence_stream_cancel(stream);
    } else {
      cancelled = presence_stream_cancel(stream);
      ended = presence_sender_end(sender);
    }
    CHECK(ended == PRESENCE_OK || ended == PRESENCE_CANCELLED);
    presence_event last;
    CHECK_EQ(presence_queue_wait(gateway.queue, &last, 1, TIMEOUT_MS), 1);
    CHECK(last.stream == stream);
    if (cancelled == PRESENCE_OK) CHECK(last.kind == PRESENCE_EVENT_ERROR && last.status == PRESENCE_CANCELLED);
    else CHECK_EQ(last.kind, PRESENCE_EVENT_END);
    expect_nothing(gateway.queue);
    /* A sender that ended its stream gets no STOPPED: the next event would not be a REQUEST otherwise. */
    if (ended != PRESENCE_OK) CHECK(expect(worker.queue, PRESENCE_EVENT_STOPPED).sender == sender);
    presence_sender_free(sender);
    presence_stream_free(stream);
  }
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* After a cancel, nothing that was sent before is delivered, and its share of the send buffer is free again. */
static void cancel_releases_unread_messages(void) {
  enum { SIZE = 60000 };
  static char data[SIZE];
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "unread");
  for (int round = 0; round < 40; round++) { /* many times the lane's 4 MiB in total */
    presence_stream *stream = request(gateway, "unread", "c", 1);
    presence_sender *sender = accept_request(worker);
    int32_t status = PRESENCE_OK;
    while (status == PRESENCE_OK) status = presence_sender_send(sender, data, SIZE);
    CHECK_STATUS(status, PRESENCE_FULL);
    expect(gateway.queue, PRESENCE_EVENT_DATA);
    if (round % 2) presence_stream_free(stream);
    else OK(presence_stream_cancel(stream));
    presence_event event;
    do CHECK_EQ(presence_queue_wait(worker.queue, &event, 1, TIMEOUT_MS), 1);
    while (event.kind == PRESENCE_EVENT_WRITABLE); /* the lane may have become writable meanwhile */
    CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
    check_stopped(sender, PRESENCE_CANCELLED);
    while (presence_queue_wait(gateway.queue, &event, 1, 0) == 1) CHECK(round % 2 == 0);
    presence_sender_free(sender);
    presence_stream_free(stream);
  }
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* Marks in another process ------------------------------------------------------------------------------------------ */

/* Marks offline a client with a stream on a lane, one without streams, and one whose request is still in flight. */
static void mark_without_announcing(void) {
  peer self = open_peer_with("announce=streams");
  presence_stream *streams[3];
  for (uint64_t i = 0; i < 2; i++) streams[i] = request(self, "marks", i ? "stays" : "c", i);
  expect_data(self.queue, "first");
  expect_data(self.queue, "first");
  OK(mark_client_offline("c"));
  CHECK_EQ(expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE).tag, 0);
  OK(mark_client_offline("nobody"));
  OK(presence_listen_offline(self.conn)); /* returns when the server has processed everything sent before */
  CHECK_EQ(stats_of(self).offline_out, 0);

  suspend(server);
  streams[2] = request(self, "marks", "c", 2);
  OK(mark_client_offline("c"));
  resume(server);
  CHECK_EQ(expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE).tag, 2);
  OK(presence_listen_offline(self.conn));
  CHECK_EQ(stats_of(self).offline_out, 1);

  CHECK_EQ(expect(self.queue, PRESENCE_EVENT_END).tag, 1);
  for (int i = 0; i < 3; i++) presence_stream_free(streams[i]);
  close_peer(self);
}

/* With announce=streams, clients whose streams are all on lanes are not announced; the sender stops all the same. */
static void offline_mark_without_announcement_stops_the_sender(void) {
  peer worker = open_peer();
  presence_service *service = serve(worker, "marks");
  pid_t other = start("mark_without_announcing");
  presence_sender *senders[3] = {accept_request(worker), accept_request(worker), NULL};
  for (int i = 0; i < 2; i++) OK(send_text(senders[i], "first"));
  expect_stopped(worker, senders[0], PRESENCE_OFFLINE);
  CHECK_EQ(stats_of(worker).offline_in, 0);
  senders[2] = accept_request(worker);
  /* By the announcement, or because the gateway no longer wants the stream, whichever arrives first. */
  presence_event event = expect(worker.queue, PRESENCE_EVENT_STOPPED);
  CHECK(event.sender == senders[2] && (event.status == PRESENCE_OFFLINE || event.status == PRESENCE_CANCELLED));
  OK(presence_sender_end(senders[1]));
  expect_exit(other, 0);
  CHECK_EQ(stats_of(worker).offline_in, 1);
  for (int i = 0; i < 3; i++) presence_sender_free(senders[i]);
  presence_service_free(service);
  close_peer(worker);
}

/* With announce=always the mark is announced too, for peers without lanes; the sender stops once. */
static void mark_and_announce(void) {
  peer self = open_peer();
  presence_stream *stream = request(self, "marks", "c", 1);
  expect_data(self.queue, "first");
  OK(mark_client_offline("c"));
  expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
  presence_stream_free(stream);
  close_peer(self);
}

static void announced_offline_mark_stops_the_sender_once(void) {
  peer worker = open_peer();
  presence_service *service = serve(worker, "marks");
  pid_t other = start("mark_and_announce");
  presence_sender *sender = accept_request(worker);
  OK(send_text(sender, "first"));
  expect_stopped(worker, sender, PRESENCE_OFFLINE);
  expect_exit(other, 0);
  CHECK_EQ(stats_of(worker).offline_in, 1);
  expect_nothing(worker.queue);
  presence_sender_free(sender);
  presence_service_free(service);
  close_peer(worker);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  const char *pid = getenv("NATS_SERVER_PID");
  CHECK(pid && atoi(pid) > 1);
  server = atoi(pid);
  ROLE(mark_without_announcing);
  ROLE(mark_and_announce);
  RUN(cancel_stops_only_its_own_sender);
  RUN(cancel_leaves_the_client_online);
  RUN(cancel_stops_an_anonymous_stream);
  RUN(cancel_before_accept);
  RUN(cancel_right_after_the_request);
  RUN(cancel_races_the_workers_end);
  RUN(cancel_releases_unread_messages);
  RUN(offline_mark_without_announcement_stops_the_sender);
  RUN(announced_offline_mark_stops_the_sender_once);
  return 0;
}
