/* A TCP proxy in front of nats-server, to cut the connections of one process, or to lose its traffic. */
#ifndef PROXY_H
#define PROXY_H

#include "server.h"

typedef struct proxy {
  int port, server_port, listener;
  char url[40];
  pthread_mutex_t lock;
  int ends[64]; /* two for each connection */
  int count;
  bool swallows; /* all traffic is lost */
  struct proxy *next;
} proxy;

typedef struct proxy_pipe {
  proxy *self;
  int from, to;
} proxy_pipe;

static inline bool proxy_swallows(proxy *self) {
  pthread_mutex_lock(&self->lock);
  bool swallows = self->swallows;
  pthread_mutex_unlock(&self->lock);
  return swallows;
}

static inline void *proxy_forward(void *argument) {
  proxy_pipe pipe = *(proxy_pipe *)argument;
  free(argument);
  char data[1 << 16];
  ssize_t count;
  while ((count = read(pipe.from, data, sizeof data)) > 0) {
    if (proxy_swallows(pipe.self)) continue;
    for (ssize_t done = 0, sent; done < count; done += sent) {
      if ((sent = send(pipe.to, data + done, (size_t)(count - done), MSG_NOSIGNAL)) < 0) {
        done = count;
        sent = 0;
        shutdown(pipe.from, SHUT_RDWR);
      }
    }
  }
  shutdown(pipe.to, SHUT_RDWR);
  return NULL;
}

static inline void proxy_begin(proxy *self, int from, int to) {
  proxy_pipe one = {self, from, to}, *pipe = (proxy_pipe *)malloc(sizeof one);
  CHECK(pipe);
  *pipe = one;
  CHECK_EQ(pthread_detach(start_thread(proxy_forward, pipe)), 0);
}

static inline void *proxy_accept(void *argument) {
  proxy *self = (proxy *)argument;
  for (int client; (client = accept(self->listener, NULL, NULL)) >= 0;) {
    struct sockaddr_in address = local(self->server_port);
    int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(server, (struct sockaddr *)&address, sizeof address) != 0) {
      close(server);
      close(client);
      continue;
    }
    pthread_mutex_lock(&self->lock);
    CHECK(self->count + 2 <= 64);
    self->ends[self->count++] = client;
    self->ends[self->count++] = server;
    pthread_mutex_unlock(&self->lock);
    proxy_begin(self, client, server);
    proxy_begin(self, server, client);
  }
  return NULL;
}

/* Never freed: its threads may use it until the process ends. The list shows to tools that it is not lost. */
static proxy *proxies;

static inline proxy *new_proxy(int server_port) {
  proxy *self = (proxy *)calloc(1, sizeof *self);
  CHECK(self);
  self->next = proxies;
  proxies = self;
  self->server_port = server_port;
  self->listener = own_socket(&self->port);
  snprintf(self->url, sizeof self->url, "nats://127.0.0.1:%d", self->port);
  CHECK_EQ(pthread_mutex_init(&self->lock, NULL), 0);
  CHECK_EQ(listen(self->listener, 8), 0);
  CHECK_EQ(pthread_detach(start_thread(proxy_accept, self)), 0);
  return self;
}

/* Cuts all connections; new ones are accepted at once. */
static inline void proxy_cut(proxy *self) {
  pthread_mutex_lock(&self->lock);
  for (int i = 0; i < self->count; i++) shutdown(self->ends[i], SHUT_RDWR); /* not closed: no number is reused */
  self->count = 0;
  pthread_mutex_unlock(&self->lock);
}

static inline void proxy_swallow(proxy *self, bool swallows) {
  pthread_mutex_lock(&self->lock);
  self->swallows = swallows;
  pthread_mutex_unlock(&self->lock);
}

#endif
