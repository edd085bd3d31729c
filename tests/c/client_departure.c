/* A client leaves at every moment of its stream's life and is back at once under the same id, a thousand times: each
 * stream ends once, none is revived, and the next is unaffected. And a client that is at two gateways. */
#include "peer.h"

enum { ROUNDS = 1000 };

/* When the client leaves. The request's first byte tells the worker. */
enum moment {
  BEFORE_THE_REQUEST, /* the stream runs to its end */
  DURING_ACCEPT,      /* the worker sends nothing */
  BETWEEN_TWO_SENDS,  /* the worker sends one message, and tries another afterwards */
  AFTER_A_CANCEL,     /* the same */
  DURING_END,         /* the worker ends at once */
  AFTER_END,          /* the stream runs to its end */
  MOMENTS,
  ALL_IS_OVER = MOMENTS
};

/* The gateway --------------------------------------------------------------------------------------------------------- */

static presence_stream *streams[ROUNDS + 1];
static int ends[ROUNDS + 1], messages[ROUNDS + 1];

/* Takes events until the stream with this tag has `count` messages, or has ended. */
static presence_event take_until(peer self, uint64_t tag, int count) {
  for (;;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(self.queue, &event, 1, TIMEOUT_MS), 1);
    CHECK_EQ(ends[event.tag], 0); /* nothing follows the end */
    CHECK(event.stream == streams[event.tag]);
    if (event.kind == PRESENCE_EVENT_DATA) {
      char expected[] = {(char)('1' + messages[event.tag]++), '\0'};
      CHECK(is_text(event.data, event.data_len, expected));
    } else {
      ends[event.tag]++;
    }
    if (event.tag == tag && (ends[tag] || messages[tag] == count)) return event;
  }
}

static void check_end(peer self, uint64_t tag, int32_t kind, int32_t status) {
  presence_event event = take_until(self, tag, INT32_MAX);
  CHECK_EQ(event.kind, kind);
  CHECK_STATUS(event.status, status);
}

static void leave_at_every_moment(void) {
  peer self = open_peer();
  memset(ends, 0, sizeof ends);
  memset(messages, 0, sizeof messages);
  for (uint64_t round = 0; round <= ROUNDS; round++) {
    char moment = (char)(round == ROUNDS ? (int)ALL_IS_OVER : (int)(round % MOMENTS));
    if (moment == BEFORE_THE_REQUEST) OK(mark_client_offline("c"));
    OK(start_request(self.conn, self.queue, "leaving", &moment, 1, "c", 1, NULL, round, &streams[round], NULL));
    switch (moment) {
      case DURING_ACCEPT:
        OK(mark_client_offline("c"));
        check_end(self, round, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
        CHECK_EQ(messages[round], 0);
        break;
      case BETWEEN_TWO_SENDS:
        take_until(self, round, 1);
        OK(mark_client_offline("c"));
        check_end(self, round, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
        CHECK_EQ(messages[round], 1);
        break;
      case AFTER_A_CANCEL:
        take_until(self, round, 1);
        OK(presence_stream_cancel(streams[round]));
        OK(mark_client_offline("c"));
        check_end(self, round, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED);
        break;
      case DURING_END: { /* either is right */
        OK(mark_client_offline("c"));
        presence_event event = take_until(self, round, INT32_MAX);
        CHECK(event.kind == PRESENCE_EVENT_END || event.status == PRESENCE_OFFLINE);
        break;
      }
      default:
        check_end(self, round, PRESENCE_EVENT_END, PRESENCE_OK);
        CHECK_EQ(messages[round], 2);
        if (moment == AFTER_END) OK(mark_client_offline("c"));
    }
    /* In one process, the worker's sender may stop a moment later. */
    if (is_selected("leave_at_every_moment")) CHECK(!is_client_online("c"));
  }
  expect_nothing(self.queue);
  for (int i = 0; i <= ROUNDS; i++) {
    CHECK_EQ(ends[i], 1);
    presence_stream_free(streams[i]);
  }
  close_peer(self);
}

static void *leave_at_every_moment_in_a_thread(void *unused) {
  leave_at_every_moment();
  return unused;
}

/* The worker ---------------------------------------------------------------------------------------------------------- */

enum { KEPT = 3 * MOMENTS };

/* The last senders, newest first. */
static struct {
  presence_sender *sender;
  char moment;
  bool has_ended; /* by its worker */
  int stops;
} kept[KEPT];

static void serve_leaving_client(peer self) {
  memset(kept, 0, sizeof kept);
  for (bool is_over = false; !is_over;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(self.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_STOPPED) {
      for (int i = 0; i < KEPT; i++) {
        if (kept[i].sender != event.sender) continue;
        CHECK_EQ(++kept[i].stops, 1);
        CHECK(!kept[i].has_ended);
        /* An ACCEPT that crosses the mark is answered with CANCEL. */
        bool may_be_cancelled =
            kept[i].moment == AFTER_A_CANCEL || kept[i].moment == DURING_ACCEPT || kept[i].moment == DURING_END;
        CHECK(event.status == PRESENCE_OFFLINE || (may_be_cancelled && event.status == PRESENCE_CANCELLED));
        CHECK_STATUS(send_text(event.sender, "late"), event.status);
      }
      continue;
    }
    CHECK_EQ(event.kind, PRESENCE_EVENT_REQUEST);
    /* The client left before it requested again: every earlier stream has ended, and stays so. */
    for (int i = 0; i < KEPT && kept[i].sender; i++) {
      CHECK(presence_sender_is_closed(kept[i].sender));
      CHECK_STATUS(send_text(kept[i].sender, "late"), (int32_t)status_word(kept[i].sender));
      if (!kept[i].has_ended) CHECK(send_text(kept[i].sender, "late") != PRESENCE_CLOSED);
    }
    presence_sender_free(kept[KEPT - 1].sender);
    memmove(kept + 1, kept, sizeof kept - sizeof *kept);
    kept[0].sender = event.sender;
    kept[0].moment = *(const char *)event.data;
    kept[0].stops = 0;
    switch (kept[0].moment) {
      case DURING_ACCEPT:
        break;
      case BETWEEN_TWO_SENDS:
      case AFTER_A_CANCEL:
        OK(send_text(event.sender, "1"));
        break;
      case DURING_END:
        (void)presence_sender_end(event.sender);
        break;
      default:
        OK(send_text(event.sender, "1"));
        OK(send_text(event.sender, "2"));
        OK(presence_sender_end(event.sender));
    }
    kept[0].has_ended = presence_sender_is_closed(event.sender) && status_word(event.sender) == (uint32_t)PRESENCE_CLOSED;
    is_over = kept[0].moment == ALL_IS_OVER;
  }
}

static void leave_a_thousand_times(bool in_one_process) {
  peer worker = open_peer();
  presence_service *service = serve(worker, "leaving");
  pthread_t thread = 0;
  pid_t process = 0;
  run_whole_stream(worker, second_queue(worker), "leaving");
  if (in_one_process) thread = start_thread(leave_at_every_moment_in_a_thread, NULL);
  else process = start("leave_at_every_moment");
  serve_leaving_client(worker);
  if (in_one_process) join_thread(thread);
  else expect_exit(process, 0);
  for (int i = 0; i < KEPT; i++) presence_sender_free(kept[i].sender);
  presence_service_free(service);
  CHECK_EQ(stats_of(worker).senders, 0);
  close_peer(worker);
}

static void client_leaves_a_thousand_times_in_one_process(void) { leave_a_thousand_times(true); }
static void client_leaves_a_thousand_times_in_two_processes(void) { leave_a_thousand_times(false); }

/* Two gateways -------------------------------------------------------------------------------------------------------- */

/* One of the gateways, in its own process: the stream "orders" tells it what to do with its two streams. */
static void run_gateway(void) {
  peer self = open_peer(), orders = second_queue(self);
  presence_session *session;
  presence_event event;
  OK(presence_listen_offline(self.conn));
  OK(presence_session_open("c", 1, &session));
  presence_stream *first = request(self, "two", "c", 1), *second = request(self, "two", "c", 2);
  presence_stream *control = request(orders, "orders", "", 9);
  while (presence_queue_wait(orders.queue, &event, 1, -1) == 1 && event.kind == PRESENCE_EVENT_DATA) {
    if (is_text(event.data, event.data_len, "cancel the first")) {
      OK(presence_stream_cancel(first));
      CHECK_EQ(expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED).tag, 1);
    } else if (is_text(event.data, event.data_len, "the session ends")) {
      presence_session_close(session); /* the last session here: it ends what this process requested */
      CHECK_EQ(expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE).tag, 2);
      CHECK(!is_client_online("c"));
    } else if (is_text(event.data, event.data_len, "mark it offline")) {
      OK(mark_client_offline("c"));
    }
    if (!is_text(event.data, event.data_len, "cancel the first") && !is_text(event.data, event.data_len, "the session ends")) {
      /* It is offline everywhere: by the announcement, or because the worker ends the streams first. */
      uint64_t tags = 0;
      for (int i = 0; i < 2; i++) tags += expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE).tag;
      CHECK_EQ(tags, 1 + 2);
      while (is_client_online("c")) usleep(1000); /* its session has ended, too */
      presence_session_close(session);
    }
    expect_nothing(self.queue);
  }
  presence_stream_free(first);
  presence_stream_free(second);
  presence_stream_free(control);
  presence_queue_free(orders.queue);
  close_peer(self);
}

/* The client is at both gateways. A cancel, and the end of the last session at one gateway, end only that gateway's
 * streams. A mark ends all streams; on level 0 the end of a session does, too, because it can only be announced to
 * all. */
static void client_at_two_gateways(void) {
  peer worker = open_peer(), control = second_queue(worker);
  presence_service *services[] = {serve(worker, "two"), serve(control, "orders")};
  pid_t gateways[2];
  presence_sender *senders[2][2], *orders[2];
  for (int i = 0; i < 2; i++) {
    gateways[i] = start("run_gateway");
    for (int k = 0; k < 2; k++) senders[i][k] = accept_request(worker);
    orders[i] = accept_request(control);
  }
  for (int i = 0; i < 4; i++) CHECK(!presence_sender_is_closed(senders[i / 2][i % 2]));
  OK(send_text(orders[0], "cancel the first"));
  if (on_lanes()) CHECK(expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_CANCELLED).sender == senders[0][0]);
  for (int i = on_lanes() ? 1 : 0; i < 4; i++) CHECK(!presence_sender_is_closed(senders[i / 2][i % 2]));

  OK(send_text(orders[0], "the session ends"));
  if (on_lanes()) {
    CHECK(expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE).sender == senders[0][1]);
    for (int i = 2; i < 4; i++) CHECK(!presence_sender_is_closed(senders[i / 2][i % 2]));
    OK(send_text(orders[1], "mark it offline"));
    for (int i = 2; i < 4; i++) expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE);
  } else {
    for (int i = 0; i < 4; i++) expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE);
    OK(send_text(orders[1], "it is marked offline"));
  }
  for (int i = 0; i < 4; i++) CHECK(presence_sender_is_closed(senders[i / 2][i % 2]));
  for (int i = 0; i < 2; i++) {
    OK(presence_sender_end(orders[i]));
    expect_exit(gateways[i], 0);
  }
  expect_nothing(worker.queue);
  for (int i = 0; i < 4; i++) presence_sender_free(senders[i / 2][i % 2]);
  for (int i = 0; i < 2; i++) {
    presence_sender_free(orders[i]);
    presence_service_free(services[i]);
  }
  presence_queue_free(control.queue);
  close_peer(worker);
}

enum { EARLY = 50 };

/* Requests streams and frees them at once: of a service, and of a subject without workers. */
static void leave_before_the_answer(void) {
  const char *const announce[] = {"announce=always", "announce=streams"};
  for (int k = 0; k < 2; k++) {
    peer self = open_peer_with(announce[k]);
    for (int i = 0; i < EARLY; i++) {
      presence_stream_free(request(self, "early", "c", 1));
      presence_stream_free(request(self, "nobody", "c", 2));
      presence_session *session;
      OK(presence_session_open("c", 1, &session));
      presence_stream *stream = request(self, "early", "c", 3);
      presence_session_close(session);
      expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
      presence_stream_free(stream);
    }
    CHECK(!is_client_online("c"));
    /* The worker ends an anonymous stream at once. On its lane every answer to an earlier request precedes that. */
    presence_stream *last = request(self, "early", "", 4);
    expect(self.queue, PRESENCE_EVENT_END);
    presence_stream_free(last);
    CHECK_EQ(stats_of(self).offline_out, 0);
    close_peer(self);
  }
}

/* The client's stream at one gateway goes on while it opens and closes tabs at another. */
static void early_cancel_at_one_gateway_leaves_the_other(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "early");
  presence_stream *stream = request(gateway, "early", "c", 1);
  presence_sender *sender = accept_request(worker), *others[4 * EARLY];
  pid_t other = start("leave_before_the_answer");
  int requests = 0, stops = 0;
  for (int ended = 0; ended < 2 || stops < 4 * EARLY;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(worker.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_REQUEST && event.client_len == 0) {
      OK(presence_sender_end(event.sender));
      presence_sender_free(event.sender);
      ended++;
    } else if (event.kind == PRESENCE_EVENT_REQUEST) {
      others[requests++] = event.sender;
    } else {
      CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
      CHECK(event.sender != sender);
      /* OFFLINE where the worker had accepted before the session was closed: the CANCEL has the reason then. */
      CHECK(event.status == PRESENCE_CANCELLED || event.status == PRESENCE_OFFLINE);
      stops++;
    }
  }
  expect_exit(other, 0);
  OK(send_text(sender, "goes on"));
  expect_data(gateway.queue, "goes on");
  CHECK(is_client_online("c"));
  for (int i = 0; i < requests; i++) presence_sender_free(others[i]);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* A worker on level 0 is stopped as well: after its first message, or after some time if it sends nothing. */
static void late_worker_on_level_0_is_stopped(void) {
  CHECK_EQ(setenv("LANES", "false", 1), 0);
  peer worker = open_peer();
  CHECK_EQ(setenv("LANES", "true", 1), 0);
  peer gateway = open_peer();
  presence_service *service = serve(worker, "late");
  presence_sender *senders[2];
  const char *const clients[] = {"talks", "is silent"};
  for (int i = 0; i < 2; i++) {
    presence_stream_free(request(gateway, "late", clients[i], 1));
    senders[i] = accept_request(worker);
    CHECK(!presence_sender_is_closed(senders[i]));
  }
  OK(send_text(senders[0], "first"));
  for (int i = 0; i < 2; i++) CHECK(expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE).sender == senders[i]);
  /* Closing the connection does not wait that long. */
  presence_stream_free(request(gateway, "late", "is closed", 1));
  presence_sender *last = accept_request(worker);
  close_peer(gateway);
  CHECK(expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE).sender == last);
  for (int i = 0; i < 2; i++) presence_sender_free(senders[i]);
  presence_sender_free(last);
  presence_service_free(service);
  close_peer(worker);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(leave_at_every_moment);
  ROLE(run_gateway);
  ROLE(leave_before_the_answer);
  RUN_ON_BOTH(client_leaves_a_thousand_times_in_one_process);
  RUN_ON_BOTH(client_leaves_a_thousand_times_in_two_processes);
  RUN_ON_BOTH(client_at_two_gateways);
  RUN(early_cancel_at_one_gateway_leaves_the_other);
  RUN(late_worker_on_level_0_is_stopped);
  return 0;
}
