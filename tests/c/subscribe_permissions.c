/* Subscriptions that nats-server refuses: at once, later, and until it allows them again. */
#include "server.h"

static char file[] = "/tmp/presence-rights-XXXXXX";

/* Writes the server's configuration: the subjects that the user may subscribe to, and `more`. */
static void configure(const char *allowed, const char *more) {
  FILE *config = fopen(file, "w");
  CHECK(config);
  fprintf(config, "authorization { users: [{ user: u, password: p, permissions: { publish: \">\", subscribe: [%s] } }] }\n%s\n",
          allowed, more);
  CHECK_EQ(fclose(config), 0);
}

static own_server server_that_allows(const char *allowed, const char *more) {
  own_server server;
  memset(&server, 0, sizeof server);
  configure(allowed, more);
  server.config = file;
  close(own_socket(&server.port));
  snprintf(server.url, sizeof server.url, "nats://u:p@127.0.0.1:%d", server.port);
  start_server(&server);
  return server;
}


/* The next event other than LOG: each attempt is logged. */
static presence_event skip_logs(presence_queue *queue) {
  presence_event event;
  do CHECK_EQ(presence_queue_wait(queue, &event, 1, TIMEOUT_MS), 1);
  while (event.kind == PRESENCE_EVENT_LOG);
  return event;
}

/* Checks that the next event is a service's, with this tag and subject and a text that contains `text`. */
static void expect_service_event(peer worker, int32_t kind, int32_t status, uint64_t tag, const char *subject,
                              const char *text) {
  presence_event event = skip_logs(worker.queue);
  CHECK_EQ(event.kind, kind);
  CHECK_EQ(event.status, status);
  char found[1000];
  CHECK(event.tag == tag);
  CHECK(event.subject && is_text(event.subject, event.subject_len, subject));
  snprintf(found, sizeof found, "%.*s", (int)event.data_len, (const char *)event.data);
  CHECK_CONTAINS(found, text);
}

/* Checks that a stream of this connection to itself works. */
static void expect_served(peer worker, peer gateway, const char *subject) {
  presence_stream *stream = request_with(gateway, subject, "ann", 1, "retries=100");
  presence_sender *sender = accept_request(worker);
  OK(presence_sender_end(sender));
  expect(gateway.queue, PRESENCE_EVENT_END);
  presence_sender_free(sender);
  presence_stream_free(stream);
}

static void refused_subscription_fails_the_call(void) {
  own_server server = server_that_allows("\"_INBOX.>\", \"client.offline\", \"right\"", "");
  peer worker = open_peer_at(server.url, NULL);
  static const char *const groups[] = {NULL, "group"};
  for (int i = 0; i < 2; i++) {
    presence_service *service = NULL;
    presence_error error = {0, ""};
    CHECK_STATUS(presence_serve(worker.conn, worker.queue, "wrong", groups[i], 0, 7, &service, &error),
                 PRESENCE_DISCONNECTED);
    CHECK(!service);
    CHECK_CONTAINS(error.message, "Permissions Violation for Subscription to \"wrong\"");
  }
  OK(presence_listen_offline(worker.conn));
  /* The refused services left nothing behind. */
  peer gateway = second_queue(worker), right = second_queue(worker);
  presence_service *service = serve(right, "right");
  expect(worker.queue, PRESENCE_EVENT_LOG);
  expect(worker.queue, PRESENCE_EVENT_LOG);
  expect_served(right, gateway, "right");
  presence_service_free(service);
  presence_queue_free(right.queue);
  presence_queue_free(gateway.queue);
  close_peer(worker);
  kill_server(&server);
}

static void max_subscriptions_fails_the_call(void) {
  /* The connection needs subscriptions for inbox, lanes and announcements, and one for the service. */
  own_server server = server_that_allows("\">\"", on_lanes() ? "max_subscriptions: 4" : "max_subscriptions: 3");
  peer worker = open_peer_at(server.url, NULL), gateway = second_queue(worker), first = second_queue(worker);
  presence_service *one = serve(first, "one"), *two = NULL;
  presence_error error = {0, ""};
  CHECK_STATUS(presence_serve(worker.conn, worker.queue, "two", NULL, 0, 0, &two, &error), PRESENCE_FULL);
  CHECK_CONTAINS(error.message, "maximum subscriptions exceeded");
  CHECK_CONTAINS(error.message, "max_subscriptions");
  expect(worker.queue, PRESENCE_EVENT_LOG);
  expect_served(first, gateway, "one");
  presence_service_free(one);
  presence_queue_free(first.queue);
  presence_queue_free(gateway.queue);
  close_peer(worker);
  kill_server(&server);
}

static void refused_announcements_leave_services_working(void) {
  own_server server = server_that_allows("\"_INBOX.>\", \"work\"", "");
  peer worker = open_peer_at(server.url, NULL), gateway = second_queue(worker);
  CHECK_STATUS(presence_listen_offline(worker.conn), PRESENCE_DISCONNECTED);
  /* A worker can serve without announcements. */
  presence_service *service = serve(worker, "work");
  expect(worker.queue, PRESENCE_EVENT_LOG);
  presence_service_free(service);
  presence_queue_free(gateway.queue);
  close_peer(worker);
  kill_server(&server);
}

/* Like `nats-server --signal reload`. */
static void reload(own_server server, const char *allowed) {
  configure(allowed, "");
  CHECK_EQ(kill(server.process, SIGHUP), 0);
}

#define ALL "\"_INBOX.>\", \"client.offline\", \"work\", \"other\""

/* The permission is revoked and restored while streams run: events report both, and requests arrive again. */
static void revoked_permission_is_reported_and_restored(void) {
  own_server server = server_that_allows(ALL, "");
  peer worker = open_peer_at(server.url, "reconnect_max_ms=100"), gateway = second_queue(worker), other = second_queue(worker);
  presence_service *service, *untouched;
  OK(presence_serve(worker.conn, worker.queue, "work", "group", 0, 7, &service, NULL));
  OK(presence_serve(other.conn, other.queue, "other", "group", 0, 8, &untouched, NULL));
  presence_stream *stream = request(gateway, "work", "bob", 2);
  presence_sender *sender = accept_request(worker);
  for (int round = 0; round < 3; round++) {
    reload(server, "\"_INBOX.>\", \"client.offline\", \"other\"");
    expect_service_event(worker, PRESENCE_EVENT_DISCONNECTED, PRESENCE_DISCONNECTED, 7, "work", "Permissions Violation");
    OK(send_text(sender, "goes on"));
    expect_data(gateway.queue, "goes on");
    expect_served(other, gateway, "other");
    reload(server, ALL);
    expect_service_event(worker, PRESENCE_EVENT_CONNECTED, PRESENCE_OK, 7, "work", "again");
    expect_served(worker, gateway, "work");
  }
  OK(presence_sender_end(sender));
  expect(gateway.queue, PRESENCE_EVENT_END);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  presence_service_free(untouched);
  presence_queue_free(gateway.queue);
  presence_queue_free(other.queue);
  close_peer(worker);
  kill_server(&server);
}

/* Without a connection presence_serve succeeds; an event reports a later refusal. */
static void refusal_after_connecting_is_reported(void) {
  own_server server = server_that_allows("\"_INBOX.>\", \"client.offline\"", "");
  kill_server(&server);
  peer worker;
  presence_config *config = presence_config_new();
  presence_service *service;
  OK(presence_config_set(config, "retry_on_initial_connect", "true"));
  OK(presence_config_set(config, "lanes", on_lanes() ? "true" : "false"));
  OK(presence_connect(server.url, config, &worker.conn, NULL));
  presence_config_free(config);
  OK(presence_queue_new(&worker.queue));
  OK(presence_serve(worker.conn, worker.queue, "work", NULL, 0, 9, &service, NULL));
  start_server(&server);
  expect_service_event(worker, PRESENCE_EVENT_DISCONNECTED, PRESENCE_DISCONNECTED, 9, "work", "Permissions Violation");
  reload(server, ALL);
  expect_service_event(worker, PRESENCE_EVENT_CONNECTED, PRESENCE_OK, 9, "work", "again");
  presence_service_free(service);
  close_peer(worker);
  kill_server(&server);
}

/* Without its inbox a connection receives no answers: waiting streams end, and requests fail until it is subscribed
 * again. */
static void refused_inbox_fails_requests(void) {
  own_server server = server_that_allows(ALL, "");
  peer gateway = open_peer_at(server.url, "reconnect_max_ms=100"), worker = second_queue(gateway);
  presence_service *service = serve(worker, "work");
  presence_stream *stream = request(gateway, "work", "ann", 1), *refused = NULL;
  presence_sender *sender = accept_request(worker);
  reload(server, "\"client.offline\", \"work\"");
  CHECK_EQ(skip_logs(gateway.queue).kind, PRESENCE_EVENT_ERROR);
  presence_error error = {0, ""};
  CHECK_STATUS(start_request(gateway.conn, gateway.queue, "work", NULL, 0, "bob", 3, NULL, 2, &refused, &error),
               PRESENCE_DISCONNECTED);
  CHECK_CONTAINS(error.message, "Permissions Violation");
  reload(server, ALL);
  while (start_request(gateway.conn, gateway.queue, "work", NULL, 0, "bob", 3, NULL, 2, &refused, &error) != PRESENCE_OK)
    usleep(10000);
  presence_stream_free(refused);
  presence_stream_free(stream);
  presence_sender_free(sender);
  presence_service_free(service);
  presence_queue_free(worker.queue);
  close_peer(gateway);
  kill_server(&server);
}

/* Without the lane inbox there are no lanes, until it is allowed again. */
static void refused_lane_inbox_falls_back_to_level_0(void) {
  own_server server = server_that_allows("\"_INBOX.*.*\", \"client.offline\", \"work\"", "");
  peer gateway = open_peer_at(server.url, "reconnect_max_ms=100"), worker = second_queue(gateway);
  presence_service *service = serve(worker, "work");
  CHECK(expect(gateway.queue, PRESENCE_EVENT_LOG).data_len > 0);
  peer quiet = second_queue(gateway); /* receives no LOG of the attempts */
  expect_served(worker, quiet, "work");
  CHECK_EQ(stats_of(gateway).lanes, 0);
  reload(server, ALL);
  while (stats_of(gateway).lanes == 0) expect_served(worker, quiet, "work");
  presence_service_free(service);
  presence_queue_free(quiet.queue);
  presence_queue_free(worker.queue);
  close_peer(gateway);
  kill_server(&server);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  int fd = mkstemp(file);
  CHECK(fd >= 0);
  close(fd);
  RUN_ON_BOTH(refused_subscription_fails_the_call);
  RUN_ON_BOTH(max_subscriptions_fails_the_call);
  RUN_ON_BOTH(refused_announcements_leave_services_working);
  RUN_ON_BOTH(revoked_permission_is_reported_and_restored);
  RUN_ON_BOTH(refusal_after_connecting_is_reported);
  RUN(refused_lane_inbox_falls_back_to_level_0);
  RUN_ON_LEVEL_0(refused_inbox_fails_requests);
  unlink(file);
  return 0;
}
