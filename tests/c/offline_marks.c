/* A client leaves, by a mark here or an announcement from another process: which senders stop, which queues get
 * events, and which streams go on. */
#include "peer.h"

/* The sender refuses everything with this status from now on. */
static void check_stopped(presence_sender *sender, int32_t why) {
  uint64_t count = presence_sender_send_count(sender);
  CHECK(presence_sender_is_closed(sender));
  CHECK_EQ(status_word(sender), (uint32_t)why);
  CHECK_STATUS(send_text(sender, "late"), why);
  CHECK_STATUS(presence_sender_send_wait(sender, "late", 4, -1), why);
  CHECK_STATUS(presence_sender_error(sender, "late", 4), why);
  CHECK_STATUS(presence_sender_end(sender), why);
  CHECK_EQ(presence_sender_send_count(sender), count);
}

static void expect_stopped_by(int32_t why, peer worker, presence_sender *sender, const char *client) {
  presence_event event = expect_status(worker.queue, PRESENCE_EVENT_STOPPED, why);
  CHECK(event.sender == sender && !event.stream);
  CHECK(is_text(event.client, event.client_len, client));
  check_stopped(sender, why);
}

static void expect_stopped(peer worker, presence_sender *sender, const char *client) {
  expect_stopped_by(PRESENCE_OFFLINE, worker, sender, client);
}

/* Sends a message, to show that the stream goes on. */
static void check_goes_on(presence_sender *sender, peer gateway) {
  OK(send_text(sender, "goes on"));
  expect_data(gateway.queue, "goes on");
}

static void mark_stops_senders_and_streams(void) {
  pair leaves = open_pair("leaves");
  peer other = open_peer();
  presence_stream *other_stream = request(other, "pair", "stays", 2);
  presence_sender *other_sender = accept_request(leaves.worker);
  check_goes_on(leaves.sender, leaves.gateway);

  OK(mark_client_offline("leaves"));
  check_stopped(leaves.sender, PRESENCE_OFFLINE); /* when the mark returns, before any event */
  expect_stopped(leaves.worker, leaves.sender, "leaves");
  presence_event last = expect_status(leaves.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
  CHECK(last.stream == leaves.stream && last.tag == 1);
  check_goes_on(other_sender, other);

  /* The client comes back: its old stream stays ended. */
  OK(mark_client_online("leaves"));
  check_stopped(leaves.sender, PRESENCE_OFFLINE);
  presence_stream *new_stream = request(leaves.gateway, "pair", "leaves", 3);
  presence_sender *new_sender = accept_request(leaves.worker);
  check_goes_on(new_sender, leaves.gateway);
  check_stopped(leaves.sender, PRESENCE_OFFLINE);
  OK(mark_client_offline("leaves"));
  expect_stopped(leaves.worker, new_sender, "leaves");
  expect_status(leaves.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);

  OK(presence_sender_end(other_sender));
  expect(other.queue, PRESENCE_EVENT_END);
  expect_nothing(leaves.worker.queue);
  presence_sender_free(new_sender);
  presence_sender_free(other_sender);
  presence_stream_free(new_stream);
  presence_stream_free(other_stream);
  close_peer(other);
  close_pair(leaves);
}

/* A client that was never seen, or has left, may request: it is online as long as its stream runs. */
static void request_brings_an_offline_client_online(void) {
  presence_queue *watch;
  OK(presence_queue_new(&watch));
  OK(presence_watch(watch, 0));
  OK(mark_client_offline("c"));
  CHECK(!is_client_online("c"));
  pair both = open_pair("c");
  CHECK(is_client_online("c"));
  check_goes_on(both.sender, both.gateway);
  OK(presence_sender_end(both.sender));
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  CHECK(!is_client_online("c"));
  presence_event event = expect(watch, PRESENCE_EVENT_ONLINE);
  CHECK(is_text(event.client, event.client_len, "c"));
  expect(watch, PRESENCE_EVENT_OFFLINE);
  expect_nothing(watch);
  presence_queue_free(watch);
  close_pair(both);
}

static void last_session_stops_senders(void) {
  pair both = open_pair("tabs");
  presence_session *first, *second;
  OK(presence_session_open("tabs", 4, &first));
  OK(presence_session_open("tabs", 4, &second));
  presence_session_close(first);
  check_goes_on(both.sender, both.gateway);
  presence_session_close(second);
  expect_stopped(both.worker, both.sender, "tabs");
  expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
  close_pair(both);
}

static void session_grace_delays_offline(void) {
  presence_queue *watch;
  presence_session *session, *again;
  OK(presence_queue_new(&watch));
  OK(presence_watch(watch, 0));

  /* The client may come back within the grace. */
  close_peer(open_peer_with("session_grace_ms=600000"));
  pair both = open_pair("c");
  OK(presence_session_open("c", 1, &session));
  presence_session_close(session);
  check_goes_on(both.sender, both.gateway);
  OK(presence_session_open("c", 1, &again));
  check_goes_on(both.sender, both.gateway);
  /* An offline mark does not wait for the grace. */
  presence_session_close(again);
  OK(mark_client_offline("c"));
  expect_stopped(both.worker, both.sender, "c");
  expect(watch, PRESENCE_EVENT_ONLINE);
  expect(watch, PRESENCE_EVENT_OFFLINE);
  close_pair(both);

  /* After the grace the client has left. */
  close_peer(open_peer_with("session_grace_ms=300"));
  OK(presence_session_open("d", 1, &session));
  presence_session_close(session);
  CHECK(is_client_online("d"));
  expect(watch, PRESENCE_EVENT_ONLINE);
  expect(watch, PRESENCE_EVENT_OFFLINE);
  CHECK(!is_client_online("d"));

  close_peer(open_peer_with("session_grace_ms=0"));
  presence_queue_free(watch);
}

static void cancel_stops_the_sender(void) {
  pair both = open_pair("c");
  check_goes_on(both.sender, both.gateway);
  OK(presence_stream_cancel(both.stream));
  presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED);
  CHECK(last.stream == both.stream && last.data_len > 0);
  expect_stopped_by(CANCELLED, both.worker, both.sender, "c");
  CHECK_STATUS(presence_stream_cancel(both.stream), PRESENCE_CLOSED);
  expect_nothing(both.gateway.queue);
  close_pair(both);
}

static void freeing_a_stream_stops_the_sender(void) {
  pair both = open_pair("c");
  run_whole_stream(both.worker, both.gateway, "pair");
  OK(send_text(both.sender, "unread"));
  presence_stream_free(both.stream);
  expect_nothing(both.gateway.queue);
  expect_stopped_by(CANCELLED, both.worker, both.sender, "c");
  expect_nothing(both.gateway.queue);
  close_pair(both);
}

/* A client that is online for another reason keeps its worker: level 0 can only announce that a client left. */
static void cancel_of_a_marked_client_keeps_the_worker(void) {
  pair both = open_pair("c");
  OK(mark_client_online("c"));
  OK(presence_stream_cancel(both.stream));
  expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED);
  OK(send_text(both.sender, "unread"));
  OK(mark_client_offline("c"));
  expect_stopped(both.worker, both.sender, "c");
  expect_nothing(both.gateway.queue);
  close_pair(both);
}

/* Announcements of other processes, which this program starts -------------------------------------------------------- */

static void announce_far_client(void) {
  peer self = open_peer();
  OK(mark_client_offline("far"));
  close_peer(self);
}

static void announcement_stops_senders_and_streams(void) {
  pair both = open_pair("far");
  pid_t other = start("announce_far_client");
  expect_stopped(both.worker, both.sender, "far");
  expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
  CHECK(!is_client_online("far"));
  CHECK_EQ(stats_of(both.worker).offline_in, 1);
  expect_exit(other, 0);
  close_pair(both);
}

static void announcement_ends_marks_and_sessions(void) {
  peer self = open_peer();
  presence_session *session;
  OK(presence_watch(self.queue, 0));
  OK(presence_listen_offline(self.conn));
  OK(presence_listen_offline(self.conn));
  OK(mark_client_online("far"));
  OK(presence_session_open("far", 3, &session));
  expect(self.queue, PRESENCE_EVENT_ONLINE);
  pid_t other = start("announce_far_client");
  presence_event event = expect(self.queue, PRESENCE_EVENT_OFFLINE);
  CHECK(is_text(event.client, event.client_len, "far"));
  CHECK(!is_client_online("far"));
  expect_exit(other, 0);
  presence_session_close(session);
  expect_nothing(self.queue);
  CHECK_EQ(stats_of(self).offline_in, 1); /* an announcement that took effect is not announced again */
  CHECK_EQ(stats_of(self).offline_out, 0);
  close_peer(self);
}

static void announce_selectively(void) {
  peer quiet = open_peer_with("announce=never");
  OK(mark_client_offline("stays"));
  close_peer(quiet);
  peer elsewhere = open_peer_with("offline_subject=else.where");
  OK(mark_client_offline("stays"));
  close_peer(elsewhere);
  peer loud = open_peer();
  OK(mark_client_offline("leaves"));
  close_peer(loud);
}

/* Only the last announcement takes effect here: the first is never sent, the second has another subject. */
static void unannounced_marks_stay_local(void) {
  pair stays = open_pair("stays");
  presence_stream *stream = request(stays.gateway, "pair", "leaves", 2);
  presence_sender *leaves = accept_request(stays.worker);
  pid_t other = start("announce_selectively");
  expect_stopped(stays.worker, leaves, "leaves");
  expect_status(stays.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
  CHECK_EQ(stats_of(stays.worker).offline_in, 1);
  check_goes_on(stays.sender, stays.gateway);
  expect_exit(other, 0);
  presence_sender_free(leaves);
  presence_stream_free(stream);
  close_pair(stays);
}

static void announce_own_streams(void) {
  peer self = open_peer_with("announce=streams");
  presence_stream *stream = request(self, "pair", "ours", 1);
  expect_data(self.queue, "first");
  OK(mark_client_online("stays"));
  OK(mark_client_offline("stays"));
  OK(mark_client_offline("ours"));
  expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
  CHECK_EQ(stats_of(self).streams, 0);
  OK(presence_listen_offline(self.conn)); /* returns when the server has processed everything sent before */
  CHECK_EQ(stats_of(self).offline_out, on_lanes() ? 0 : 1);
  presence_stream_free(stream);
  close_peer(self);
}

/* With announce=streams, only clients with streams requested there are announced, and not if all are on lanes. */
static void announce_streams_announces_only_requesting_clients(void) {
  pair stays = open_pair("stays");
  pid_t other = start("announce_own_streams");
  presence_sender *ours = accept_request(stays.worker);
  OK(send_text(ours, "first"));
  expect_stopped(stays.worker, ours, "ours");
  CHECK_EQ(stats_of(stays.worker).offline_in, on_lanes() ? 0 : 1);
  check_goes_on(stays.sender, stays.gateway);
  expect_exit(other, 0);
  presence_sender_free(ours);
  close_pair(stays);
}

static void cancel_one_of_two(void) {
  peer self = open_peer();
  presence_stream *first = request(self, "two", "c", 1), *second = request(self, "two", "c", 2);
  expect_data(self.queue, "to both");
  expect_data(self.queue, "to both");
  OK(presence_stream_cancel(first));
  CHECK_EQ(expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED).tag, 1);
  presence_stream *mark = request(self, "two", "", 3);
  CHECK_EQ(expect(self.queue, PRESENCE_EVENT_DATA).tag, 2);
  CHECK_EQ(expect(self.queue, PRESENCE_EVENT_END).tag, 3);
  presence_stream_free(first);
  presence_stream_free(second);
  presence_stream_free(mark);
  close_peer(self);
}

/* One of a client's two streams is cancelled: the client stays online. The second, too: it has left. On a lane each
 * stops by itself. */
static void client_stays_until_its_last_cancel(void) {
  peer worker = open_peer();
  presence_service *service = serve(worker, "two");
  pid_t other = start("cancel_one_of_two");
  presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
  for (int i = 0; i < 2; i++) OK(send_text(senders[i], "to both"));
  if (on_lanes()) expect_stopped_by(PRESENCE_CANCELLED, worker, senders[0], "c");
  presence_event event = expect(worker.queue, PRESENCE_EVENT_REQUEST); /* sent after the first was cancelled */
  for (int i = on_lanes() ? 1 : 0; i < 2; i++) OK(send_text(senders[i], "to one"));
  OK(presence_sender_end(event.sender));
  for (int i = on_lanes() ? 1 : 0; i < 2; i++) expect_status(worker.queue, PRESENCE_EVENT_STOPPED, CANCELLED);
  for (int i = 0; i < 2; i++) check_stopped(senders[i], CANCELLED);
  expect_exit(other, 0);
  for (int i = 0; i < 2; i++) presence_sender_free(senders[i]);
  presence_sender_free(event.sender);
  presence_service_free(service);
  close_peer(worker);
}

static void *send_until_refused(void *sender) {
  int32_t status;
  do status = presence_sender_send_wait((presence_sender *)sender, "x", 1, -1);
  while (status == PRESENCE_OK);
  CHECK_STATUS(status, PRESENCE_OFFLINE);
  return NULL;
}

/* No send succeeds after the mark: a thread that sends all the time is refused, and the count stays. */
static void no_send_succeeds_after_the_mark(void) {
  for (int round = 0; round < 20; round++) {
    pair both = open_pair("c");
    pthread_t thread = start_thread(send_until_refused, both.sender);
    expect_data(both.gateway.queue, "x"); /* the thread is sending */
    OK(mark_client_offline("c"));
    uint64_t count = presence_sender_send_count(both.sender);
    join_thread(thread);
    CHECK(presence_sender_send_count(both.sender) <= count + 1); /* one was accepted but not counted yet */
    presence_sender_free(both.sender);
    both.sender = NULL;
    close_pair(both);
  }
}

enum { MARKED = 1000 };

static void ask_many(void) {
  peer self = open_peer();
  for (int i = 0; i < MARKED; i++) {
    presence_stream *stream = request(self, "marked", "c", 1);
    presence_event event = expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
    CHECK(is_text(event.data, event.data_len, "the client is offline"));
    presence_stream_free(stream);
  }
  expect_nothing(self.queue);
  close_peer(self);
}

static void *mark_until_over(void *is_over) {
  while (!__atomic_load_n((bool *)is_over, __ATOMIC_ACQUIRE)) OK(mark_client_offline("c"));
  return NULL;
}

/* A request exists for a moment before its stream begins. A mark at that moment has the same status as any other,
 * and STOPPED never precedes REQUEST. */
static void marks_race_incoming_requests(void) {
  bool is_over = false;
  peer worker = open_peer_with("announce=never");
  presence_service *service = serve(worker, "marked");
  pid_t other = start("ask_many");
  pthread_t thread = start_thread(mark_until_over, &is_over);
  /* The gateway may learn of the stop and request again before the event arrives. */
  presence_sender *running[2] = {NULL, NULL};
  for (int i = 0; i < 2 * MARKED; i++) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(worker.queue, &event, 1, TIMEOUT_MS), 1);
    bool is_request = event.kind == PRESENCE_EVENT_REQUEST;
    if (!is_request) CHECK_STATUS(event.status, PRESENCE_OFFLINE);
    int at = running[0] == (is_request ? NULL : event.sender) ? 0 : 1;
    CHECK(running[at] == (is_request ? NULL : event.sender));
    running[at] = is_request ? event.sender : NULL;
    if (!is_request) presence_sender_free(event.sender);
  }
  expect_nothing(worker.queue);
  expect_exit(other, 0);
  __atomic_store_n(&is_over, true, __ATOMIC_RELEASE);
  join_thread(thread);
  presence_service_free(service);
  close_peer(worker);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(announce_far_client);
  ROLE(announce_selectively);
  ROLE(announce_own_streams);
  ROLE(cancel_one_of_two);
  ROLE(ask_many);
  RUN_ON_BOTH(mark_stops_senders_and_streams);
  RUN_ON_BOTH(request_brings_an_offline_client_online);
  RUN_ON_BOTH(last_session_stops_senders);
  RUN_ON_BOTH(session_grace_delays_offline);
  RUN_ON_BOTH(cancel_stops_the_sender);
  RUN_ON_BOTH(freeing_a_stream_stops_the_sender);
  RUN_ON_LEVEL_0(cancel_of_a_marked_client_keeps_the_worker);
  RUN_ON_BOTH(announcement_stops_senders_and_streams);
  RUN_ON_BOTH(announcement_ends_marks_and_sessions);
  RUN_ON_BOTH(unannounced_marks_stay_local);
  RUN_ON_BOTH(announce_streams_announces_only_requesting_clients);
  RUN_ON_BOTH(client_stays_until_its_last_cancel);
  RUN_ON_BOTH(no_send_succeeds_after_the_mark);
  RUN_ON_BOTH(marks_race_incoming_requests);
  return 0;
}
