/* The connection to nats-server is lost while streams run on a lane. */
#include "content.h"
#include "proxy.h"

static own_server server;

/* A pair whose ends connect to these URLs, both with these options. */
static pair open_pair_at(const char *workers_url, const char *gateways_url, const char *client, const char *options) {
  pair self;
  self.worker = open_peer_at(workers_url, options);
  self.gateway = open_peer_at(gateways_url, options);
  self.service = serve(self.worker, "pair");
  self.stream = request_with(self.gateway, "pair", client, 1, "stream_buffer_bytes=6400");
  self.sender = accept_request(self.worker);
  run_whole_stream(self.worker, self.gateway, "pair");
  return self;
}

static pair open_pair_here(const char *client) { return open_pair_at(server.url, server.url, client, NULL); }

static void expect_disconnected(pair both) {
  expect(both.worker.queue, PRESENCE_EVENT_DISCONNECTED);
  expect(both.gateway.queue, PRESENCE_EVENT_DISCONNECTED);
}

/* The next event that is not about the connection. */
static presence_event next_event(peer self) {
  presence_event event;
  do CHECK_EQ(presence_queue_wait(self.queue, &event, 1, TIMEOUT_MS), 1);
  while (event.kind >= PRESENCE_EVENT_CONNECTED);
  return event;
}

static void take_content(peer gateway, uint64_t stream, uint64_t first, uint64_t count) {
  for (uint64_t i = first; i < first + count; i++) {
    presence_event event = next_event(gateway);
    CHECK_EQ(event.kind, PRESENCE_EVENT_DATA);
    CHECK_CONTENT(&event, 36, stream, i); /* each counts 100 */
  }
}

static int32_t send_content(presence_sender *sender, uint64_t stream, uint64_t number) {
  unsigned char message[36];
  fill_content(message, sizeof message, stream, number);
  return presence_sender_send(sender, message, sizeof message);
}

/* Sends are accepted up to the stream's window, then return PRESENCE_FULL; an end is accepted, too. All of it
 * arrives after the reconnect. */
static void sends_while_disconnected_arrive_later(void) {
  pair both = open_pair_here("c");
  presence_stream *short_stream = request(both.gateway, "pair", "d", 2);
  presence_sender *short_sender = accept_request(both.worker);
  for (uint64_t i = 0; i < 10; i++) OK(send_content(both.sender, 1, i));
  take_content(both.gateway, 1, 0, 10);
  kill_server(&server);
  expect_disconnected(both);

  int32_t status;
  uint64_t sent = 10;
  while ((status = send_content(both.sender, 1, sent)) == PRESENCE_OK) sent++;
  CHECK_STATUS(status, PRESENCE_FULL);
  CHECK(sent >= 64 && sent <= 74);
  CHECK_STATUS(presence_sender_send_wait(both.sender, "x", 1, 50), PRESENCE_TIMEOUT);
  CHECK_EQ(status_word(both.sender), 0);
  CHECK(is_client_online("c"));
  OK(send_content(short_sender, 2, 0));
  OK(presence_sender_end(short_sender));
  CHECK(stats_of(both.worker).bytes_waiting >= (sent - 10) * 36);
  CHECK_EQ(stats_of(both.worker).connected, 0);
  presence_stream *stream = NULL;
  CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", NULL, 0, "e", 1, NULL, 0, &stream, NULL),
               PRESENCE_DISCONNECTED);
  CHECK(!stream && !is_client_online("e"));

  start_server(&server);
  int others = 0;
  for (uint64_t i = 10; i < sent || others < 2;) {
    presence_event event = next_event(both.gateway);
    if (event.stream == short_stream) {
      CHECK_EQ(event.kind, others++ == 0 ? PRESENCE_EVENT_DATA : PRESENCE_EVENT_END);
      if (event.kind == PRESENCE_EVENT_DATA) CHECK_CONTENT(&event, 36, 2, 0);
    } else {
      CHECK_EQ(event.kind, PRESENCE_EVENT_DATA);
      CHECK_CONTENT(&event, 36, 1, i);
      i++;
    }
  }
  presence_event event = next_event(both.worker);
  CHECK(event.kind == PRESENCE_EVENT_WRITABLE && event.sender == both.sender);
  OK(send_content(both.sender, 1, sent));
  OK(presence_sender_end(both.sender));
  take_content(both.gateway, 1, sent, 1);
  CHECK_EQ(next_event(both.gateway).kind, PRESENCE_EVENT_END);
  presence_sender_free(short_sender);
  presence_stream_free(short_stream);
  close_pair(both);
}

/* What the gateway ends meanwhile has ended there; the worker learns of it after the reconnect. */
static void ends_while_disconnected_stop_the_sender_later(void) {
  enum { CANCEL, FREE, TIMEOUT, WAYS };
  pair both = open_pair_here("c");
  presence_stream *streams[WAYS];
  presence_sender *senders[WAYS];
  for (uint64_t i = 0; i < WAYS; i++) {
    streams[i] = request_with(both.gateway, "pair", "c", 2 + i, i == TIMEOUT ? "timeout_ms=400" : NULL);
    senders[i] = accept_request(both.worker);
  }
  run_whole_stream(both.worker, both.gateway, "pair");
  kill_server(&server);
  expect_disconnected(both);
  OK(presence_stream_cancel(streams[CANCEL]));
  presence_stream_free(streams[FREE]);
  presence_event event = next_event(both.gateway);
  CHECK(event.stream == streams[CANCEL] && event.status == PRESENCE_CANCELLED);
  event = next_event(both.gateway);
  CHECK(event.stream == streams[TIMEOUT] && event.status == PRESENCE_TIMEOUT);
  for (int i = 0; i < WAYS; i++) CHECK_EQ(status_word(senders[i]), 0);
  start_server(&server);
  for (int i = 0; i < WAYS; i++) {
    event = next_event(both.worker);
    CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
    CHECK_STATUS(event.status, PRESENCE_CANCELLED);
  }
  for (int i = 0; i < WAYS; i++) CHECK_STATUS(send_text(senders[i], "late"), PRESENCE_CANCELLED);
  OK(send_content(both.sender, 1, 0));
  take_content(both.gateway, 1, 0, 1);
  for (int i = 0; i < WAYS; i++) {
    presence_sender_free(senders[i]);
    presence_stream_free(streams[i]);
  }
  close_pair(both);
}

/* A request that no worker has accepted ends with the connection. */
static void unaccepted_request_ends_with_the_connection(void) {
  pair both = open_pair_here("c");
  suspend(server.process);
  presence_stream *stream = request(both.gateway, "pair", "d", 2);
  kill_server(&server);
  start_server(&server);
  presence_event last = next_event(both.gateway);
  CHECK(last.kind == PRESENCE_EVENT_ERROR && last.stream == stream && last.data_len > 0);
  CHECK_STATUS(last.status, PRESENCE_DISCONNECTED);
  CHECK(!is_client_online("d"));
  OK(send_content(both.sender, 1, 0));
  take_content(both.gateway, 1, 0, 1);
  presence_stream_free(stream);
  close_pair(both);
}

/* One end closes its connection meanwhile: the other finds it gone after its reconnect. */
static void peer_that_closed_while_disconnected_is_gone(void) {
  for (int worker_closes = 0; worker_closes < 2; worker_closes++) {
    pair both = open_pair_at(server.url, server.url, "c", "reconnect_max_ms=100 connect_timeout_ms=500");
    OK(send_content(both.sender, 1, 0));
    take_content(both.gateway, 1, 0, 1);
    kill_server(&server);
    expect_disconnected(both);
    peer closes = worker_closes ? both.worker : both.gateway;
    CHECK_STATUS(presence_close(closes.conn, TIMEOUT_MS), PRESENCE_DISCONNECTED);
    presence_event event = next_event(closes);
    CHECK_EQ(event.kind, worker_closes ? PRESENCE_EVENT_STOPPED : PRESENCE_EVENT_ERROR);
    CHECK_STATUS(event.status, PRESENCE_CLOSED);
    start_server(&server);
    event = next_event(worker_closes ? both.gateway : both.worker);
    CHECK_EQ(event.kind, worker_closes ? PRESENCE_EVENT_ERROR : PRESENCE_EVENT_STOPPED);
    CHECK_STATUS(event.status, PRESENCE_PEER_GONE);
    presence_sender_free(both.sender);
    presence_stream_free(both.stream);
    presence_service_free(both.service);
    OK(presence_close(worker_closes ? both.gateway.conn : both.worker.conn, TIMEOUT_MS));
    presence_queue_free(both.gateway.queue);
    presence_queue_free(both.worker.queue);
  }
}

/* A connection that gives up ends its streams. */
static void giving_up_ends_the_streams(void) {
  pair both = open_pair_at(server.url, server.url, "c", "max_reconnects=2");
  OK(send_content(both.sender, 1, 0));
  take_content(both.gateway, 1, 0, 1);
  kill_server(&server);
  presence_event event = next_event(both.gateway);
  CHECK(event.kind == PRESENCE_EVENT_ERROR && event.stream == both.stream);
  CHECK_STATUS(event.status, PRESENCE_CLOSED);
  event = next_event(both.worker);
  CHECK(event.kind == PRESENCE_EVENT_STOPPED && event.sender == both.sender);
  CHECK_STATUS(event.status, PRESENCE_CLOSED);
  CHECK_STATUS(send_text(both.sender, "late"), PRESENCE_CLOSED);
  presence_sender_free(both.sender);
  presence_stream_free(both.stream);
  presence_service_free(both.service);
  CHECK(presence_close(both.worker.conn, TIMEOUT_MS) != PRESENCE_OK);
  CHECK(presence_close(both.gateway.conn, TIMEOUT_MS) != PRESENCE_OK);
  presence_queue_free(both.gateway.queue);
  presence_queue_free(both.worker.queue);
  start_server(&server);
}

/* Losing one end's connection --------------------------------------------------------------------------------------- */

/* All that one end sends and receives is lost for a while, then its connection is cut: nothing is missing
 * afterwards. */
static void messages_lost_with_the_connection_are_retransmitted(void) {
  for (int workers = 0; workers < 2; workers++) {
    proxy *before = new_proxy(server.port);
    pair both = open_pair_at(workers ? before->url : server.url, workers ? server.url : before->url, "c", NULL);
    uint64_t sent = 0, taken = 0;
    for (int round = 0; round < 5; round++) {
      uint64_t out = stats_of(both.worker).messages_out;
      proxy_swallow(before, true);
      for (int i = 0; i < 10; i++) OK(send_content(both.sender, 1, sent++)); /* all fit into the window */
      while (stats_of(both.worker).messages_out == out) usleep(100); /* something was sent and lost */
      proxy_cut(before);
      proxy_swallow(before, false);
      take_content(both.gateway, 1, taken, sent - taken);
      taken = sent;
    }
    OK(presence_sender_end(both.sender));
    CHECK_EQ(next_event(both.gateway).kind, PRESENCE_EVENT_END);
    close_pair(both);
    close(before->listener);
  }
}

/* One end's traffic is lost without a broken connection: after three heartbeats each end finds the other gone. */
static void silent_link_ends_the_streams_after_three_heartbeats(void) {
  for (int workers = 0; workers < 2; workers++) {
    proxy *before = new_proxy(server.port);
    pair both =
        open_pair_at(workers ? before->url : server.url, workers ? server.url : before->url, "c", "heartbeat_ms=500");
    while (stats_of(both.worker).bytes_waiting > 0) usleep(1000); /* the gateway has acknowledged something */
    proxy_swallow(before, true);
    int64_t since = now_ms();
    presence_event event = next_event(both.gateway);
    CHECK(event.kind == PRESENCE_EVENT_ERROR && event.stream == both.stream && event.data_len > 0);
    CHECK_STATUS(event.status, PRESENCE_PEER_GONE);
    event = next_event(both.worker);
    CHECK(event.kind == PRESENCE_EVENT_STOPPED && event.sender == both.sender);
    CHECK_STATUS(event.status, PRESENCE_PEER_GONE);
    int64_t after = now_ms() - since;
    CHECK(after >= 900 && after < 6000);
    CHECK_STATUS(send_text(both.sender, "late"), PRESENCE_PEER_GONE);
    CHECK(!is_client_online("c"));

    proxy_cut(before);
    proxy_swallow(before, false);
    peer cut = workers ? both.worker : both.gateway;
    expect(cut.queue, PRESENCE_EVENT_DISCONNECTED);
    expect(cut.queue, PRESENCE_EVENT_CONNECTED);
    OK(presence_listen_offline(both.worker.conn)); /* returns when the service is subscribed again */
    run_whole_stream(both.worker, both.gateway, "pair");
    close_pair(both);
    close(before->listener);
  }
}

/* With peer_grace_ms=0 a peer is gone as soon as nats-server does not know it, even for a moment. */
static void without_grace_a_disconnected_peer_is_gone(void) {
  proxy *before = new_proxy(server.port);
  pair both = open_pair_at(server.url, before->url, "c", "peer_grace_ms=0");
  close(before->listener); /* it cannot reconnect at once */
  proxy_cut(before);
  int32_t status;
  while ((status = presence_sender_send_wait(both.sender, "x", 1, 10)) != PRESENCE_PEER_GONE) {
    CHECK(status == PRESENCE_OK || status == PRESENCE_TIMEOUT);
    usleep(1000);
  }
  presence_event event = next_event(both.worker);
  CHECK(event.kind == PRESENCE_EVENT_STOPPED || event.kind == PRESENCE_EVENT_WRITABLE);
  /* nats-server may have told the worker before the gateway noticed. */
  do CHECK_EQ(presence_queue_wait(both.gateway.queue, &event, 1, TIMEOUT_MS), 1);
  while (event.kind != PRESENCE_EVENT_DISCONNECTED);
  CHECK_STATUS(presence_close(both.gateway.conn, 0), PRESENCE_DISCONNECTED);
  presence_sender_free(both.sender);
  presence_stream_free(both.stream);
  presence_service_free(both.service);
  presence_queue_free(both.gateway.queue);
  close_peer(both.worker);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  server = new_server();
  RUN(sends_while_disconnected_arrive_later);
  RUN(ends_while_disconnected_stop_the_sender_later);
  RUN(unaccepted_request_ends_with_the_connection);
  RUN(peer_that_closed_while_disconnected_is_gone);
  RUN(giving_up_ends_the_streams);
  RUN(messages_lost_with_the_connection_are_retransmitted);
  RUN(silent_link_ends_the_streams_after_three_heartbeats);
  RUN(without_grace_a_disconnected_peer_is_gone);
  kill_server(&server);
  return 0;
}
