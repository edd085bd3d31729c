/* Invalid input returns the documented status and a message that names the value and the valid ones, and changes
 * nothing. */
#include "peer.h"

static presence_error error;

static void forget_error(void) { memset(&error, 0, sizeof error); }

/* Checks that the last call failed with this status and that its message contains this text. */
#define CHECK_ERROR(call, expected, text)   \
  do {                                      \
    forget_error();                         \
    CHECK_STATUS(call, expected);           \
    CHECK_EQ(error.status, expected);       \
    CHECK_CONTAINS(error.message, text);       \
  } while (0)

/* A wrong value, and what the message about it must contain. */
struct bad {
  const char *value, *text;
};

static int32_t try_request(peer self, const char *subject, const char *client, size_t length, presence_config *config) {
  presence_stream *stream = NULL;
  int32_t status = start_request(self.conn, self.queue, subject, "x", 1, client, length, config, 0, &stream, &error);
  CHECK(status == PRESENCE_OK || !stream);
  presence_stream_free(stream);
  return status;
}

static int32_t try_serve(peer self, const char *subject, const char *group) {
  presence_service *service = NULL;
  int32_t status = presence_serve(self.conn, self.queue, subject, group, 0, 0, &service, &error);
  CHECK(status == PRESENCE_OK || !service);
  presence_service_free(service);
  return status;
}

static int32_t try_connect(const char *to, const presence_config *config) {
  presence_conn *conn = NULL;
  int32_t status = presence_connect(to, config, &conn, &error);
  CHECK(status == PRESENCE_OK || !conn);
  if (conn) OK(presence_close(conn, TIMEOUT_MS));
  return status;
}

static void invalid_subjects_are_refused(void) {
  peer self = open_peer();
  struct bad nowhere[] = {
      {"", "is empty"},         {"a b", "\"a b\""},        {"a\tb", "\"a\\tb\""},     {"a\r\nb", "\"a\\r\\nb\""},
      {"a\r\nPUB x 0", "\\r"},  {".", "empty token"},      {"a.", "\"a.\""},          {"a..b", "\"a..b\""},
      {".a", "\".a\""},         {"a\x7f", "control"},      {"a\xff", "UTF-8"},        {" ", "white space"},
      {"a\xc2\xa0z", "white"},
  };
  for (size_t i = 0; i < sizeof nowhere / sizeof *nowhere; i++) {
    CHECK_ERROR(try_request(self, nowhere[i].value, "c", 1, NULL), PRESENCE_INVALID, nowhere[i].text);
    CHECK_CONTAINS(error.message, "subject");
    CHECK_ERROR(try_serve(self, nowhere[i].value, "g"), PRESENCE_INVALID, nowhere[i].text);
    CHECK_CONTAINS(error.message, "subject");
  }
  const char *wildcards[] = {"*", ">", "a.*", "a.*.b", "a.>"};
  for (int i = 0; i < 5; i++) {
    CHECK_ERROR(try_request(self, wildcards[i], "c", 1, NULL), PRESENCE_INVALID, "wildcard");
    CHECK_CONTAINS(error.message, wildcards[i]);
    forget_error();
    OK(try_serve(self, wildcards[i], "g")); /* wildcards are allowed here */
  }
  CHECK_ERROR(try_serve(self, "a.>.b", "g"), PRESENCE_INVALID, "a.>.b");
  const char *groups[] = {"a b", "a\r\nb", " ", "\xff"};
  for (int i = 0; i < 4; i++) CHECK_ERROR(try_serve(self, "ok", groups[i]), PRESENCE_INVALID, "group");
  CHECK_EQ(stats_of(self).connects, 1); /* nothing reached the server */
  CHECK_EQ(stats_of(self).streams, 0);
  CHECK(!is_client_online("c"));
  expect_nothing(self.queue);
  close_peer(self);
}

static void invalid_client_ids_are_refused(void) {
  peer self = open_peer();
  char too_long[1025];
  memset(too_long, 'x', sizeof too_long);
  CHECK_ERROR(try_request(self, "ids", too_long, sizeof too_long, NULL), PRESENCE_INVALID, "1025");
  CHECK_CONTAINS(error.message, "1024");
  CHECK_ERROR(try_request(self, "ids", "a\xff", 2, NULL), PRESENCE_INVALID, "UTF-8");
  CHECK_ERROR(try_request(self, "ids", "a\nb", 3, NULL), PRESENCE_INVALID, "\\n");
  CHECK_ERROR(try_request(self, "ids", "a\0b", 3, NULL), PRESENCE_INVALID, "\\0");
  CHECK_ERROR(try_request(self, "ids", " a", 2, NULL), PRESENCE_INVALID, "\" a\""); /* a header would lose the space */
  CHECK_EQ(presence_online_count(), 0);
  OK(try_request(self, "ids", too_long, 1024, NULL));
  close_peer(self);
}

static void unknown_options_are_refused(void) {
  presence_config *config = presence_config_new();
  forget_error();
  OK(presence_config_error(config, &error));
  CHECK(error.message[0] == '\0'); /* left untouched */
  const char *unknown[] = {"", "nonsense", "Name", "name ", "headers.X", "timeout"};
  for (int i = 0; i < 6; i++) {
    CHECK_STATUS(presence_config_set(config, unknown[i], "1"), PRESENCE_INVALID);
    CHECK_ERROR(presence_config_error(config, &error), PRESENCE_INVALID, "unknown");
    CHECK_CONTAINS(error.message, unknown[i]);
    /* The message lists every known option. */
    const char *known[] = {
        "name", "user", "password", "token", "nkey_seed", "creds_file", "auth_socket", "tls_required", "tls_first", "tls_ca_file",
        "tls_cert_file", "tls_key_file", "connect_timeout_ms", "retry_on_initial_connect", "reconnect_min_ms",
        "reconnect_max_ms", "max_reconnects", "ping_interval_ms", "inbox_prefix", "offline_subject", "announce",
        "lanes", "discovery", "heartbeat_ms", "peer_grace_ms", "send_buffer_bytes", "receive_buffer_bytes", "session_grace_ms", "worker_threads",
        "timeout_ms", "retries", "retry_delay_ms", "stream_buffer_bytes", "manual_credit", "header.NAME",
    };
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) CHECK_CONTAINS(error.message, known[k]);
  }
  CHECK_STATUS(presence_config_set(config, "n\xff", "1"), PRESENCE_INVALID);
  CHECK_STATUS(presence_config_set(config, "name", "\xff"), PRESENCE_INVALID);
  OK(try_connect(url, config)); /* the config behaves as if nothing had been set */
  presence_config_free(config);
}

/* options.c tests values that are not numbers; these are just outside their range. */
static void wrong_option_values_are_refused(void) {
  struct {
    const char *key, *value, *right;
  } wrong[] = {
      {"name", "a\nb", "control"},
      {"tls_required", "yes", "true or false"},
      {"tls_first", "", "true or false"},
      {"retry_on_initial_connect", "TRUE", "true or false"},
      {"connect_timeout_ms", "0", "from 1"},
      {"ping_interval_ms", "1", "from 10"},
      {"inbox_prefix", "a b", "white space"},
      {"inbox_prefix", "a.*", "wildcard"},
      {"offline_subject", "", "empty"},
      {"offline_subject", "client.>", "wildcard"},
      {"announce", "sometimes", "always, streams or never"},
      {"send_buffer_bytes", "0", "from 1"},
      {"worker_threads", "65", "64"},
      {"worker_threads", "0", "from 1"},
      {"stream_buffer_bytes", "0", "from 1"},
      {"receive_buffer_bytes", "0", "from 1"},
      {"lanes", "1", "true or false"},
      {"discovery", "no", "true or false"},
      {"manual_credit", "yes", "true or false"},
      {"heartbeat_ms", "9", "from 10"},
      {"peer_grace_ms", "-1", "from 0"},
      {"header.", "x", "header name"},
      {"header.a b", "x", "header name"},
      {"header.a:b", "x", "header name"},
      {"header.X", "a\r\nb", "control"},
      {"header.connect-id", "x", "Connect-ID"},
      {"header.Nats-Msg-Id", "x", "Nats-"},
      {"header.Presence-Lane", "x", "Presence-"},
  };
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    presence_config *config = presence_config_new();
    CHECK_STATUS(presence_config_set(config, wrong[i].key, wrong[i].value), PRESENCE_INVALID);
    CHECK_ERROR(presence_config_error(config, &error), PRESENCE_INVALID, wrong[i].right);
    const char *name = strncmp(wrong[i].key, "header.", 7) == 0 ? wrong[i].key + 7 : wrong[i].key;
    CHECK_CONTAINS(error.message, name);
    if (!strpbrk(wrong[i].value, "\r\n") && wrong[i].value[0] != 'x') CHECK_CONTAINS(error.message, wrong[i].value);
    OK(try_connect(url, config));
    presence_config_free(config);
  }
}

static void malformed_urls_are_refused(void) {
  struct bad urls[] = {
      {"", "empty"},
      {"nats://", "nats://"},
      {"http://127.0.0.1:4222", "http://127.0.0.1:4222"},
      {"ws://127.0.0.1:4222", "ws://127.0.0.1:4222"},
      {"nats://127.0.0.1:99999", "99999"},
      {"nats://127.0.0.1:port", "port"},
      {"nats://127.0.0.1 :4222", "127.0.0.1"},
      {"nats://[::1", "[::1"},
      {"nats://127.0.0.1:4222,", "empty"},
      {"nats://127.0.0.1:4222,,nats://127.0.0.1:4223", "empty"},
      {"\xff", "UTF-8"},
  };
  for (size_t i = 0; i < sizeof urls / sizeof *urls; i++) {
    CHECK_ERROR(try_connect(urls[i].value, NULL), PRESENCE_INVALID, urls[i].text);
    if (strcmp(urls[i].text, "UTF-8") != 0) CHECK_CONTAINS(error.message, "use nats://host:port");
  }
}

static void unreachable_servers_are_named(void) {
  presence_config *config = presence_config_new();
  OK(presence_config_set(config, "connect_timeout_ms", "2000"));
  CHECK_ERROR(try_connect("nats://127.0.0.1:1", config), PRESENCE_DISCONNECTED, "127.0.0.1:1");
  CHECK_ERROR(try_connect("nats://127.0.0.1:1,nats://127.0.0.1:2", config), PRESENCE_DISCONNECTED, "127.0.0.1:1");
  CHECK_CONTAINS(error.message, "127.0.0.1:2");
  char one_of_two[256];
  snprintf(one_of_two, sizeof one_of_two, "nats://127.0.0.1:1,%s", url);
  OK(try_connect(one_of_two, config));
  OK(presence_config_set(config, "creds_file", "/nowhere/at-all")); /* the file is read when it is used */
  CHECK_ERROR(try_connect(url, config), PRESENCE_INVALID, "/nowhere/at-all");
  presence_config_free(config);
}

/* Not connected yet, with retry_on_initial_connect: requests fail, services start later, and close does not wait. */
static void requests_before_the_first_connection_fail(void) {
  presence_config *config = presence_config_new();
  presence_service *service;
  peer self;
  OK(presence_config_set(config, "retry_on_initial_connect", "true"));
  OK(presence_connect("nats://127.0.0.1:1", config, &self.conn, NULL));
  OK(presence_queue_new(&self.queue));
  presence_config_free(config);
  CHECK_EQ(stats_of(self).connected, 0);
  CHECK_ERROR(try_request(self, "not", "c", 1, NULL), PRESENCE_DISCONNECTED, "connection");
  CHECK(!is_client_online("c"));
  OK(presence_serve(self.conn, self.queue, "not", "", 0, 0, &service, NULL));
  OK(presence_listen_offline(self.conn));
  CHECK_STATUS(presence_close(self.conn, -1), PRESENCE_DISCONNECTED);
  presence_service_free(service);
  presence_queue_free(self.queue);
}

static const char *const secret = "hunter2";

/* Checks that connecting fails with a message that does not show the secret. */
static void check_refused(const presence_config *config) {
  forget_error();
  CHECK_STATUS(try_connect(url, config), PRESENCE_DISCONNECTED);
  CHECK(error.message[0] != '\0');
  CHECK(!strstr(error.message, secret));
}

/* Credentials given as options; connect_failures.c tests those in URLs. */
static void wrong_credentials_are_refused_without_showing_them(void) {
  char with[256];
  const char *host = url + strlen("nats://");
  snprintf(with, sizeof with, "nats://worker:correct%%20horse@%s", host);
  OK(try_connect(with, NULL));
  presence_config *right = presence_config_new();
  OK(presence_config_set(right, "user", "worker"));
  OK(presence_config_set(right, "password", "correct horse"));
  OK(try_connect(url, right));
  presence_config_free(right);

  presence_config *wrong = presence_config_new();
  OK(presence_config_set(wrong, "user", "worker"));
  OK(presence_config_set(wrong, "password", secret));
  check_refused(wrong);
  presence_config_free(wrong);
  wrong = presence_config_new();
  OK(presence_config_set(wrong, "token", secret));
  check_refused(wrong);
  presence_config_free(wrong);
  wrong = presence_config_new();
  if (presence_config_set(wrong, "nkey_seed", secret) == PRESENCE_OK) {
    forget_error();
    CHECK(try_connect(url, wrong) != PRESENCE_OK);
  } else {
    CHECK_STATUS(presence_config_error(wrong, &error), PRESENCE_INVALID);
  }
  CHECK(error.message[0] != '\0' && !strstr(error.message, secret));
  presence_config_free(wrong);
}

/* A message that is too long is cut between two characters. */
static void long_error_messages_are_cut_between_characters(void) {
  peer self = open_peer();
  char subject[2002];
  for (size_t shift = 0; shift < 2; shift++) {
    memset(subject, 0, sizeof subject);
    memset(subject, 'x', shift);
    for (size_t i = shift; i < 2000; i += 2) memcpy(subject + i, i < 1998 ? "\xc3\xbc" : "..", 2);
    memset(&error, 'x', sizeof error);
    CHECK_STATUS(try_request(self, subject, "c", 1, NULL), PRESENCE_INVALID);
    size_t length = strnlen(error.message, sizeof error.message);
    CHECK(length == PRESENCE_ERROR_MESSAGE - 1 || length == PRESENCE_ERROR_MESSAGE - 2);
    CHECK((unsigned char)error.message[length - 1] == 0xbc); /* the second byte of the last character */
  }
  close_peer(self);
}

/* A call fills in the error when it fails, and leaves it untouched otherwise. */
static void success_leaves_the_error_untouched(void) {
  presence_error untouched;
  memset(&error, 'x', sizeof error);
  untouched = error;
  peer self = open_peer();
  OK(try_connect(url, NULL));
  OK(try_serve(self, "fine", NULL));
  OK(try_request(self, "fine", "c", 1, NULL));
  CHECK(memcmp(&error, &untouched, sizeof error) == 0);
  close_peer(self);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(invalid_subjects_are_refused);
  RUN(invalid_client_ids_are_refused);
  RUN(unknown_options_are_refused);
  RUN(wrong_option_values_are_refused);
  RUN(malformed_urls_are_refused);
  RUN(unreachable_servers_are_named);
  RUN(requests_before_the_first_connection_fail);
  RUN(wrong_credentials_are_refused_without_showing_them);
  RUN(long_error_messages_are_cut_between_characters);
  RUN(success_leaves_the_error_untouched);
  return 0;
}
