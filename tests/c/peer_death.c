/* The process at the other end of a lane is killed, stopped, or stopped for a moment only. */
#include "content.h"

static void end_process(pid_t process) {
  CHECK_EQ(kill(process, SIGKILL), 0);
  CHECK_EQ(waitpid(process, NULL, 0), process);
}

/* The other process ------------------------------------------------------------------------------------------------- */

/* Serves gone.stream: endless content; gone.idle: one message; gone.stopped: the status of each sender that was
 * stopped, one byte each; gone.exit. It keeps these statuses until it exits. */
static void run_worker(void) {
  enum { MAX = 16 };
  struct {
    presence_sender *sender;
    uint64_t number;
    bool is_full;
  } all[MAX];
  char stopped[MAX];
  int count = 0, stops = 0;
  presence_sender *exits = NULL;
  peer self = open_peer_with(getenv("WORKER_OPTIONS"));
  presence_service *service = serve(self, "gone.*");
  while (!exits) {
    bool is_busy = false;
    for (int i = 0; i < count; i++) {
      unsigned char message[100];
      if (all[i].is_full) continue;
      fill_content(message, all[i].number % 100, 1, all[i].number);
      int32_t status = presence_sender_send(all[i].sender, message, all[i].number % 100);
      all[i].is_full = status != PRESENCE_OK;
      all[i].number += status == PRESENCE_OK;
      is_busy |= status == PRESENCE_OK;
    }
    presence_event event;
    if (presence_queue_wait(self.queue, &event, 1, is_busy ? 0 : -1) != 1) continue;
    if (event.kind == PRESENCE_EVENT_REQUEST) {
      if (is_text(event.subject, event.subject_len, "gone.exit")) {
        exits = event.sender;
      } else if (is_text(event.subject, event.subject_len, "gone.stopped")) {
        OK(presence_sender_send(event.sender, stopped, (size_t)stops));
        OK(presence_sender_end(event.sender));
        presence_sender_free(event.sender);
      } else {
        CHECK(count < MAX);
        all[count].sender = event.sender;
        all[count].number = 0;
        all[count].is_full = is_text(event.subject, event.subject_len, "gone.idle");
        if (all[count++].is_full) OK(send_text(event.sender, "idle"));
      }
    } else if (event.kind == PRESENCE_EVENT_WRITABLE) {
      for (int i = 0; i < count; i++) all[i].is_full &= all[i].sender != event.sender;
    } else {
      CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
      stopped[stops++] = (char)event.status;
      for (int i = 0; i < count; i++) all[i].is_full |= all[i].sender == event.sender;
    }
  }
  OK(presence_sender_end(exits));
  presence_sender_free(exits);
  for (int i = 0; i < count; i++) presence_sender_free(all[i].sender);
  presence_service_free(service);
  close_peer(self);
}

/* Starts the worker and waits until it serves. */
static pid_t start_worker(peer gateway) {
  pid_t worker = start("run_worker");
  presence_stream *stream = request_with(gateway, "gone.idle", "", 99, "retries=100000");
  expect_data(gateway.queue, "idle");
  presence_stream_free(stream);
  return worker;
}

static void stop_worker(peer gateway, pid_t worker) {
  presence_stream *stream = request(gateway, "gone.exit", "", 99);
  CHECK_EQ(expect(gateway.queue, PRESENCE_EVENT_END).tag, 99);
  presence_stream_free(stream);
  expect_exit(worker, 0);
}

/* Requests two streams, and reads until both have ended with PEER_GONE. */
static void run_gateway(void) {
  peer self = open_peer();
  presence_stream *streams[] = {request(self, "ask", "c", 0), request(self, "ask", "d", 1)};
  for (int ended = 0; ended < 2;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(self.queue, &event, 1, -1), 1);
    if (event.kind == PRESENCE_EVENT_DATA) continue;
    CHECK_EQ(event.kind, PRESENCE_EVENT_ERROR);
    CHECK_STATUS(event.status, PRESENCE_PEER_GONE);
    CHECK(event.data_len > 0);
    ended++;
  }
  for (int i = 0; i < 2; i++) presence_stream_free(streams[i]);
  close_peer(self);
}

/* The worker is gone ------------------------------------------------------------------------------------------------ */

static void expect_gone(peer gateway, int count, uint64_t others) {
  for (int gone = 0; gone < count;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(gateway.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_DATA) continue;
    CHECK_EQ(event.kind, PRESENCE_EVENT_ERROR);
    CHECK_STATUS(event.status, PRESENCE_PEER_GONE);
    CHECK(event.data_len > 0);
    gone++;
  }
  expect_nothing(gateway.queue);
  CHECK_EQ(stats_of(gateway).streams, others);
}

/* Two busy streams and an idle one end, those of another worker go on, and new requests find a new worker. */
static void killed_worker_ends_its_streams(void) {
  static const char *const graces[] = {"peer_grace_ms=0", "peer_grace_ms=1000"};
  for (int i = 0; i < 2; i++) {
    peer gateway = open_peer_with(graces[i]), other = open_peer(), aside = second_queue(gateway);
    presence_service *service = serve(other, "other");
    presence_stream *others = request(aside, "other", "c", 7);
    presence_sender *sender = accept_request(other);
    pid_t worker = start_worker(gateway);
    presence_stream *streams[3];
    for (uint64_t k = 0; k < 3; k++) streams[k] = request(gateway, k ? "gone.stream" : "gone.idle", "c", k);
    bool has_begun[3] = {false, false, false};
    while (!has_begun[0] || !has_begun[1] || !has_begun[2]) has_begun[expect(gateway.queue, PRESENCE_EVENT_DATA).tag] = true;
    end_process(worker);
    int64_t since = now_ms();
    expect_gone(gateway, 3, 1);
    int64_t after = now_ms() - since;
    CHECK(after < 12000); /* at most a heartbeat and the grace */
    if (i == 1) CHECK(after >= 1000);

    OK(send_text(sender, "goes on"));
    expect_data(aside.queue, "goes on");
    for (int k = 0; k < 3; k++) presence_stream_free(streams[k]);
    worker = start_worker(gateway);
    stop_worker(gateway, worker);
    presence_sender_free(sender);
    presence_stream_free(others);
    presence_service_free(service);
    presence_queue_free(aside.queue);
    close_peer(gateway);
    close_peer(other);
  }
}

/* A stopped worker is gone after three heartbeats. When it is resumed it learns that, and serves new requests. */
static void stopped_worker_is_gone_after_three_heartbeats(void) {
  peer gateway = open_peer_with("heartbeat_ms=500");
  pid_t worker = start_worker(gateway);
  presence_stream *streams[] = {request(gateway, "gone.idle", "c", 0), request(gateway, "gone.stream", "c", 1)};
  bool has_begun[2] = {false, false};
  while (!has_begun[0] || !has_begun[1]) has_begun[expect(gateway.queue, PRESENCE_EVENT_DATA).tag] = true;
  suspend(worker);
  int64_t since = now_ms();
  expect_gone(gateway, 2, 0);
  int64_t after = now_ms() - since;
  CHECK(after >= 900 && after < 6000);
  resume(worker);

  /* Its senders were stopped: the one that start_worker freed, and these two. */
  presence_event event;
  char statuses[16] = {0};
  size_t count = 0;
  while (count < 3) {
    presence_stream *stream = request(gateway, "gone.stopped", "", 2);
    event = expect(gateway.queue, PRESENCE_EVENT_DATA);
    count = event.data_len;
    memcpy(statuses, event.data, count < sizeof statuses ? count : sizeof statuses);
    expect(gateway.queue, PRESENCE_EVENT_END);
    presence_stream_free(stream);
  }
  CHECK_EQ(count, 3);
  CHECK_STATUS((signed char)statuses[0], PRESENCE_CANCELLED);
  for (int i = 1; i < 3; i++) CHECK_STATUS((signed char)statuses[i], PRESENCE_PEER_GONE);
  stop_worker(gateway, worker);
  for (int i = 0; i < 2; i++) presence_stream_free(streams[i]);
  close_peer(gateway);
}

/* The worker is stopped again and again for less than three heartbeats, while it sends. */
static void short_stops_lose_nothing(void) {
  peer gateway = open_peer_with("heartbeat_ms=1000");
  CHECK_EQ(setenv("WORKER_OPTIONS", "heartbeat_ms=1000", 1), 0);
  pid_t worker = start_worker(gateway);
  CHECK_EQ(unsetenv("WORKER_OPTIONS"), 0);
  presence_stream *stream = request(gateway, "gone.stream", "c", 1);
  uint64_t number = 0;
  for (int round = 0; round < 5; round++) {
    suspend(worker);
    usleep(700000);
    resume(worker);
    for (int i = 0; i < 70000; i++, number++) { /* more than fits into the buffers: some were sent after the stop */
      presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
      CHECK_CONTENT(&event, number % 100, 1, number);
    }
  }
  presence_stream_free(stream);
  stop_worker(gateway, worker);
  close_peer(gateway);
}

/* A close does not wait for answers of a killed worker. */
static void close_after_the_worker_was_killed(void) {
  for (int round = 0; round < 3; round++) {
    peer gateway = open_peer_with(round == 2 ? "peer_grace_ms=1000" : "peer_grace_ms=0");
    pid_t worker = start_worker(gateway);
    presence_stream *stream = request(gateway, "gone.idle", "c", 1);
    expect_data(gateway.queue, "idle");
    suspend(worker);
    if (round == 0) OK(presence_stream_cancel(stream)); /* in other rounds the close cancels it */
    end_process(worker);
    int64_t since = now_ms();
    OK(presence_close(gateway.conn, TIMEOUT_MS));
    CHECK(now_ms() - since < 12000);
    int32_t how = expect(gateway.queue, PRESENCE_EVENT_ERROR).status;
    if (round == 1 && how == PRESENCE_PEER_GONE) how = PRESENCE_CLOSED; /* detected before the close */
    CHECK_STATUS(how, round == 0 ? PRESENCE_CANCELLED : PRESENCE_CLOSED);
    presence_stream_free(stream);
    presence_queue_free(gateway.queue);
  }
}

/* A close does not wait for a stopped worker longer than three heartbeats. */
static void close_while_the_worker_is_stopped(void) {
  for (int is_cancelled = 0; is_cancelled < 2; is_cancelled++) {
    peer gateway = open_peer_with("heartbeat_ms=300");
    pid_t worker = start_worker(gateway);
    presence_stream *stream = request(gateway, "gone.idle", "c", 1);
    expect_data(gateway.queue, "idle");
    suspend(worker);
    if (is_cancelled) OK(presence_stream_cancel(stream));
    int64_t since = now_ms();
    OK(presence_close(gateway.conn, TIMEOUT_MS));
    CHECK(now_ms() - since < 10000);
    end_process(worker);
    presence_stream_free(stream);
    presence_queue_free(gateway.queue);
  }
}

/* The gateway is gone ----------------------------------------------------------------------------------------------- */

/* Sends on the first sender until it is stopped; the second, which is idle, is stopped with it. */
static int64_t send_until_gone(peer worker, presence_sender **senders) {
  int64_t since = now_ms();
  int32_t status;
  while ((status = send_text(senders[0], "are you there?")) == PRESENCE_OK || status == PRESENCE_FULL) usleep(10000);
  CHECK_STATUS(status, PRESENCE_PEER_GONE);
  int64_t after = now_ms() - since;
  for (int stopped = 0; stopped < 2;) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(worker.queue, &event, 1, TIMEOUT_MS), 1);
    if (event.kind == PRESENCE_EVENT_WRITABLE) continue;
    CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
    CHECK_STATUS(event.status, PRESENCE_PEER_GONE);
    CHECK(event.sender == senders[0] || event.sender == senders[1]);
    CHECK(is_text(event.client, event.client_len, event.sender == senders[0] ? "c" : "d"));
    stopped++;
  }
  for (int i = 0; i < 2; i++) {
    CHECK_STATUS(send_text(senders[i], "late"), PRESENCE_PEER_GONE);
    CHECK_STATUS(presence_sender_end(senders[i]), PRESENCE_PEER_GONE);
    CHECK_EQ(status_word(senders[i]), (uint32_t)PRESENCE_PEER_GONE);
  }
  CHECK(!is_client_online("c") && !is_client_online("d"));
  expect_nothing(worker.queue);
  CHECK_EQ(stats_of(worker).senders, 0);
  return after;
}

static void killed_gateway_stops_its_senders(void) {
  static const char *const graces[] = {"peer_grace_ms=0", "peer_grace_ms=1000"};
  for (int i = 0; i < 2; i++) {
    peer worker = open_peer_with(graces[i]);
    presence_service *service = serve(worker, "ask");
    pid_t gateway = start("run_gateway");
    presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
    OK(send_text(senders[0], "begins"));
    end_process(gateway);
    int64_t after = send_until_gone(worker, senders);
    if (i == 0) CHECK(after < 4000); /* before the first heartbeat */
    if (i == 1) CHECK(after >= 900 && after < 10000);
    for (int k = 0; k < 2; k++) presence_sender_free(senders[k]);
    presence_service_free(service);
    close_peer(worker);
  }
}

/* A send that is blocked on a killed reader ends. */
static void killed_gateway_ends_a_blocked_send(void) {
  static char data[100000];
  peer worker = open_peer_with("peer_grace_ms=0");
  presence_service *service = serve(worker, "ask");
  pid_t gateway = start("run_gateway");
  presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
  suspend(gateway);
  int32_t status;
  while ((status = presence_sender_send_wait(senders[0], data, sizeof data, 200)) == PRESENCE_OK) continue;
  CHECK_STATUS(status, PRESENCE_TIMEOUT);
  end_process(gateway);
  CHECK_STATUS(presence_sender_send_wait(senders[0], data, sizeof data, -1), PRESENCE_PEER_GONE);
  for (int k = 0; k < 2; k++) presence_sender_free(senders[k]);
  presence_service_free(service);
  close_peer(worker);
}

static void stopped_gateway_is_gone_after_three_heartbeats(void) {
  peer worker = open_peer_with("heartbeat_ms=500");
  presence_service *service = serve(worker, "ask");
  pid_t gateway = start("run_gateway");
  presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
  run_whole_stream(worker, second_queue(worker), "ask"); /* over another lane: the first message of this one has been sent by then */
  OK(send_text(senders[1], "begins"));
  suspend(gateway);
  int64_t after = send_until_gone(worker, senders);
  CHECK(after >= 900 && after < 6000);
  resume(gateway);
  expect_exit(gateway, 0); /* its streams ended with PRESENCE_PEER_GONE */
  for (int k = 0; k < 2; k++) presence_sender_free(senders[k]);
  presence_service_free(service);
  close_peer(worker);
}

/* A worker that sends nothing detects it, too. */
static void idle_worker_detects_a_killed_gateway(void) {
  peer worker = open_peer_with("heartbeat_ms=200");
  presence_service *service = serve(worker, "ask");
  pid_t gateway = start("run_gateway");
  presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
  end_process(gateway);
  for (int i = 0; i < 2; i++) expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_PEER_GONE);
  for (int k = 0; k < 2; k++) presence_sender_free(senders[k]);
  presence_service_free(service);
  close_peer(worker);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(run_worker);
  if (is_selected("run_worker")) return 0;
  ROLE(run_gateway);
  RUN(killed_worker_ends_its_streams);
  RUN(stopped_worker_is_gone_after_three_heartbeats);
  RUN(short_stops_lose_nothing);
  RUN(close_after_the_worker_was_killed);
  RUN(close_while_the_worker_is_stopped);
  RUN(killed_gateway_stops_its_senders);
  RUN(killed_gateway_ends_a_blocked_send);
  RUN(stopped_gateway_is_gone_after_three_heartbeats);
  RUN(idle_worker_detects_a_killed_gateway);
  return 0;
}
