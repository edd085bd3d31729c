/* nats-server closes a connection that sends a line above 4096 bytes (max_control_line) or a message above
 * max_payload. Neither a caller nor a peer can make the library do that. */
#include "server.h"

enum { FINE = 1000, TOO_LONG = 4000, LONGEST = 1 << 20 };
static const int lengths[] = {TOO_LONG, 4070, 4080, 4090, 5000, LONGEST};
static char text[LONGEST + 1];

static const char *text_of(int length) {
  memset(text, 'a', sizeof text);
  text[length] = '\0';
  return text;
}

/* Both ends still have their first connection, and streams run on it. */
static void check_unharmed(pair both) {
  OK(send_text(both.sender, "goes on"));
  expect_data(both.gateway.queue, "goes on");
  CHECK_EQ(stats_of(both.worker).connects, 1);
  CHECK_EQ(stats_of(both.gateway).connects, 1);
}

static void long_subjects_of_the_caller_are_refused(void) {
  pair both = open_pair("c");
  presence_error error;
  presence_stream *stream = NULL;
  presence_service *service = NULL;
  for (int i = 0; i < 6; i++) {
    CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, text_of(lengths[i]), "x", 1, "d", 1, NULL, 2,
                                  &stream, &error), PRESENCE_INVALID);
    CHECK_CONTAINS(error.message, "subject");
    CHECK_STATUS(presence_serve(both.worker.conn, both.worker.queue, text, "g", 0, 0, &service, &error), PRESENCE_INVALID);
    CHECK_CONTAINS(error.message, "subject");
    CHECK_STATUS(presence_serve(both.worker.conn, both.worker.queue, "s", text, 0, 0, &service, &error), PRESENCE_INVALID);
    CHECK_CONTAINS(error.message, "group");
    CHECK(!stream && !service && !is_client_online("d"));
    presence_config *config = presence_config_new();
    CHECK_STATUS(presence_config_set(config, "offline_subject", text), PRESENCE_INVALID);
    CHECK_STATUS(presence_config_set(config, "inbox_prefix", text), PRESENCE_INVALID);
    presence_config_free(config);
    check_unharmed(both);
  }
  peer far = second_queue(both.worker);
  OK(presence_serve(far.conn, far.queue, text_of(FINE), "g", 0, 0, &service, &error));
  run_whole_stream(far, both.gateway, text);
  presence_service_free(service);
  presence_queue_free(far.queue);
  check_unharmed(both);
  close_pair(both);
}

/* Headers count as payload. */
static void large_headers_are_refused(void) {
  pair both = open_pair("c");
  presence_config *config = presence_config_new();
  presence_stream *stream = NULL;
  OK(presence_config_set(config, "header.X", text_of(LONGEST)));
  CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", "x", 1, "d", 1, config, 2, &stream, NULL),
               PRESENCE_TOO_LARGE);
  CHECK(!stream && !is_client_online("d"));
  check_unharmed(both);
  presence_config_free(config);
  close_pair(both);
}

/* The peer is a socket: its requests have reply subjects as long as nats-server accepts. */
static void long_reply_subjects_of_a_peer_are_ignored(void) {
  static char line[2 * LONGEST];
  pair both = open_pair("c");
  presence_service *service = serve(both.worker, "p"); /* short, so that the reply subject may be longer */
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  const char *port = strrchr(url, ':');
  CHECK(port);
  struct sockaddr_in address = local(atoi(port + 1));
  CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
  static const char hello[] = "CONNECT {\"verbose\":false,\"headers\":true}\r\n";
  CHECK_EQ(send(fd, hello, sizeof hello - 1, MSG_NOSIGNAL), sizeof hello - 1);
  for (int length = 4000; length <= 4096 - 4; length++) { /* with "p " before it and " 0" after it */
    int size = snprintf(line, sizeof line, "PUB p %s 0\r\n\r\n", text_of(length));
    CHECK_EQ(send(fd, line, (size_t)size, MSG_NOSIGNAL), size);
  }
  for (int i = 0; i < 6; i++) { /* in a header it may be longer */
    char *head = (char *)malloc(2 * LONGEST);
    CHECK(head);
    int total = snprintf(head, 2 * LONGEST, "NATS/1.0\r\nConnect-ID: p\r\nPresence-Lane: 1 %.*s 0123456789abcdef 65536\r\n\r\n",
                         lengths[i] - 100, text_of(LONGEST));
    int size = snprintf(line, sizeof line, "HPUB p _INBOX.peer.1 %d %d\r\n%s\r\n", total, total, head);
    CHECK_EQ(send(fd, line, (size_t)size, MSG_NOSIGNAL), size);
    free(head);
  }
  static const char last[] = "PUB p _INBOX.last 4\r\nlast\r\n";
  CHECK_EQ(send(fd, last, sizeof last - 1, MSG_NOSIGNAL), sizeof last - 1);
  /* Requests that were accepted are answered with as much as possible. */
  static char data[100000];
  for (bool is_last = false; !is_last;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(both.worker.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind != PRESENCE_EVENT_REQUEST) continue;
    is_last = is_text(event.data, event.data_len, "last");
    int32_t sent = presence_sender_send(event.sender, data, sizeof data);
    CHECK(sent == PRESENCE_OK || sent == PRESENCE_FULL);
    presence_sender_free(event.sender);
  }
  check_unharmed(both);
  close(fd);
  presence_service_free(service);
  close_pair(both);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN_ON_BOTH(long_subjects_of_the_caller_are_refused);
  RUN_ON_BOTH(large_headers_are_refused);
  RUN_ON_BOTH(long_reply_subjects_of_a_peer_are_ignored);
  return 0;
}
