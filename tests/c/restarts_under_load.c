/* nats-server is killed and restarted, and connections are cut, under two hundred streams between two processes:
 * every stream goes on, complete, in order, once.
 *
 * The next fault comes as soon as each stream has delivered a message that was sent after the previous one. */
#include "content.h"
#include "proxy.h"

enum { STREAMS = 200, BLOWS = 20, MAX_LENGTH = 400 };

static size_t length_of(uint64_t stream, uint64_t number) {
  return CONTENT_HEAD + sizeof(uint64_t) + scramble(stream ^ number << 20) % MAX_LENGTH;
}

/* FNV-1a over all messages of a stream. */
#define NO_HASH 0xcbf29ce484222325ULL

static uint64_t hash_on(uint64_t hash, const void *data, size_t length) {
  for (size_t i = 0; i < length; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3ULL;
  return hash;
}

/* The worker, a process of its own ---------------------------------------------------------------------------------- */

struct served {
  presence_sender *sender;
  uint64_t stream, number, hash;
  bool is_full;
};

/* Message i: the numbers of the stream and the message, how often the worker has connected, and bytes derived from
 * them. */
static void send_some(struct served *self, uint64_t connects) {
  unsigned char message[CONTENT_HEAD + sizeof connects + MAX_LENGTH];
  for (int i = 0; i < 20 && !self->is_full; i++) {
    size_t length = length_of(self->stream, self->number);
    fill_content(message, length, self->stream, self->number);
    memcpy(message + CONTENT_HEAD, &connects, sizeof connects);
    int32_t status = presence_sender_send(self->sender, message, length);
    self->is_full = status == PRESENCE_FULL;
    if (self->is_full) return;
    OK(status);
    self->hash = hash_on(self->hash, message, length);
    self->number++;
  }
}

/* The last message has the number of messages before it, and their hash. */
static void finish(struct served *self) {
  uint64_t last[2] = {self->number, self->hash};
  OK(presence_sender_send_wait(self->sender, last, sizeof last, TIMEOUT_MS));
  OK(presence_sender_end(self->sender));
  presence_sender_free(self->sender);
}

static void run_worker(void) {
  static struct served all[STREAMS];
  presence_event events[64];
  int count = 0;
  uint64_t connects = 1;
  presence_sender *stop = NULL;
  peer self = open_peer_at(url, NULL);
  presence_service *service = serve(self, "work.*");
  while (!stop) {
    bool is_busy = false;
    for (int i = 0; i < count; i++) {
      send_some(&all[i], connects);
      is_busy |= !all[i].is_full;
    }
    int64_t taken = presence_queue_wait(self.queue, events, 64, is_busy ? 1 : TIMEOUT_MS);
    CHECK(taken > 0 || is_busy);
    for (int64_t i = 0; i < taken; i++) {
      presence_event *event = &events[i];
      if (event->kind == PRESENCE_EVENT_REQUEST && is_text(event->subject, event->subject_len, "work.stop")) {
        stop = event->sender;
      } else if (event->kind == PRESENCE_EVENT_REQUEST) {
        CHECK(count < STREAMS);
        struct served begun = {event->sender, 0, 0, NO_HASH, false};
        CHECK_EQ(event->data_len, sizeof begun.stream);
        memcpy(&begun.stream, event->data, sizeof begun.stream);
        all[count++] = begun;
      } else if (event->kind == PRESENCE_EVENT_WRITABLE) {
        for (int k = 0; k < count; k++) all[k].is_full &= all[k].sender != event->sender;
      } else if (event->kind == PRESENCE_EVENT_CONNECTED) {
        connects = stats_of(self).connects;
      } else {
        CHECK(event->kind == PRESENCE_EVENT_DISCONNECTED || event->kind == PRESENCE_EVENT_LOG); /* no stream is stopped */
      }
    }
  }
  CHECK_EQ(count, STREAMS);
  for (int i = 0; i < count; i++) finish(&all[i]);
  OK(presence_sender_end(stop));
  presence_sender_free(stop);
  CHECK_EQ(stats_of(self).senders, 0);
  OK(presence_close(self.conn, TIMEOUT_MS));
  presence_service_free(service);
  presence_queue_free(self.queue);
}

/* The gateway ------------------------------------------------------------------------------------------------------- */

struct read {
  presence_stream *stream;
  uint64_t number, hash, worker_connects;
  bool has_last;
};

static struct read reads[STREAMS];
static int ended;

static void take_data(const presence_event *event) {
  struct read *self = &reads[event->tag];
  CHECK(event->stream == self->stream && !self->has_last);
  if (event->data_len == 2 * sizeof(uint64_t)) {
    uint64_t last[2];
    memcpy(last, event->data, sizeof last);
    CHECK_EQ(last[0], self->number);
    CHECK(last[1] == self->hash);
    self->has_last = true;
    return;
  }
  unsigned char expected[CONTENT_HEAD + sizeof(uint64_t) + MAX_LENGTH];
  size_t length = length_of(event->tag, self->number);
  fill_content(expected, length, event->tag, self->number);
  CHECK_EQ(event->data_len, length);
  memcpy(&self->worker_connects, event->data + CONTENT_HEAD, sizeof self->worker_connects);
  memcpy(expected + CONTENT_HEAD, &self->worker_connects, sizeof self->worker_connects);
  CHECK(memcmp(expected, event->data, length) == 0);
  self->hash = hash_on(self->hash, event->data, length);
  self->number++;
}

static void take_events(peer gateway) {
  presence_event events[256];
  int64_t count = presence_queue_wait(gateway.queue, events, 256, TIMEOUT_MS);
  CHECK(count > 0); /* no stream stalls that long */
  for (int64_t i = 0; i < count; i++) {
    if (events[i].kind == PRESENCE_EVENT_DATA) {
      take_data(&events[i]);
    } else if (events[i].stream) {
      CHECK_STATUS(events[i].status, PRESENCE_OK);
      CHECK_EQ(events[i].kind, PRESENCE_EVENT_END);
      CHECK(events[i].tag == STREAMS || reads[events[i].tag].has_last);
      ended++;
    } else {
      CHECK(events[i].kind >= PRESENCE_EVENT_CONNECTED);
    }
  }
}

/* True if each stream has a message that the worker sent on its current connection, and the gateway has reconnected
 * as well. */
static bool all_have(peer gateway, uint64_t worker_connects, uint64_t own_connects) {
  if (stats_of(gateway).connects < own_connects) return false;
  for (int i = 0; i < STREAMS; i++) {
    if (reads[i].worker_connects < worker_connects) return false;
  }
  return true;
}

static own_server server;
static proxy *before_server;

/* Runs the streams; each fault breaks the connection of the worker, the gateway, or both. */
static void run_under(void (*strike)(peer), bool worker_loses, bool gateway_loses, const char *gateways_url,
                      const char *workers_url) {
  url = workers_url;
  pid_t worker = start("run_worker");
  peer gateway = open_peer_at(gateways_url, NULL);
  ended = 0;
  for (uint64_t i = 0; i < STREAMS; i++) {
    presence_config *config = presence_config_new();
    OK(presence_config_set(config, "retries", "100000")); /* until the worker serves */
    OK(presence_config_set(config, "retry_delay_ms", "10"));
    OK(presence_config_set(config, "stream_buffer_bytes", i % 2 ? "4000" : "40000"));
    struct read begun = {NULL, 0, NO_HASH, 0, false};
    reads[i] = begun;
    OK(start_request(gateway.conn, gateway.queue, "work.stream", &i, sizeof i, i % 3 ? "c" : "", i % 3 ? 1 : 0, config, i,
                        &reads[i].stream, NULL));
    presence_config_free(config);
  }
  for (uint64_t i = 0; i <= BLOWS; i++) {
    uint64_t worker_connects = worker_loses ? i + 1 : 1, own_connects = gateway_loses ? i + 1 : 1;
    /* Events in the queue may have been sent before the last fault: so wait for one more of each stream. */
    while (!all_have(gateway, worker_connects, own_connects)) take_events(gateway);
    for (int k = 0; k < STREAMS; k++) reads[k].worker_connects = 0;
    while (!all_have(gateway, worker_connects, own_connects)) take_events(gateway);
    CHECK_EQ(ended, 0);
    for (int k = 0; k < STREAMS; k++) reads[k].worker_connects = 0;
    if (i < BLOWS) strike(gateway);
  }
  CHECK_EQ(stats_of(gateway).lanes, 1); /* it survived all faults */
  presence_stream *stop = request(gateway, "work.stop", "", STREAMS);
  while (ended <= STREAMS) take_events(gateway);
  CHECK_EQ(stats_of(gateway).streams, 0);
  for (int i = 0; i < STREAMS; i++) presence_stream_free(reads[i].stream);
  presence_stream_free(stop);
  expect_exit(worker, 0);
  close_peer(gateway);
}

static void restart_server(peer gateway) {
  (void)gateway;
  kill_server(&server);
  start_server(&server);
}

/* Restarts the server again as soon as the gateway has reconnected, whether or not the worker has. */
static void restart_server_twice(peer gateway) {
  uint64_t connects = stats_of(gateway).connects;
  restart_server(gateway);
  while (stats_of(gateway).connects == connects) usleep(100);
  restart_server(gateway);
}

static void cut(peer gateway) {
  (void)gateway;
  proxy_cut(before_server);
}

static void server_is_killed(void) { run_under(restart_server, true, true, server.url, server.url); }
static void server_is_killed_twice(void) {
  run_under(restart_server_twice, true, true, server.url, server.url);
}
static void gateway_connection_is_cut(void) { run_under(cut, false, true, before_server->url, server.url); }
static void worker_connection_is_cut(void) { run_under(cut, true, false, server.url, before_server->url); }

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(run_worker);
  if (is_selected("run_worker")) return 0;
  server = new_server();
  before_server = new_proxy(server.port);
  RUN(server_is_killed);
  RUN(server_is_killed_twice);
  RUN(gateway_connection_is_cut);
  RUN(worker_connection_is_cut);
  kill_server(&server);
  return 0;
}
