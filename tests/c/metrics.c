/* presence_metrics counts what streams do, on lanes and on level 0, and never has a client's id. */
#include "proxy.h"
#include <limits.h>

#define ODD_SUBJECT "odd\\\"{subject=,}"
#define SECRET "SECRET-ID"

/* The metrics of this process. The caller frees them. */
static char *read_metrics(void) {
  for (size_t cap = 1;;) {
    char *text = (char *)malloc(cap);
    int64_t length = presence_metrics(text, cap);
    CHECK(length > 0);
    if ((size_t)length < cap) {
      CHECK_EQ(strlen(text), length);
      CHECK(strcmp(text + length - 6, "# EOF\n") == 0);
      return text;
    }
    cap = (size_t)length + 1024;
    free(text);
  }
}

/* The value of a sample in a text, by its name and labels; -1 if there is none. */
static double find_value(const char *text, const char *sample) {
  char line[300];
  snprintf(line, sizeof line, "\nnats_presence_%s ", sample);
  const char *found = strstr(text, line);
  return found ? strtod(found + strlen(line), NULL) : -1;
}

/* The value of a sample, which must be there. */
static double value_in(const char *text, const char *sample) {
  double value = find_value(text, sample);
  if (value < 0) {
    begin_failure(__FILE__, __LINE__);
    fprintf(stderr, "there is no %s in\n%s", sample, text);
    end_failure();
  }
  return value;
}

static double value_of(const char *sample) {
  char *text = read_metrics();
  double value = value_in(text, sample);
  free(text);
  return value;
}

/* The value in an earlier text: 0 if the service of the sample had not begun. */
static double value_before(const char *text, const char *sample) {
  double value = find_value(text, sample);
  return value < 0 ? 0 : value;
}

/* Checks by how much a sample has increased since `before`. */
#define CHECK_MORE(before, sample, more) CHECK_EQ(value_of(sample) - value_before(before, sample), more)

static void wait_for(const char *sample, double value) {
  for (int64_t end = now_ms() + TIMEOUT_MS; value_of(sample) != value; usleep(1000)) {
    if (now_ms() > end) {
      begin_failure(__FILE__, __LINE__);
      fprintf(stderr, "%s is %g, not %g", sample, value_of(sample), value);
      end_failure();
    }
  }
}

static void text_is_written_as_by_snprintf(void) {
  char text[16384];
  int64_t length = presence_metrics(NULL, 0);
  CHECK(length > 1000 && length < (int64_t)sizeof text);
  CHECK_STATUS(presence_metrics(NULL, 1), PRESENCE_INVALID);
  CHECK_STATUS(presence_metrics(text, SIZE_MAX), PRESENCE_INVALID);
  CHECK_STATUS(presence_metrics(text, (size_t)SSIZE_MAX + 1), PRESENCE_INVALID);
  for (int64_t cap = 0; cap <= length + 2; cap += cap < 70 || cap > length - 3 ? 1 : length - 70) {
    memset(text, '~', sizeof text);
    CHECK_EQ(presence_metrics(text, (size_t)cap), length);
    int64_t written = cap == 0 ? 0 : cap - 1 < length ? cap - 1 : length;
    CHECK(cap == 0 || text[written] == 0);
    CHECK(!memchr(text, '~', (size_t)written) && text[written + (cap > 0)] == '~');
    CHECK(cap <= length || strcmp(text + length - 6, "# EOF\n") == 0);
  }
}

static void streams_are_counted_while_they_run(void) {
  char *before = read_metrics();
  pair both = open_pair("client");
  presence_stream *second = request(both.gateway, "pair", "client", 2);
  presence_sender *sender = accept_request(both.worker);
  CHECK_MORE(before, "streams_running{role=\"gateway\",subject=\"\"}", 2);
  CHECK_EQ(value_of("streams_running{role=\"worker\",subject=\"pair\"}"), 2);
  CHECK_EQ(value_of("clients_online"), 1);
  CHECK_EQ(value_of("connections{state=\"connected\"}"), 2);
  CHECK_EQ(value_of("lanes{role=\"worker\"}"), on_lanes());
  wait_for("lanes{role=\"gateway\"}", on_lanes()); /* the ACCEPT begins it */
  OK(presence_sender_end(sender));
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  CHECK_EQ(value_of("streams_running{role=\"worker\",subject=\"pair\"}"), 1);
  CHECK_EQ(value_of("streams_running{role=\"gateway\",subject=\"\"}"), 1);
  presence_sender_free(sender);
  presence_stream_free(second);
  close_pair(both);
  CHECK_EQ(value_of("streams_running{role=\"worker\",subject=\"pair\"}"), 0);
  CHECK_EQ(value_of("streams_running{role=\"gateway\",subject=\"\"}"), 0);
  CHECK_EQ(value_of("clients_online"), 0);
  CHECK_EQ(value_of("connections{state=\"connected\"}"), 0);
  free(before);
}

/* The requests of `count` streams of `subject`, some of which get messages, by each way to send one. */
static void histograms_count_each_stream_once(void) {
  enum { STREAMS = 20, SILENT = 5 };
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "histograms");
  char *before = read_metrics();
  const size_t lengths[] = {1, 1};
  for (int i = 0; i < STREAMS; i++) {
    presence_stream *stream = request(gateway, "histograms", "client", 1);
    presence_sender *sender = accept_request(worker);
    if (i >= SILENT) {
      if (i % 3 == 0) OK(send_text(sender, "first"));
      if (i % 3 == 1) OK(presence_sender_send_wait(sender, "first", 5, -1));
      if (i % 3 == 2) CHECK_EQ(presence_sender_send_many(sender, "ab", lengths, 2), 2);
      OK(send_text(sender, "another"));
      OK(presence_sender_send_wait(sender, "another", 7, -1));
      CHECK_EQ(presence_sender_send_many(sender, "ab", lengths, 2), 2);
    }
    OK(presence_sender_end(sender));
    for (int data = i < SILENT ? 0 : i % 3 == 2 ? 6 : 5; data > 0; data--) expect(gateway.queue, PRESENCE_EVENT_DATA);
    expect(gateway.queue, PRESENCE_EVENT_END);
    presence_sender_free(sender);
    presence_stream_free(stream);
  }
#define WORKER "{role=\"worker\",subject=\"histograms\"}"
#define GATEWAY "{role=\"gateway\",subject=\"\"}"
  CHECK_MORE(before, "streams_started_total" WORKER, STREAMS);
  CHECK_MORE(before, "streams_started_total" GATEWAY, STREAMS);
  CHECK_MORE(before, "streams_ended_total{role=\"worker\",subject=\"histograms\",status=\"ok\"}", STREAMS);
  CHECK_MORE(before, "streams_ended_total{role=\"gateway\",subject=\"\",status=\"ok\"}", STREAMS);
  CHECK_MORE(before, "stream_duration_seconds_count" WORKER, STREAMS);
  CHECK_MORE(before, "stream_duration_seconds_count" GATEWAY, STREAMS);
  CHECK_MORE(before, "first_message_seconds_count" WORKER, STREAMS - SILENT);
  CHECK_MORE(before, "first_message_seconds_count" GATEWAY, STREAMS - SILENT);
  CHECK_MORE(before, "stop_latency_seconds_count{subject=\"histograms\"}", 0);
  CHECK_MORE(before, "requests_total{subject=\"histograms\"}", STREAMS);
  CHECK_MORE(before, "stream_duration_seconds_bucket{role=\"worker\",subject=\"histograms\",le=\"+Inf\"}", STREAMS);
  CHECK(value_of("stream_duration_seconds_sum" WORKER) <= value_of("stream_duration_seconds_sum" GATEWAY));
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
  free(before);
}

/* The stop of a stream is measured until the call by which the worker ends its sender. */
static void stop_latency_ends_when_the_worker_ends_its_sender(void) {
  enum { MS = 60 };
  for (int call = 0; call < 3; call++) {
    char *before = read_metrics();
    pair both = open_pair("client");
    OK(mark_client_offline("client"));
    expect_status(both.worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE);
    CHECK_STATUS(send_text(both.sender, "late"), PRESENCE_OFFLINE);
    CHECK_MORE(before, "stop_latency_seconds_count{subject=\"pair\"}", 0);
    usleep(MS * 1000);
    if (call == 1) CHECK_STATUS(presence_sender_end(both.sender), PRESENCE_OFFLINE);
    if (call == 2) CHECK_STATUS(presence_sender_error(both.sender, "late", 4), PRESENCE_OFFLINE);
    if (call > 0) CHECK_MORE(before, "stop_latency_seconds_count{subject=\"pair\"}", 1);
    close_pair(both);
    CHECK_MORE(before, "stop_latency_seconds_count{subject=\"pair\"}", 1);
    CHECK_MORE(before, "stop_latency_seconds_bucket{subject=\"pair\",le=\"0.05\"}", 0);
    double sum = value_of("stop_latency_seconds_sum{subject=\"pair\"}");
    CHECK(sum - value_before(before, "stop_latency_seconds_sum{subject=\"pair\"}") >= MS / 1000.0);
    free(before);
  }
}

/* Checks that one stream of each role has ended with these statuses since `before`. */
static void check_ends(const char *before, const char *subject, const char *worker, const char *gateway) {
  char sample[200];
  snprintf(sample, sizeof sample, "streams_ended_total{role=\"worker\",subject=\"%s\",status=\"%s\"}", subject, worker);
  wait_for(sample, value_before(before, sample) + 1);
  snprintf(sample, sizeof sample, "streams_ended_total{role=\"gateway\",subject=\"\",status=\"%s\"}", gateway);
  wait_for(sample, value_before(before, sample) + 1);
}

/* The worker in a process of its own: accepts a request and waits to be killed. */
static void run_worker(void) {
  peer worker = open_peer();
  serve(worker, "killed");
  presence_sender *sender = accept_request(worker);
  OK(send_text(sender, "running"));
  pause();
}

/* The gateway in a process of its own: requests a stream and waits to be killed. */
static void run_gateway(void) {
  peer gateway = open_peer();
  request(gateway, "pair", "client", 1);
  pause();
}

static void kill_peer(pid_t process) {
  int status;
  CHECK_EQ(kill(process, SIGKILL), 0);
  CHECK_EQ(waitpid(process, &status, 0), process);
}

static void ends_are_counted_by_status(void) {
  char *before;
  enum { FREE, OFFLINE, CANCEL, ERROR, REFUSAL, TIMEOUT, CLOSED_BY_WORKER, CLOSED_BY_GATEWAY, ENDS };
  for (int end = 0; end < ENDS; end++) {
    pair both = open_pair_with("client", end == TIMEOUT ? "timeout_ms=100" : NULL);
    before = read_metrics();
    if (end == FREE) {
      presence_sender_free(both.sender);
      both.sender = NULL;
    }
    if (end == OFFLINE) OK(mark_client_offline("client"));
    if (end == CANCEL) OK(presence_stream_cancel(both.stream));
    if (end == ERROR) OK(presence_sender_error(both.sender, "failed", 6));
    if (end == REFUSAL) OK(presence_sender_error(both.sender, "server busy", 11));
    if (end == CLOSED_BY_WORKER) OK(presence_close(both.worker.conn, TIMEOUT_MS));
    if (end == CLOSED_BY_GATEWAY) OK(presence_close(both.gateway.conn, TIMEOUT_MS));
    /* A worker on level 0 can be stopped only by announcing the client offline, or does not learn of it. */
    const char *cancelled = on_lanes() ? "cancelled" : "offline";
    if (end == FREE) check_ends(before, "pair", "remote", "remote");
    if (end == OFFLINE) check_ends(before, "pair", "offline", "offline");
    if (end == CANCEL) check_ends(before, "pair", cancelled, "cancelled");
    if (end == ERROR) check_ends(before, "pair", "remote", "remote");
    if (end == REFUSAL) check_ends(before, "pair", "busy", "busy");
    if (end == TIMEOUT) check_ends(before, "pair", cancelled, "timeout");
    if (end == CLOSED_BY_WORKER) check_ends(before, "pair", "closed", "remote");
    if (end == CLOSED_BY_GATEWAY) check_ends(before, "pair", cancelled, "closed");
    presence_sender_free(both.sender);
    presence_stream_free(both.stream);
    presence_service_free(both.service);
    presence_close(both.worker.conn, TIMEOUT_MS);
    presence_close(both.gateway.conn, TIMEOUT_MS);
    presence_queue_free(both.worker.queue);
    presence_queue_free(both.gateway.queue);
    free(before);
  }
}

static void dead_peers_are_counted(void) {
  peer worker = open_peer_with("peer_grace_ms=0"), gateway = open_peer_with("peer_grace_ms=0");
  presence_service *service = serve(worker, "pair");
  pid_t process = start("run_gateway");
  presence_sender *sender = accept_request(worker);
  char *before = read_metrics();
  kill_peer(process);
  expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_PEER_GONE);
  CHECK_MORE(before, "streams_ended_total{role=\"worker\",subject=\"pair\",status=\"peer_gone\"}", 1);
  presence_sender_free(sender);
  process = start("run_worker");
  presence_stream *stream = request_with(gateway, "killed", "client", 1, "retries=1000 retry_delay_ms=10");
  expect_data(gateway.queue, "running");
  kill_peer(process);
  expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_PEER_GONE);
  CHECK_MORE(before, "streams_ended_total{role=\"gateway\",subject=\"\",status=\"peer_gone\"}", 1);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
  free(before);
}

/* Connections are cut while streams run: those on level 0 end, and messages of lanes are sent again. */
static void lost_connections_are_counted(void) {
  own_server server = new_server();
  proxy *before = new_proxy(server.port);
  for (int lanes = 0; lanes < 2; lanes++) {
    const char *options = lanes ? "lanes=true" : "lanes=false";
    peer worker = open_peer_at(before->url, options), gateway = open_peer_at(server.url, options);
    presence_service *service = serve(worker, "lost");
    presence_stream *stream = request(gateway, "lost", "client", 1);
    presence_sender *sender = accept_request(worker);
    OK(send_text(sender, "first"));
    expect_data(gateway.queue, "first");
    char *text = read_metrics();
    proxy_swallow(before, true);
    uint64_t out = stats_of(worker).messages_out;
    OK(send_text(sender, "lost"));
    while (stats_of(worker).messages_out == out) usleep(100);
    if (lanes) CHECK(value_of("waiting_bytes") > 0);
    proxy_cut(before);
    proxy_swallow(before, false);
    wait_for("reconnects_total", value_in(text, "reconnects_total") + 1);
    if (lanes) {
      expect_data(gateway.queue, "lost");
      CHECK(value_of("lane_messages_resent_total") > value_in(text, "lane_messages_resent_total"));
      CHECK(value_of("lane_round_trip_max_seconds") > 0);
      OK(presence_sender_end(sender));
      expect(gateway.queue, PRESENCE_EVENT_END);
      check_ends(text, "lost", "ok", "ok");
    } else {
      expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
      check_ends(text, "lost", "disconnected", "remote");
    }
    presence_sender_free(sender);
    presence_stream_free(stream);
    presence_service_free(service);
    presence_close(gateway.conn, TIMEOUT_MS);
    presence_close(worker.conn, TIMEOUT_MS);
    presence_queue_free(gateway.queue);
    presence_queue_free(worker.queue);
    free(text);
  }
  kill_server(&server);
}

static void refused_requests_are_counted(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service;
  OK(presence_serve(worker.conn, worker.queue, "one", NULL, 1, 0, &service, NULL));
  char *before = read_metrics();
  presence_stream *streams[3];
  streams[0] = request(gateway, "one", "a", 1);
  presence_sender *sender = accept_request(worker);
  streams[1] = request(gateway, "one", "b", 2);
  expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_BUSY);
  streams[2] = request(gateway, "nobody", "c", 3);
  expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_NO_RESPONDERS);
  CHECK_MORE(before, "requests_total{subject=\"one\"}", 2);
  CHECK_MORE(before, "requests_refused_total{subject=\"one\",status=\"busy\"}", 1);
  CHECK_MORE(before, "requests_refused_total{subject=\"one\",status=\"invalid\"}", 0);
  CHECK_MORE(before, "streams_started_total{role=\"worker\",subject=\"one\"}", 1);
  CHECK_MORE(before, "streams_started_total{role=\"gateway\",subject=\"\"}", 3);
  CHECK_MORE(before, "streams_ended_total{role=\"gateway\",subject=\"\",status=\"busy\"}", 1);
  CHECK_MORE(before, "streams_ended_total{role=\"gateway\",subject=\"\",status=\"no_responders\"}", 1);
  /* A request that fails at once has started nothing. */
  presence_config *config = presence_config_new();
  set_options(config, "only_online=true");
  presence_stream *stream;
  CHECK_STATUS(start_request(gateway.conn, gateway.queue, "one", NULL, 0, "d", 1, config, 4, &stream, NULL),
               PRESENCE_OFFLINE);
  CHECK_MORE(before, "streams_started_total{role=\"gateway\",subject=\"\"}", 3);
  CHECK_EQ(value_of("streams_running{role=\"gateway\",subject=\"\"}"), 1);
  presence_config_free(config);
  presence_sender_free(sender);
  for (int i = 0; i < 3; i++) presence_stream_free(streams[i]);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
  free(before);
}

static void subjects_are_escaped_and_ids_are_absent(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, ODD_SUBJECT);
  presence_stream *stream = request(gateway, ODD_SUBJECT, SECRET, 1);
  presence_sender *sender = accept_request(worker);
  OK(send_text(sender, SECRET));
  expect_data(gateway.queue, SECRET);
  char *text = read_metrics();
  CHECK_EQ(value_in(text, "streams_running{role=\"worker\",subject=\"odd\\\\\\\"{subject=,}\"}"), 1);
  OK(presence_mark_offline(SECRET, strlen(SECRET)));
  expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE);
  char *later = read_metrics();
  CHECK(!strstr(text, SECRET) && !strstr(later, SECRET) && !strstr(text, "_INBOX"));
  free(text);
  free(later);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

static void counters_outlive_their_connections(void) {
  const char *sample = "streams_started_total{role=\"worker\",subject=\"pair\"}";
  char *before = read_metrics();
  for (int i = 1; i <= 3; i++) {
    close_pair(open_pair("client"));
    CHECK_MORE(before, sample, i);
  }
  CHECK_MORE(before, "stream_duration_seconds_count{role=\"worker\",subject=\"pair\"}", 3);
  free(before);
}

/* Subjects beyond the hundredth share their samples, so that the text stays bounded. */
static void number_of_subjects_is_bounded(void) {
  peer worker = open_peer();
  char subject[40];
  for (int i = 0; i < 150; i++) {
    snprintf(subject, sizeof subject, "bounded.%d", i);
    presence_service_free(serve(worker, subject));
  }
  int count = 0;
  char *text = read_metrics();
  for (const char *at = text; (at = strstr(at, "\nnats_presence_requests_total{")); at++) count++;
  CHECK_EQ(count, 101);
  CHECK_EQ(value_in(text, "requests_total{subject=\"other subjects\"}"), 0);
  close_peer(worker);
  free(text);
}

static void forked_child_begins_at_zero(void) {
  pair both = open_pair("client");
  CHECK_EQ(value_of("streams_running{role=\"gateway\",subject=\"\"}"), 1);
  pid_t child = fork();
  if (child == 0) {
    CHECK_EQ(value_of("streams_running{role=\"gateway\",subject=\"\"}"), 0);
    CHECK_EQ(value_of("clients_online"), 0);
    char *text = read_metrics();
    CHECK(!strstr(text, "pair"));
    _exit(0);
  }
  expect_exit(child, 0);
  close_pair(both);
}

static bool readers_end;

static void *read_again_and_again(void *unused) {
  const char *sample = "streams_started_total{role=\"worker\",subject=\"pair\"}";
  for (double last = 0; !__atomic_load_n(&readers_end, __ATOMIC_ACQUIRE);) {
    double value = value_of(sample);
    CHECK(value >= last);
    last = value;
  }
  return unused;
}

static void many_threads_read_while_streams_run(void) {
  enum { READERS = 8, ROUNDS = 20 };
  pthread_t readers[READERS];
  __atomic_store_n(&readers_end, false, __ATOMIC_RELEASE);
  close_pair(open_pair("client"));
  for (int i = 0; i < READERS; i++) readers[i] = start_thread(read_again_and_again, NULL);
  for (int i = 0; i < ROUNDS; i++) {
    pair both = open_pair("client");
    OK(send_text(both.sender, "first"));
    expect_data(both.gateway.queue, "first");
    close_pair(both);
  }
  __atomic_store_n(&readers_end, true, __ATOMIC_RELEASE);
  for (int i = 0; i < READERS; i++) join_thread(readers[i]);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(run_worker);
  ROLE(run_gateway);
  RUN(text_is_written_as_by_snprintf);
  RUN_ON_BOTH(streams_are_counted_while_they_run);
  RUN_ON_BOTH(histograms_count_each_stream_once);
  RUN_ON_BOTH(stop_latency_ends_when_the_worker_ends_its_sender);
  RUN_ON_BOTH(ends_are_counted_by_status);
  RUN(dead_peers_are_counted);
  RUN(lost_connections_are_counted);
  RUN_ON_BOTH(refused_requests_are_counted);
  RUN_ON_BOTH(subjects_are_escaped_and_ids_are_absent);
  RUN_ON_BOTH(counters_outlive_their_connections);
  RUN_ON_BOTH(many_threads_read_while_streams_run);
  RUN(forked_child_begins_at_zero);
  RUN(number_of_subjects_is_bounded);
  return 0;
}
