/* The test's own nats-server, which keeps its port when it is killed and restarted. */
#ifndef SERVER_H
#define SERVER_H

#include "peer.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

typedef struct own_server {
  pid_t process;
  int port;
  const char *config; /* a file; NULL: none */
  char url[40];
} own_server;

static inline struct sockaddr_in local(int port) {
  struct sockaddr_in address;
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_port = htons((uint16_t)port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

/* Opens a socket on a free local port, and returns both. */
static inline int own_socket(int *port) {
  struct sockaddr_in address = local(0);
  socklen_t length = sizeof address;
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK(fd >= 0);
  CHECK_EQ(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
  CHECK_EQ(getsockname(fd, (struct sockaddr *)&address, &length), 0);
  *port = ntohs(address.sin_port);
  return fd;
}

/* Starts the server (again) without waiting until it listens: PRESENCE_EVENT_CONNECTED reports that. */
static inline void start_server(own_server *server) {
  const char *binary = getenv("NATS_SERVER_BIN");
  CHECK(binary);
  char port[12];
  snprintf(port, sizeof port, "%d", server->port);
  server->process = fork();
  CHECK(server->process >= 0);
  if (server->process == 0) {
    if (!freopen("/dev/null", "w", stderr)) _exit(126);
    execl(binary, "nats-server", "-a", "127.0.0.1", "-p", port, server->config ? "-c" : (char *)NULL, server->config,
          (char *)NULL);
    _exit(127);
  }
}

static inline void kill_server(own_server *server) {
  CHECK_EQ(kill(server->process, SIGKILL), 0);
  CHECK_EQ(waitpid(server->process, NULL, 0), server->process);
}

static inline own_server new_server(void) {
  own_server server;
  memset(&server, 0, sizeof server);
  close(own_socket(&server.port));
  snprintf(server.url, sizeof server.url, "nats://127.0.0.1:%d", server.port);
  start_server(&server);
  return server;
}

/* Connects to `to` as soon as it is there, and returns then. The queue receives the connection's events. */
static inline peer open_peer_at(const char *to, const char *options) {
  peer self;
  presence_config *config = presence_config_new();
  OK(presence_config_set(config, "lanes", on_lanes() ? "true" : "false"));
  OK(presence_config_set(config, "retry_on_initial_connect", "true"));
  set_options(config, options);
  OK(presence_queue_new(&self.queue));
  OK(presence_connect(to, config, &self.conn, NULL));
  presence_config_free(config);
  while (stats_of(self).connected == 0) usleep(1000);
  OK(presence_conn_watch(self.conn, self.queue, 0));
  return self;
}

#endif
