/* Servers that cannot be connected to: the status, the server's name in the message, and never a secret. */
#include "peer.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#define SECRET "hunter2"

static presence_error error;

/* Checks that connecting fails with a message that contains this text and no secret. */
static void check_fails_within(const char *timeout_ms, const char *to, int32_t expected, const char *text) {
  presence_conn *conn = NULL;
  presence_config *config = presence_config_new();
  OK(presence_config_set(config, "connect_timeout_ms", timeout_ms));
  memset(&error, 0, sizeof error);
  int32_t status = presence_connect(to, config, &conn, &error);
  presence_config_free(config);
  if (status != expected || !strstr(error.message, text) || strstr(error.message, SECRET)) {
    fprintf(stderr, "connecting to \"%s\" gives %d: \"%s\"\n", to, (int)status, error.message);
    CHECK_STATUS(status, expected);
    CHECK_CONTAINS(error.message, text);
    CHECK(!strstr(error.message, SECRET));
  }
  CHECK_EQ(error.status, expected);
  CHECK(!conn);
}

static void check_fails(const char *to, int32_t expected, const char *text) { check_fails_within("300", to, expected, text); }

/* Whatever else is wrong with the URL, the message never shows what precedes the host. */
static void secrets_in_urls_are_never_shown(void) {
  static const char *const bad[] = {
      "nats://user:" SECRET "@",       "http://user:" SECRET "@a",         "nats://" SECRET "@a:x",
      "nats://user:" SECRET "@a:99999", "nats://a,nats://user:" SECRET "@b:x", "nats://user:" SECRET "/@127.0.0.1:1",
      "nats://user:" SECRET "?@a",      "nats://user:" SECRET "#@a",        "nats://us er:" SECRET "@",
      "nats://user:" SECRET ",more@127.0.0.1:1",
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) check_fails(bad[i], PRESENCE_INVALID, "server URL");
  /* Part of a password that should be percent-encoded is mistaken for the host. */
  static const char *const misread[] = {"nats://user:x@" SECRET "/y@127.0.0.1:1", "nats://user:x@" SECRET "?y@127.0.0.1:1"};
  for (size_t i = 0; i < sizeof misread / sizeof *misread; i++) {
    presence_conn *conn = NULL;
    CHECK(presence_connect(misread[i], NULL, &conn, &error) != PRESENCE_OK);
    CHECK(*error.message && !strstr(error.message, SECRET));
    CHECK(!conn);
  }
}

static void line_breaks_in_urls_are_refused(void) {
  static const char *const bad[] = {"nats://127.0.0.1\r\n:1", "nats://127.\n0.0.1:1", "na\tts://127.0.0.1:1", "nats://127.0.0.1:1\x7f"};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) check_fails(bad[i], PRESENCE_INVALID, "server URL");
}

/* Opens a socket on a free local port; connections are refused until we listen. */
static int own_port(char *name, size_t size) {
  struct sockaddr_in address;
  socklen_t length = sizeof address;
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(fd >= 0);
  CHECK_EQ(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
  CHECK_EQ(getsockname(fd, (struct sockaddr *)&address, &length), 0);
  snprintf(name, size, "127.0.0.1:%d", ntohs(address.sin_port));
  return fd;
}

static void refusing_and_silent_servers_are_named(void) {
  char name[40], with_password[100], both[300];
  presence_conn *conn;
  int fd = own_port(name, sizeof name);
  snprintf(with_password, sizeof with_password, "nats://user:" SECRET "@%s", name);
  check_fails(with_password, PRESENCE_DISCONNECTED, name);
  check_fails_within("20000", "nats://no-such-host.invalid", PRESENCE_DISCONNECTED, "no-such-host.invalid");

  /* One reachable server is enough, whichever is tried first. */
  snprintf(both, sizeof both, "%s,%s", with_password, url);
  for (int i = 0; i < 8; i++) {
    OK(presence_connect(both, NULL, &conn, NULL));
    OK(presence_close(conn, TIMEOUT_MS));
  }
  CHECK_EQ(listen(fd, 8), 0); /* it accepts the connection and sends nothing */
  check_fails(with_password, PRESENCE_TIMEOUT, name);
  close(fd);
}

/* Sends what no nats-server sends, and a lot of it. */
static void *talk(void *listener) {
  char text[4096];
  int fd = accept(*(int *)listener, NULL, NULL);
  CHECK(fd >= 0);
  memset(text, 'x', sizeof text);
  memcpy(text, "HTTP/1.1 400 Bad Request\r\n\r\n", 28);
  CHECK(send(fd, text, sizeof text, MSG_NOSIGNAL) > 0);
  shutdown(fd, SHUT_WR);
  while (read(fd, text, sizeof text) > 0) continue;
  close(fd);
  return NULL;
}

static void non_nats_server_is_named(void) {
  char name[40], to[60];
  int fd = own_port(name, sizeof name);
  snprintf(to, sizeof to, "nats://%s", name);
  CHECK_EQ(listen(fd, 8), 0);
  pthread_t thread = start_thread(talk, &fd);
  check_fails(to, PRESENCE_DISCONNECTED, name);
  join_thread(thread);
  close(fd);
}

/* The server knows the user but not this password, or neither of them. */
static void authorization_violation_is_reported(void) {
  static const char *const wrong[] = {"worker:" SECRET, "nobody:" SECRET, SECRET, "worker:correct%20" SECRET, SECRET ":"};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    char to[200];
    snprintf(to, sizeof to, "nats://%s@%s", wrong[i], url + strlen("nats://"));
    check_fails(to, PRESENCE_DISCONNECTED, "authorization violation");
  }
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(refusing_and_silent_servers_are_named);
  RUN(non_nats_server_is_named);
  RUN(authorization_violation_is_reported);
  RUN(secrets_in_urls_are_never_shown);
  RUN(line_breaks_in_urls_are_refused);
  return 0;
}
