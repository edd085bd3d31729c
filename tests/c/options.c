/* Options: the message of presence_config_error, and that a wrong option changes nothing. Every numeric option
 * refuses what is not a number. */
#include "peer.h"

static presence_error error;

/* Checks the message of presence_config_error after a failed presence_config_set. */
static void check_config_error(presence_config *config, const char *text) {
  memset(&error, 0, sizeof error);
  CHECK_STATUS(presence_config_error(config, &error), PRESENCE_INVALID);
  CHECK_EQ(error.status, PRESENCE_INVALID);
  CHECK_CONTAINS(error.message, text);
}

static void check_wrong(const char *key, const char *value, const char *text) {
  presence_config *config = presence_config_new();
  CHECK_STATUS(presence_config_set(config, key, value), PRESENCE_INVALID);
  check_config_error(config, text);
  presence_config_free(config);
}

/* It describes the last failure, of any kind; successful calls do not change it. */
static void config_error_describes_the_last_failure(void) {
  presence_config *config = presence_config_new();
  OK(presence_config_error(config, NULL));
  OK(presence_config_set(config, "retries", "3"));
  OK(presence_config_error(config, NULL));
  CHECK_STATUS(presence_config_set(config, "retries", "often"), PRESENCE_INVALID);
  check_config_error(config, "often");
  CHECK_STATUS(presence_config_set(config, "nonsense", "x"), PRESENCE_INVALID);
  check_config_error(config, "nonsense");
  OK(presence_config_set(config, "retries", "4"));
  check_config_error(config, "nonsense");
  CHECK_STATUS(presence_config_set(config, "name", "\xff"), PRESENCE_INVALID);
  check_config_error(config, "UTF-8");
  CHECK_STATUS(presence_config_set(config, "retries", "often"), PRESENCE_INVALID);
  CHECK_STATUS(presence_config_set(config, "n\xff", "x"), PRESENCE_INVALID);
  check_config_error(config, "UTF-8");
  CHECK_STATUS(presence_config_set(config, NULL, "x"), PRESENCE_INVALID);
  check_config_error(config, "key is NULL");
  CHECK_STATUS(presence_config_set(config, "name", NULL), PRESENCE_INVALID);
  check_config_error(config, "value is NULL");
  presence_config_free(config);

  check_wrong("name", "\xff", "UTF-8"); /* the first failure */
  check_wrong("password", "hunter2\xff", "UTF-8");
  CHECK(!strstr(error.message, "hunter2"));
}

static void non_numbers_are_refused(void) {
  static const char *const keys[] = {
      "connect_timeout_ms", "reconnect_min_ms", "reconnect_max_ms", "max_reconnects", "ping_interval_ms", "send_buffer_bytes",
      "session_grace_ms",   "worker_threads",   "timeout_ms",       "retries",        "retry_delay_ms",   "stream_buffer_bytes",
      "heartbeat_ms",       "peer_grace_ms",    "receive_buffer_bytes",
  };
  static const char *const wrong[] = {"", "-1", "x", "1.5", "5s", " 1", "1 ", "0x10", "99999999999999999999"};
  for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
    for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
      char quoted[40];
      snprintf(quoted, sizeof quoted, "\"%s\"", wrong[k]);
      check_wrong(keys[i], wrong[k], quoted);
      CHECK_CONTAINS(error.message, keys[i]);
      CHECK_CONTAINS(error.message, "whole number from");
    }
  }
}

/* Options that were set before apply, and wrong ones do not make the config one for requests. */
static void wrong_option_changes_nothing(void) {
  presence_config *config = presence_config_new();
  presence_conn *conn;
  OK(presence_config_set(config, "announce", "never"));
  CHECK_STATUS(presence_config_set(config, "announce", "loudly"), PRESENCE_INVALID);
  CHECK_STATUS(presence_config_set(config, "tls_required", "perhaps"), PRESENCE_INVALID);
  CHECK_STATUS(presence_config_set(config, "timeout_ms", "perhaps"), PRESENCE_INVALID);
  OK(presence_connect(url, config, &conn, NULL));
  presence_config_free(config); /* no longer needed */
  presence_stats stats;
  OK(mark_client_offline("c"));
  OK(presence_listen_offline(conn)); /* returns when the server has processed everything sent before */
  OK(presence_conn_stats(conn, &stats));
  CHECK_EQ(stats.offline_out, 0);
  OK(presence_close(conn, TIMEOUT_MS));
}

static void options_of_another_kind_are_refused(void) {
  static const char *const of_requests[][2] = {
      {PRESENCE_OPTION_TIMEOUT_MS, "1"},          {PRESENCE_OPTION_RETRIES, "1"},
      {PRESENCE_OPTION_RETRY_DELAY_MS, "1"},      {PRESENCE_OPTION_STREAM_BUFFER_BYTES, "1"},
      {PRESENCE_OPTION_MANUAL_CREDIT, "false"},   {PRESENCE_OPTION_HEADER "X", "y"},
  };
  static const char *const of_connections[][2] = {
      {PRESENCE_OPTION_NAME, "x"},                {PRESENCE_OPTION_USER, "x"},
      {PRESENCE_OPTION_ANNOUNCE, "never"},        {PRESENCE_OPTION_SEND_BUFFER_BYTES, "1"},
      {PRESENCE_OPTION_LANES, "false"},           {PRESENCE_OPTION_HEARTBEAT_MS, "1000"},
  };
  peer self = open_peer();
  for (int i = 0; i < 6; i++) {
    presence_conn *conn = NULL;
    presence_config *config = presence_config_new();
    OK(presence_config_set(config, of_requests[i][0], of_requests[i][1]));
    CHECK_STATUS(presence_connect(url, config, &conn, &error), PRESENCE_INVALID);
    CHECK_CONTAINS(error.message, of_requests[i][0]);
    CHECK(!conn);
    presence_config_free(config);

    presence_stream *stream = NULL;
    config = presence_config_new();
    OK(presence_config_set(config, of_connections[i][0], of_connections[i][1]));
    CHECK_STATUS(start_request(self.conn, self.queue, "s", NULL, 0, "c", 1, config, 0, &stream, &error), PRESENCE_INVALID);
    CHECK_CONTAINS(error.message, of_connections[i][0]);
    CHECK(!stream && !is_client_online("c"));
    presence_config_free(config);
  }
  CHECK_EQ(stats_of(self).streams, 0);
  close_peer(self);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(non_numbers_are_refused);
  RUN(wrong_option_changes_nothing);
  RUN(options_of_another_kind_are_refused);
  RUN(config_error_describes_the_last_failure);
  return 0;
}
