/* NULL for each pointer of each function returns the status that the header documents, and changes nothing. */
#include "peer.h"

static presence_error error;

/* Checks that a failed call's error has its status and names the NULL argument. */
static void check_error(int32_t status, const char *text) {
  CHECK_STATUS(status, PRESENCE_INVALID);
  CHECK_EQ(error.status, status);
  CHECK_CONTAINS(error.message, text);
  memset(&error, 0, sizeof error);
}

static void marks_refuse_null(void) {
  CHECK_STATUS(mark_client_online(NULL), PRESENCE_INVALID);
  CHECK_STATUS(mark_client_offline(NULL), PRESENCE_INVALID);
  CHECK(!is_client_online(NULL));
  CHECK_STATUS(presence_mark_online(NULL, 3), PRESENCE_INVALID);
  CHECK_STATUS(presence_mark_offline(NULL, 3), PRESENCE_INVALID);
  CHECK(!presence_is_online(NULL, 3));
  size_t lengths[] = {0, 0, SIZE_MAX / 2, SIZE_MAX / 2, SIZE_MAX};
  for (int online = 0; online < 2; online++) {
    check_error(presence_mark_many(online, "x", NULL, 1, &error), "lens is NULL");
    CHECK_STATUS(presence_mark_many(online, NULL, lengths + 2, 1, NULL), PRESENCE_INVALID);
    for (size_t i = 0; i < 5; i++) CHECK_STATUS(presence_mark_many(online, "x", lengths + i, 5 - i, NULL), PRESENCE_INVALID);
    CHECK_STATUS(presence_mark_many(online, "x", lengths, SIZE_MAX, NULL), PRESENCE_INVALID);
    OK(presence_mark_many(online, NULL, NULL, 0, NULL));
    OK(presence_mark_many(online, NULL, lengths, 2, NULL));
  }
  CHECK_EQ(presence_online_count(), 0);
  /* NULL with length 0 is the empty id. */
  OK(presence_mark_online(NULL, 0));
  OK(presence_mark_offline(NULL, 0));
  CHECK(presence_is_online(NULL, 0));
}

static void sessions_refuse_null(void) {
  presence_session *session = NULL;
  CHECK_STATUS(presence_session_open("null", 4, NULL), PRESENCE_INVALID);
  CHECK_STATUS(presence_session_open(NULL, 4, &session), PRESENCE_INVALID);
  CHECK(!session && !is_client_online("null"));
  OK(presence_session_open(NULL, 0, &session));
  presence_session_close(session);
  presence_session_close(NULL);
  CHECK(!presence_session_is_open(NULL));
}

static void configs_refuse_null(void) {
  presence_config *config = presence_config_new();
  CHECK_STATUS(presence_config_set(NULL, "name", "x"), PRESENCE_INVALID);
  CHECK_STATUS(presence_config_set(config, NULL, "x"), PRESENCE_INVALID);
  CHECK_STATUS(presence_config_set(config, "name", NULL), PRESENCE_INVALID);
  check_error(presence_config_error(NULL, &error), "presence_config is NULL");
  CHECK_STATUS(presence_config_error(NULL, NULL), PRESENCE_INVALID);
  CHECK_STATUS(presence_config_set(config, "nonsense", "x"), PRESENCE_INVALID);
  CHECK_STATUS(presence_config_error(config, NULL), PRESENCE_INVALID);
  presence_config_free(config);
  presence_config_free(NULL);
}

static void connections_refuse_null(void) {
  presence_conn *conn = NULL;
  presence_stats stats;
  presence_queue *queue;
  check_error(presence_connect(NULL, NULL, &conn, &error), "url is NULL");
  check_error(presence_connect(url, NULL, NULL, &error), "out is NULL");
  CHECK_STATUS(presence_connect(NULL, NULL, &conn, NULL), PRESENCE_INVALID);
  CHECK(!conn);
  CHECK_STATUS(presence_listen_offline(NULL), PRESENCE_INVALID);
  CHECK_STATUS(presence_conn_stats(NULL, &stats), PRESENCE_INVALID);
  CHECK_STATUS(presence_close(NULL, 0), PRESENCE_INVALID);
  CHECK_STATUS(presence_metrics(NULL, 1), PRESENCE_INVALID);
  CHECK(presence_metrics(NULL, 0) > 0);

  OK(presence_queue_new(&queue));
  OK(presence_connect(url, NULL, &conn, NULL));
  CHECK_STATUS(presence_conn_watch(NULL, queue, 0), PRESENCE_INVALID);
  CHECK_STATUS(presence_conn_watch(conn, NULL, 0), PRESENCE_INVALID);
  CHECK_STATUS(presence_conn_stats(conn, NULL), PRESENCE_INVALID);
  OK(presence_close(conn, TIMEOUT_MS));
  presence_queue_free(queue);
}

static void queues_refuse_null(void) {
  presence_queue *queue;
  presence_event event;
  CHECK_STATUS(presence_queue_new(NULL), PRESENCE_INVALID);
  CHECK_STATUS(presence_queue_fd(NULL), PRESENCE_INVALID);
  CHECK_STATUS(presence_queue_wait(NULL, &event, 1, 0), PRESENCE_INVALID);
  CHECK_STATUS(presence_watch(NULL, 0), PRESENCE_INVALID);
  presence_queue_wake(NULL);
  presence_queue_free(NULL);
  OK(presence_queue_new(&queue));
  CHECK_STATUS(presence_queue_wait(queue, NULL, 1, 0), PRESENCE_INVALID);
  presence_queue_free(queue);
}

static void services_refuse_null(void) {
  peer self = open_peer();
  presence_service *service = NULL;
  check_error(presence_serve(NULL, self.queue, "null", "", 0, 0, &service, &error), "presence_conn is NULL");
  check_error(presence_serve(self.conn, NULL, "null", "", 0, 0, &service, &error), "presence_queue is NULL");
  check_error(presence_serve(self.conn, self.queue, NULL, "", 0, 0, &service, &error), "subject is NULL");
  check_error(presence_serve(self.conn, self.queue, "null", "", 0, 0, NULL, &error), "out is NULL");
  CHECK_STATUS(presence_serve(self.conn, self.queue, NULL, "", 0, 0, &service, NULL), PRESENCE_INVALID);
  CHECK(!service);
  CHECK_STATUS(presence_service_stop(NULL), PRESENCE_INVALID);
  presence_service_free(NULL);

  OK(presence_serve(self.conn, self.queue, "null", NULL, 0, 0, &service, NULL));
  presence_service_free(service);
  close_peer(self);
}

static void requests_refuse_null(void) {
  peer self = open_peer();
  presence_stream *stream = NULL;
  const presence_request_args args = {sizeof args, "null", "x", 1, "c", 1, 0, NULL};
  check_error(presence_request(NULL, self.queue, &args, &stream, &error), "presence_conn is NULL");
  check_error(presence_request(self.conn, NULL, &args, &stream, &error), "presence_queue is NULL");
  check_error(start_request(self.conn, self.queue, NULL, "x", 1, "c", 1, NULL, 0, &stream, &error), "subject is NULL");
  check_error(start_request(self.conn, self.queue, "null", NULL, 1, "c", 1, NULL, 0, &stream, &error), "NULL");
  check_error(start_request(self.conn, self.queue, "null", "x", 1, NULL, 1, NULL, 0, &stream, &error), "NULL");
  check_error(presence_request(self.conn, self.queue, &args, NULL, &error), "out is NULL");
  CHECK_STATUS(presence_request(self.conn, self.queue, NULL, &stream, NULL), PRESENCE_INVALID);
  check_error(presence_request(self.conn, self.queue, NULL, &stream, &error), "args is NULL");
  CHECK(!stream && !is_client_online("c"));
  CHECK_EQ(stats_of(self).streams, 0);
  CHECK_STATUS(presence_stream_cancel(NULL), PRESENCE_INVALID);
  CHECK_STATUS(presence_stream_consumed(NULL, 1), PRESENCE_INVALID);
  CHECK_EQ(presence_stream_tag(NULL), 0);
  size_t length = 9;
  CHECK(!presence_stream_client(NULL, &length) && length == 9);
  presence_stream_free(NULL);

  /* Without data, client, config and error. */
  OK(start_request(self.conn, self.queue, "null", NULL, 0, NULL, 0, NULL, 0, &stream, NULL));
  CHECK(!presence_stream_client(stream, NULL));
  expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_NO_RESPONDERS);
  presence_stream_free(stream);
  close_peer(self);
}

static void senders_refuse_null(void) {
  const char *value = "untouched";
  size_t length = 9;
  CHECK_STATUS(presence_sender_set_tag(NULL, 1), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_send(NULL, "x", 1), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_send_wait(NULL, "x", 1, 0), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_error(NULL, "x", 1), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_error_code(NULL, 1, "x", 1), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_end(NULL), PRESENCE_INVALID);
  CHECK(presence_sender_is_closed(NULL));
  CHECK_EQ(presence_sender_max_message(NULL), 0);
  CHECK_EQ(presence_sender_send_count(NULL), 0);
  CHECK(!presence_sender_status_word(NULL));
  CHECK_STATUS(presence_sender_header(NULL, "Connect-ID", &value, &length), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_header_at(NULL, 0, &value, &length, &value, &length), PRESENCE_INVALID);
  CHECK(!presence_sender_reply(NULL, &length));
  CHECK_STATUS(presence_sender_send_many(NULL, "x", &length, 1), PRESENCE_INVALID);
  presence_sender_free(NULL);

  pair both = open_pair("c");
  CHECK_STATUS(presence_sender_header(both.sender, NULL, &value, &length), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_header(both.sender, "Connect-ID", NULL, &length), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_header(both.sender, "Connect-ID", &value, NULL), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_header_at(both.sender, 0, NULL, &length, &value, &length), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_header_at(both.sender, 0, &value, NULL, &value, &length), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_header_at(both.sender, 0, &value, &length, NULL, &length), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_header_at(both.sender, 0, &value, &length, &value, NULL), PRESENCE_INVALID);
  CHECK(!presence_sender_reply(both.sender, NULL));
  CHECK(strcmp(value, "untouched") == 0 && length == 9);
  CHECK_STATUS(presence_sender_send(both.sender, NULL, 1), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_send_wait(both.sender, NULL, 1, 0), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_error(both.sender, NULL, 1), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_error_code(both.sender, 1, NULL, 1), PRESENCE_INVALID);
  size_t lengths[] = {0, 0, SIZE_MAX / 2, SIZE_MAX / 2, SIZE_MAX};
  CHECK_STATUS(presence_sender_send_many(both.sender, "x", NULL, 1), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_send_many(both.sender, NULL, &length, 1), PRESENCE_INVALID);
  for (int i = 0; i < 5; i++) CHECK_STATUS(presence_sender_send_many(both.sender, "x", lengths + i, 5 - (size_t)i), PRESENCE_INVALID);
  CHECK_STATUS(presence_sender_send_many(both.sender, "x", lengths, SIZE_MAX), PRESENCE_INVALID);
  CHECK(!presence_sender_is_closed(both.sender));
  CHECK_EQ(presence_sender_send_count(both.sender), 0);

  /* NULL with length 0 is an empty message or text. */
  OK(presence_sender_send(both.sender, NULL, 0));
  OK(presence_sender_send_wait(both.sender, NULL, 0, 0));
  CHECK_EQ(presence_sender_send_many(both.sender, NULL, NULL, 0), 0);
  CHECK_EQ(presence_sender_send_many(both.sender, NULL, lengths, 2), 2);
  OK(presence_sender_error(both.sender, NULL, 0));
  for (int i = 0; i < 3; i++) expect_data(both.gateway.queue, "");
  expect_data(both.gateway.queue, "");
  presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  CHECK_EQ(last.data_len, 0);
  close_pair(both);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(marks_refuse_null);
  RUN(sessions_refuse_null);
  RUN(configs_refuse_null);
  RUN(connections_refuse_null);
  RUN(queues_refuse_null);
  RUN(services_refuse_null);
  RUN(requests_refuse_null);
  RUN(senders_refuse_null);
  return 0;
}
