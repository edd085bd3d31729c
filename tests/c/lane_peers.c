/* Pairings over lanes: with level 0, with itself, in both directions, with two workers, with ten thousand streams. */
#include "content.h"
#include "server.h"

static peer open_on_level_0(void) { return open_peer_with("lanes=false"); }

/* Reads a stream of `count` messages to its end. */
static void read_content(peer gateway, uint64_t stream, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
    CHECK_CONTENT(&event, i % 300, stream, i);
  }
  expect(gateway.queue, PRESENCE_EVENT_END);
}

typedef struct task {
  presence_sender *sender;
  uint64_t stream, count;
} task;

static void *send_content(void *argument) {
  task self = *(task *)argument;
  unsigned char message[300];
  for (uint64_t i = 0; i < self.count; i++) {
    fill_content(message, i % 300, self.stream, i);
    OK(presence_sender_send_wait(self.sender, message, i % 300, TIMEOUT_MS));
  }
  OK(presence_sender_end(self.sender));
  presence_sender_free(self.sender);
  return NULL;
}

/* If one end has no lanes, everything is as on level 0. */
static void peer_without_lanes_uses_level_0(void) {
  for (int gateways = 0; gateways < 2; gateways++) {
    peer worker = gateways ? open_peer() : open_on_level_0(), gateway = gateways ? open_on_level_0() : open_peer();
    presence_service *service = serve(worker, "mixed");
    presence_stream *stream = request(gateway, "mixed", "c", 1);
    task task = {accept_request(worker), 1, 1000};
    CHECK_STATUS(send_text(task.sender, "__STREAM_END__"), PRESENCE_RESERVED);
    pthread_t thread = start_thread(send_content, &task);
    read_content(gateway, 1, 1000);
    join_thread(thread);
    presence_stream_free(stream);

    stream = request(gateway, "mixed", "c", 2);
    presence_sender *sender = accept_request(worker);
    OK(send_text(sender, "first"));
    expect_data(gateway.queue, "first");
    OK(presence_stream_cancel(stream));
    expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED);
    expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE);
    CHECK_EQ(stats_of(worker).lanes + stats_of(gateway).lanes, 0);
    presence_sender_free(sender);
    presence_stream_free(stream);
    presence_service_free(service);
    close_peer(gateway);
    close_peer(worker);
  }
}

/* Manual credit on level 0 blocks no sender: it limits the unread bytes, and a stream that exceeds them ends. */
static void manual_credit_on_level_0_limits_unread_bytes(void) {
  for (int is_consumed = 0; is_consumed < 2; is_consumed++) {
    peer worker = open_on_level_0(), gateway = open_peer();
    presence_service *service = serve(worker, "manual");
    presence_stream *stream;
    presence_config *config = presence_config_new();
    OK(presence_config_set(config, "manual_credit", "true"));
    OK(presence_config_set(config, "stream_buffer_bytes", "1000"));
    OK(start_request(gateway.conn, gateway.queue, "manual", NULL, 0, "c", 1, config, 1, &stream, NULL));
    presence_config_free(config);
    presence_sender *sender = accept_request(worker);
    static const char data[100] = {0};
    int taken = 0;
    presence_event event;
    memset(&event, 0, sizeof event);
    for (; taken < 100; taken++) {
      int32_t status = presence_sender_send(sender, data, sizeof data);
      CHECK(status == PRESENCE_OK || status == PRESENCE_OFFLINE);
      CHECK_EQ(presence_queue_wait(gateway.queue, &event, 1, TIMEOUT_MS), 1);
      if (event.kind != PRESENCE_EVENT_DATA) break;
      if (is_consumed) OK(presence_stream_consumed(stream, sizeof data));
    }
    if (is_consumed) {
      CHECK_EQ(taken, 100);
      OK(presence_stream_consumed(stream, SIZE_MAX)); /* too much counts as everything */
      OK(presence_sender_send(sender, data, sizeof data));
      expect(gateway.queue, PRESENCE_EVENT_DATA);
      OK(presence_sender_end(sender));
      expect(gateway.queue, PRESENCE_EVENT_END);
    } else {
      CHECK_EQ(taken, 1000 / (100 + 64));
      while (event.kind == PRESENCE_EVENT_LOG) CHECK_EQ(presence_queue_wait(gateway.queue, &event, 1, TIMEOUT_MS), 1);
      CHECK_EQ(event.kind, PRESENCE_EVENT_ERROR);
      CHECK_STATUS(event.status, PRESENCE_FULL);
    }
    CHECK_STATUS(presence_stream_consumed(stream, 1), PRESENCE_CLOSED);
    presence_sender_free(sender);
    presence_stream_free(stream);
    presence_service_free(service);
    close_peer(gateway);
    close_peer(worker);
  }
}

/* A server with a small max_payload: a message may have that less the lane's overhead. */
static void small_max_payload(void) {
  enum { MAX_PAYLOAD = 1000, LARGEST = MAX_PAYLOAD - 64 };
  char file[] = "/tmp/presence-XXXXXX";
  int fd = mkstemp(file);
  CHECK(fd >= 0);
  CHECK_EQ(write(fd, "max_payload: 1000\n", 18), 18);
  close(fd);
  own_server server = new_server();
  kill_server(&server);
  server.config = file;
  start_server(&server);
  peer worker = open_peer_at(server.url, NULL), gateway = open_peer_at(server.url, NULL);
  unlink(file);
  presence_service *service = serve(worker, "small");
  presence_stream *stream = request(gateway, "small", "c", 1);
  presence_sender *sender = accept_request(worker);
  unsigned char message[LARGEST + 1];
  CHECK_STATUS(presence_sender_send(sender, message, LARGEST + 1), PRESENCE_TOO_LARGE);
  /* Small messages in between, which are batched. */
  for (uint64_t i = 0; i < 2000; i++) {
    size_t length = i % 50 == 0 ? LARGEST - i / 50 : i % 40;
    fill_content(message, length, 1, i);
    OK(presence_sender_send_wait(sender, message, length, TIMEOUT_MS));
  }
  char text[2000];
  memset(text, 'x', sizeof text);
  OK(presence_sender_error(sender, text, sizeof text));
  for (uint64_t i = 0; i < 2000; i++) {
    presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
    CHECK_CONTENT(&event, i % 50 == 0 ? LARGEST - i / 50 : i % 40, 1, i);
  }
  presence_event last = expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  CHECK_EQ(last.data_len, LARGEST);
  CHECK_EQ(stats_of(worker).connects, 1);
  CHECK_EQ(stats_of(gateway).connects, 1);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
  kill_server(&server);
}

/* Ten gateways, half of them with another inbox prefix, and three workers, each with its own connection. */
static void many_connections_share_a_service(void) {
  enum { GATEWAYS = 10, WORKERS = 3, ROUNDS = 60 };
  peer gateways[GATEWAYS], workers[WORKERS];
  presence_service *services[WORKERS];
  for (int i = 0; i < WORKERS; i++) {
    workers[i] = i ? open_peer() : open_peer_with("inbox_prefix=replies.of.worker");
    workers[i].queue = i ? (presence_queue_free(workers[i].queue), workers[0].queue) : workers[0].queue;
    OK(presence_serve(workers[i].conn, workers[0].queue, "grouped", "g", 0, 0, &services[i], NULL));
  }
  for (int i = 0; i < GATEWAYS; i++) gateways[i] = i % 2 ? open_peer() : open_peer_with("inbox_prefix=replies.of.gateway");
  for (int round = 0; round < ROUNDS; round++) {
    peer gateway = gateways[round % GATEWAYS];
    presence_stream *stream = request(gateway, "grouped", "c", 1);
    presence_sender *sender = accept_request(workers[0]);
    OK(send_text(sender, "__STREAM_END__")); /* allowed on a lane */
    OK(presence_sender_end(sender));
    expect_data(gateway.queue, "__STREAM_END__");
    expect(gateway.queue, PRESENCE_EVENT_END);
    presence_sender_free(sender);
    presence_stream_free(stream);
  }
  uint64_t at_gateways = 0, at_workers = 0;
  for (int i = 0; i < GATEWAYS; i++) at_gateways += stats_of(gateways[i]).lanes;
  for (int i = 0; i < WORKERS; i++) at_workers += stats_of(workers[i]).lanes;
  CHECK_EQ(at_gateways, at_workers);
  CHECK(at_workers >= GATEWAYS && at_workers <= GATEWAYS * WORKERS);
  for (int i = 0; i < GATEWAYS; i++) close_peer(gateways[i]);
  for (int i = 0; i < WORKERS; i++) {
    presence_service_free(services[i]);
    OK(presence_close(workers[i].conn, TIMEOUT_MS));
  }
  presence_queue_free(workers[0].queue);
}

/* Two workers serve without a group, and both accept: the first has the stream, the other is stopped. The client
 * stays online. */
static void second_accept_is_cancelled(void) {
  for (int same = 0; same < 2; same++) {
    peer first = open_peer(), second = same ? second_queue(first) : open_peer(), gateway = open_peer();
    presence_service *services[] = {serve(first, "both"), serve(second, "both")};
    for (int round = 0; round < 50; round++) {
      presence_stream *stream = request(gateway, "both", "c", 1);
      presence_sender *senders[] = {accept_request(first), accept_request(second)};
      presence_event event;
      /* Find out which one was stopped. */
      int64_t count = 0;
      int stopped = -1;
      while (stopped < 0) {
        if ((count = presence_queue_wait(first.queue, &event, 1, 1)) == 1) stopped = 0;
        else if ((count = presence_queue_wait(second.queue, &event, 1, 1)) == 1) stopped = 1;
      }
      CHECK_EQ(event.kind, PRESENCE_EVENT_STOPPED);
      CHECK_STATUS(event.status, PRESENCE_CANCELLED);
      CHECK(event.sender == senders[stopped]);
      CHECK_STATUS(send_text(senders[stopped], "too late"), PRESENCE_CANCELLED);
      CHECK(is_client_online("c"));
      OK(send_text(senders[1 - stopped], "the only one"));
      OK(presence_sender_end(senders[1 - stopped]));
      expect_data(gateway.queue, "the only one");
      expect(gateway.queue, PRESENCE_EVENT_END);
      for (int i = 0; i < 2; i++) presence_sender_free(senders[i]);
      presence_stream_free(stream);
    }
    expect_nothing(gateway.queue);
    for (int i = 0; i < 2; i++) presence_service_free(services[i]);
    close_peer(gateway);
    if (same) presence_queue_free(second.queue);
    else close_peer(second);
    close_peer(first);
  }
}

/* Both ends serve, and each requests from the other, at the same time. */
static void streams_in_both_directions(void) {
  enum { COUNT = 20000 };
  peer a = open_peer(), b = open_peer(), from_a = second_queue(a), from_b = second_queue(b);
  presence_service *services[] = {serve(a, "a"), serve(b, "b")};
  presence_stream *streams[] = {request(from_a, "b", "c", 1), request(from_b, "a", "c", 2)};
  task tasks[] = {{accept_request(b), 1, COUNT}, {accept_request(a), 2, COUNT}};
  pthread_t threads[] = {start_thread(send_content, &tasks[0]), start_thread(send_content, &tasks[1])};
  read_content(from_a, 1, COUNT);
  read_content(from_b, 2, COUNT);
  for (int i = 0; i < 2; i++) {
    join_thread(threads[i]);
    presence_stream_free(streams[i]);
    presence_service_free(services[i]);
  }
  CHECK_EQ(stats_of(a).lanes, 2);
  CHECK_EQ(stats_of(b).lanes, 2);
  presence_queue_free(from_a.queue);
  presence_queue_free(from_b.queue);
  close_peer(a);
  close_peer(b);
}

/* Serves `own` and requests `their`, for the tests below. */
static void exchange(peer self, const char *own, const char *their, uint64_t stream) {
  peer aside = second_queue(self);
  presence_service *service = serve(self, own);
  presence_stream *requested = request_with(aside, their, "c", 1, "retries=100000");
  task task = {accept_request(self), stream, 20000};
  pthread_t thread = start_thread(send_content, &task);
  read_content(aside, 3 - stream, 20000);
  join_thread(thread);
  presence_stream_free(requested);
  presence_service_free(service);
  presence_queue_free(aside.queue);
  close_peer(self);
}

static void exchange_from_another_process(void) { exchange(open_peer(), "theirs", "ours", 1); }

static void streams_in_both_directions_between_processes(void) {
  pid_t other = start("exchange_from_another_process");
  exchange(open_peer(), "ours", "theirs", 2);
  expect_exit(other, 0);
}

/* Requests to its own service, on the same connection, with every way to end. */
static void connection_requests_of_itself(void) {
  peer self = open_peer(), aside = second_queue(self);
  presence_service *service = serve(self, "self");
  presence_stream *stream = request(aside, "self", "c", 1);
  task task = {accept_request(self), 1, 20000};
  pthread_t thread = start_thread(send_content, &task);
  read_content(aside, 1, 20000);
  join_thread(thread);
  presence_stream_free(stream);
  CHECK_EQ(stats_of(self).lanes, 2);

  for (int i = 0; i < 300; i++) {
    stream = request(aside, "self", "c", 1);
    presence_sender *sender = accept_request(self);
    OK(send_text(sender, "first"));
    expect_data(aside.queue, "first");
    int32_t stopped_by = PRESENCE_CANCELLED, ended_by = PRESENCE_CANCELLED;
    if (i % 4 == 0) {
      OK(presence_stream_cancel(stream));
    } else if (i % 4 == 1) {
      presence_stream_free(stream);
      ended_by = PRESENCE_OK;
    } else if (i % 4 == 2) {
      OK(mark_client_offline("c"));
      stopped_by = ended_by = PRESENCE_OFFLINE;
    } else {
      presence_sender_free(sender);
      sender = NULL;
      stopped_by = PRESENCE_OK;
      ended_by = PRESENCE_REMOTE;
    }
    if (stopped_by != PRESENCE_OK) expect_status(self.queue, PRESENCE_EVENT_STOPPED, stopped_by);
    if (ended_by != PRESENCE_OK) expect_status(aside.queue, PRESENCE_EVENT_ERROR, ended_by);
    presence_sender_free(sender);
    presence_stream_free(stream);
  }
  stream = request(aside, "self", "c", 1);
  presence_sender *sender = accept_request(self);
  OK(send_text(sender, "first"));
  expect_data(aside.queue, "first");
  OK(send_text(sender, "unread"));
  OK(presence_close(self.conn, TIMEOUT_MS));
  presence_event event = expect(self.queue, PRESENCE_EVENT_STOPPED);
  CHECK(event.status == PRESENCE_CLOSED || event.status == PRESENCE_CANCELLED); /* the connection is both ends */
  expect_nothing(self.queue);
  do CHECK_EQ(presence_queue_wait(aside.queue, &event, 1, TIMEOUT_MS), 1);
  while (event.kind == PRESENCE_EVENT_DATA);
  CHECK_EQ(event.kind, PRESENCE_EVENT_ERROR);
  expect_nothing(aside.queue);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  presence_queue_free(aside.queue);
  presence_queue_free(self.queue);
}

/* Ten thousand streams: of each three, one is ended, one is cancelled, and one's client leaves. */
static void ten_thousand_streams_share_a_lane(void) {
  enum { COUNT = 10000 };
  static presence_stream *streams[COUNT];
  static presence_sender *senders[COUNT];
  static bool ended[COUNT], stopped[COUNT];
  static presence_event events[1000];
  memset(ended, 0, sizeof ended);
  memset(stopped, 0, sizeof stopped);
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "many");
  for (uint64_t i = 0; i < COUNT; i++) {
    char client[20];
    snprintf(client, sizeof client, "%d", (int)(i % 3 == 2 ? i : i % 100));
    OK(start_request(gateway.conn, gateway.queue, "many", &i, sizeof i, client, strlen(client), NULL, i, &streams[i], NULL));
  }
  for (int accepted = 0; accepted < COUNT;) {
    int64_t count = presence_queue_wait(worker.queue, events, 1000, TIMEOUT_MS);
    CHECK(count > 0);
    for (int64_t i = 0; i < count; i++) {
      uint64_t number;
      CHECK_EQ(events[i].kind, PRESENCE_EVENT_REQUEST);
      memcpy(&number, events[i].data, sizeof number);
      CHECK(!senders[number]);
      senders[number] = events[i].sender;
      OK(presence_sender_send(events[i].sender, &number, sizeof number));
      accepted++;
    }
  }
  for (int received = 0; received < COUNT;) {
    int64_t count = presence_queue_wait(gateway.queue, events, 1000, TIMEOUT_MS);
    CHECK(count > 0);
    for (int64_t i = 0; i < count; i++) {
      CHECK_EQ(events[i].kind, PRESENCE_EVENT_DATA);
      CHECK(memcmp(events[i].data, &events[i].tag, sizeof events[i].tag) == 0);
      received++;
    }
  }
  CHECK_EQ(stats_of(gateway).streams, COUNT);
  CHECK_EQ(stats_of(worker).senders, COUNT);
  CHECK_EQ(stats_of(worker).lanes, 1);

  for (int i = 0; i < COUNT; i += 3) OK(presence_sender_end(senders[i]));
  for (int i = 1; i < COUNT; i += 3) OK(presence_stream_cancel(streams[i]));
  for (int i = 2; i < COUNT; i += 3) {
    char client[20];
    snprintf(client, sizeof client, "%d", i);
    CHECK(is_client_online(client));
    OK(mark_client_offline(client)); /* the first of these clients have other streams, too */
  }
  for (int left = COUNT; left > 0;) {
    int64_t count = presence_queue_wait(gateway.queue, events, 1000, TIMEOUT_MS);
    CHECK(count > 0);
    for (int64_t i = 0; i < count; i++) {
      uint64_t number = events[i].tag;
      CHECK(!ended[number] && events[i].stream == streams[number]);
      ended[number] = true;
      left--;
      if (number % 3 == 0 && events[i].kind == PRESENCE_EVENT_END) continue;
      CHECK_EQ(events[i].kind, PRESENCE_EVENT_ERROR);
      if (number % 3 == 1 && events[i].status == PRESENCE_CANCELLED) continue;
      CHECK_STATUS(events[i].status, PRESENCE_OFFLINE);
      CHECK(number % 3 == 2 || (number % 100) % 3 == 2);
    }
  }
  for (int left = COUNT; left > 0;) {
    /* Each sender that was not ended was stopped, once. */
    int running = (int)stats_of(worker).senders;
    int64_t count = presence_queue_wait(worker.queue, events, 1000, running ? TIMEOUT_MS : 0);
    for (int64_t i = 0; i < count; i++) {
      CHECK_EQ(events[i].kind, PRESENCE_EVENT_STOPPED);
      CHECK(events[i].status == PRESENCE_CANCELLED || events[i].status == PRESENCE_OFFLINE);
      int number = 0;
      while (number < COUNT && senders[number] != events[i].sender) number++;
      CHECK(number < COUNT && !stopped[number]);
      stopped[number] = true;
    }
    if (running == 0 && count == 0) left = 0;
    CHECK(count > 0 || running == 0);
  }
  for (int i = 0; i < COUNT; i++) {
    CHECK_EQ(stopped[i], status_word(senders[i]) != (uint32_t)PRESENCE_CLOSED);
    if (i % 3 == 1) CHECK(stopped[i]);
    presence_sender_free(senders[i]);
    presence_stream_free(streams[i]);
    senders[i] = NULL;
  }
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(exchange_from_another_process);
  RUN(peer_without_lanes_uses_level_0);
  RUN(manual_credit_on_level_0_limits_unread_bytes);
  RUN(small_max_payload);
  RUN(many_connections_share_a_service);
  RUN(second_accept_is_cancelled);
  RUN(streams_in_both_directions);
  RUN(streams_in_both_directions_between_processes);
  RUN(connection_requests_of_itself);
  RUN(ten_thousand_streams_share_a_lane);
  return 0;
}
