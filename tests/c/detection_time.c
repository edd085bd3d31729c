/* How soon a killed or stopped process is detected at the other end of a lane. */
#include "peer.h"

/* The process that is killed: a worker that sends all the time, or a gateway that reads all the time. */
static void serve_until_killed(void) {
  peer self = open_peer();
  presence_service *service = serve(self, "found");
  presence_sender *sender = accept_request(self);
  while (send_text(sender, "here") == PRESENCE_OK) usleep(1000);
  presence_sender_free(sender); /* it was stopped, and learns that its peer result it up */
  presence_service_free(service);
  close_peer(self);
}

static void request_until_killed(void) {
  peer self = open_peer();
  presence_stream *stream = request(self, "found", "c", 1);
  presence_event event;
  do CHECK_EQ(presence_queue_wait(self.queue, &event, 1, -1), 1);
  while (event.kind == PRESENCE_EVENT_DATA);
  presence_stream_free(stream);
  close_peer(self);
}

/* Starts a stream with another process, which `end` ends; returns the time until it is detected, in µs. */
static int64_t detect(const char *role, const char *options, void (*end)(pid_t)) {
  bool is_worker = strcmp(role, "serve_until_killed") == 0;
  peer self = open_peer_with(options);
  presence_service *service = is_worker ? NULL : serve(self, "found");
  pid_t other = start(role);
  presence_stream *stream = is_worker ? request_with(self, "found", "c", 1, "retries=100000") : NULL;
  presence_sender *sender = is_worker ? NULL : accept_request(self);
  presence_event event;
  if (is_worker) {
    /* Before three short heartbeats count, the round trip is measured: with what the gateway sends first, within 25 ms. */
    for (int i = 0; i < (end == suspend ? 200 : 3); i++) expect_data(self.queue, "here");
  } else {
    peer aside = second_queue(self);
    run_whole_stream(self, aside, "found"); /* over another lane; the first message of this one has been sent by then */
    presence_queue_free(aside.queue);
    OK(send_text(sender, "here"));
  }
  usleep((useconds_t)(now_us() % 30000)); /* end it at any moment of the heartbeat */
  end(other);
  int64_t since = now_us();
  do {
    if (sender) (void)send_text(sender, "there?");
    if (presence_queue_wait(self.queue, &event, 1, sender ? 1 : TIMEOUT_MS) != 1) event.kind = PRESENCE_EVENT_DATA;
    CHECK(now_us() - since < 60 * 1000000);
  } while (event.kind == PRESENCE_EVENT_DATA || event.kind == PRESENCE_EVENT_WRITABLE);
  int64_t after = now_us() - since;
  CHECK_EQ(event.kind, is_worker ? PRESENCE_EVENT_ERROR : PRESENCE_EVENT_STOPPED);
  CHECK_STATUS(event.status, PRESENCE_PEER_GONE);
  CHECK_EQ(kill(other, SIGKILL), 0);
  CHECK_EQ(waitpid(other, NULL, 0), other);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(self);
  return after;
}

static void end_by_kill(pid_t process) { CHECK_EQ(kill(process, SIGKILL), 0); }

static int by_size(const void *one, const void *other) {
  int64_t difference = *(const int64_t *)one - *(const int64_t *)other;
  return (difference > 0) - (difference < 0);
}

enum { MOST = 500 };
static int64_t times[MOST];

static void measure(const char *role, const char *options, void (*end)(pid_t), int count) {
  for (int i = 0; i < count; i++) times[i] = detect(role, options, end);
  qsort(times, (size_t)count, sizeof *times, by_size);
}

/* nats-server answers anything sent to a dead peer at once: the worker's next message, or the gateway's
 * acknowledgement. If that was sent before nats-server noticed the death, the next heartbeat finds it. */
static void killed(const char *role, const char *name) {
  int count = is_long ? MOST : 5, slow = 0;
  measure(role, "peer_grace_ms=0", end_by_kill, count);
  CHECK(times[count - 1] < 15000000);
  for (int i = 0; i < count; i++) slow += times[i] > 50000;
  if (!is_long) return;
  CHECK(times[count * 99 / 100] < 500000); /* ten times the goal: no heartbeat was needed */
  FIGURE("%s is killed, peer_grace_ms=0, %d times: detected after p50 %.1f ms, p99 %.1f ms, at most %.1f ms; %d took more than 50",
         name, count, (double)times[count / 2] / 1e3, (double)times[count * 99 / 100] / 1e3,
         (double)times[count - 1] / 1e3, slow);
}

static void killed_gateway_is_detected(void) { killed("request_until_killed", "a gateway"); }
static void killed_worker_is_detected(void) { killed("serve_until_killed", "a worker"); }

/* Detected three heartbeats after the last sign of life. */
static void stopped(const char *role, const char *name) {
  static const int heartbeats[] = {200, 5000};
  for (int i = 0; i < (is_long ? 2 : 1); i++) {
    int count = is_long && i == 0 ? 20 : 1;
    int64_t three = 3000 * heartbeats[i];
    char option[40];
    snprintf(option, sizeof option, "heartbeat_ms=%d", heartbeats[i]);
    measure(role, option, suspend, count);
    CHECK(times[0] > three - three / 3 - 100000); /* a message may have been in flight when it was stopped */
    CHECK(times[count - 1] < three + 10000000);
    if (!is_long) continue;
    CHECK(times[count - 1] < three + 1000000); /* it did not wait for a fourth heartbeat */
    FIGURE("%s is stopped, heartbeat_ms=%d, %d times: detected at most %.1f ms after three heartbeats (p50 %.1f)", name, heartbeats[i],
           count, (double)(times[count - 1] - three) / 1e3, (double)(times[count / 2] - three) / 1e3);
  }
}

static void stopped_gateway_is_detected(void) { stopped("request_until_killed", "a gateway"); }
static void stopped_worker_is_detected(void) { stopped("serve_until_killed", "a worker"); }

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(serve_until_killed);
  ROLE(request_until_killed);
  RUN(killed_gateway_is_detected);
  RUN(killed_worker_is_detected);
  RUN(stopped_gateway_is_detected);
  RUN(stopped_worker_is_detected);
  return 0;
}
