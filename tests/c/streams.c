/* Streams from request to end: order and content, ends and errors, refusals, retries. */
#include "peer.h"

static void thousand_messages_arrive_in_order(void) {
  pair both = open_pair_with("c", "stream_buffer_bytes=4194304"); /* they are read when all have been sent */
  unsigned char expected[2000], message[2000];
  /* Message i has i bytes, of all values in turn, NUL among them. */
  for (size_t i = 0; i < sizeof expected; i++) expected[i] = (unsigned char)(i * 7);
  for (size_t i = 0; i < 1000; i++) {
    memcpy(message, expected + i % 256, i);
    OK(presence_sender_send_wait(both.sender, message, i, TIMEOUT_MS));
    memset(message, 'x', i); /* it was copied */
  }
  CHECK_EQ(presence_sender_send_count(both.sender), 1000);
  OK(presence_sender_end(both.sender));
  for (size_t i = 0; i < 1000; i++) {
    presence_event event = expect_status(both.gateway.queue, PRESENCE_EVENT_DATA, PRESENCE_OK);
    CHECK(event.stream == both.stream && !event.sender);
    CHECK_EQ(event.tag, 1);
    CHECK_EQ(event.data_len, i);
    CHECK(memcmp(event.data, expected + i % 256, i) == 0);
  }
  presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_END, PRESENCE_OK);
  CHECK(last.stream == both.stream);
  CHECK_EQ(last.tag, 1);
  expect_nothing(both.gateway.queue);
  expect_nothing(both.worker.queue);
  CHECK_EQ(stats_of(both.gateway).streams, 0);
  CHECK_EQ(stats_of(both.worker).senders, 0);
  CHECK_EQ(stats_of(both.worker).requests, 1);
  close_pair(both);
}

static void request_event_has_all_fields(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_config *config = presence_config_new();
  presence_service *service;
  presence_stream *stream;
  const char *value;
  size_t length;
  OK(presence_config_set(config, "header.X-Model", "small"));
  OK(presence_config_set(config, "header.X-Model", "large"));
  OK(presence_serve(worker.conn, worker.queue, "fields.*", "group", 0, 42, &service, NULL));
  OK(start_request(gateway.conn, gateway.queue, "fields.all", "a\0b", 3, "client \xc3\xbc", 9, config, 1, &stream, NULL));
  presence_config_free(config);

  presence_event event = expect_status(worker.queue, PRESENCE_EVENT_REQUEST, PRESENCE_OK);
  presence_sender *sender = event.sender;
  CHECK_EQ(event.tag, 42);
  CHECK(sender && !event.stream);
  CHECK(is_text(event.client, event.client_len, "client \xc3\xbc"));
  CHECK(is_text(event.subject, event.subject_len, "fields.all"));
  CHECK(event.data_len == 3 && memcmp(event.data, "a\0b", 3) == 0);
  CHECK(event.error_code == 0 && event.reserved[0] == 0 && event.reserved[1] == 0 && event.reserved[2] == 0);
  OK(presence_sender_header(sender, "X-Model", &value, &length));
  CHECK(is_text(value, length, "small"));
  OK(presence_sender_header(sender, "Connect-ID", &value, &length));
  CHECK(is_text(value, length, "client \xc3\xbc"));
  OK(presence_sender_header(sender, "x-model", &value, &length)); /* names are case-sensitive */
  CHECK(!value && length == 0);
  OK(presence_sender_header(sender, "not: a name\r\n", &value, &length));
  CHECK(!value && length == 0);
  static const char *const headers[][2] = {
      {"Connect-ID", "client \xc3\xbc"}, {"X-Model", "small"}, {"X-Model", "large"}};
  const char *name;
  size_t name_length;
  for (size_t i = 0; i < 3; i++) {
    OK(presence_sender_header_at(sender, i, &name, &name_length, &value, &length));
    CHECK(is_text(name, name_length, headers[i][0]) && is_text(value, length, headers[i][1]));
  }
  OK(presence_sender_header_at(sender, 3, &name, &name_length, &value, &length)); /* Presence-Lane is not shown */
  CHECK(!name && !value && name_length == 0 && length == 0);
  const char *reply = presence_sender_reply(sender, &length);
  CHECK(length > 7 && reply && strncmp(reply, "_INBOX.", 7) == 0);

  CHECK_EQ(status_word(sender), 0);
  CHECK(!presence_sender_is_closed(sender));
  CHECK(is_client_online("client \xc3\xbc"));
  OK(presence_sender_end(sender));
  presence_sender_free(sender);
  expect(gateway.queue, PRESENCE_EVENT_END);
  CHECK(!is_client_online("client \xc3\xbc"));
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* STOPPED and WRITABLE have the sender's own tag, also if they were queued before it was set. */
static void sender_events_have_the_tag_of_the_sender(void) {
  pair both = open_pair("c");
  presence_stream *other = request(both.gateway, "pair", "c", 7);
  presence_sender *second = accept_request(both.worker);
  int own;
  OK(presence_sender_set_tag(both.sender, (uint64_t)(uintptr_t)&own));
  OK(mark_client_offline("c"));
  OK(presence_sender_set_tag(second, 99));
  for (int i = 0; i < 2; i++) {
    presence_event event = expect_status(both.worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE);
    CHECK_EQ(event.tag, event.sender == second ? 99 : (uint64_t)(uintptr_t)&own);
  }
  size_t length = 0;
  const char *client = presence_stream_client(other, &length);
  CHECK(presence_stream_tag(other) == 7 && length == 1 && client && *client == 'c');
  presence_stream_free(other);
  CHECK(presence_stream_tag(other) == 0 && !presence_stream_client(other, &length));
  presence_sender_free(second);
  close_pair(both);
}

/* The same for a wait that could return REQUEST and STOPPED at once. */
static void sender_is_stopped_in_a_wait_after_its_request(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "tagged");
  presence_stream *streams[2] = {request(gateway, "tagged", "c", 1), NULL};
  presence_event events[8];
  presence_sender *first = accept_request(worker);
  streams[1] = request(gateway, "tagged", "c", 2);
  struct pollfd readable = {presence_queue_fd(worker.queue), POLLIN, 0};
  CHECK_EQ(poll(&readable, 1, TIMEOUT_MS), 1); /* the second request is in the queue, and both senders' STOPPED come */
  OK(mark_client_offline("c"));
  CHECK_EQ(presence_queue_wait(worker.queue, events, 8, TIMEOUT_MS), 1);
  CHECK_EQ(events[0].kind, PRESENCE_EVENT_REQUEST);
  presence_sender *second = events[0].sender;
  OK(presence_sender_set_tag(second, 22));
  CHECK_EQ(poll(&readable, 1, TIMEOUT_MS), 1);
  CHECK_EQ(presence_queue_wait(worker.queue, events, 8, TIMEOUT_MS), 2);
  for (int i = 0; i < 2; i++) {
    CHECK_EQ(events[i].kind, PRESENCE_EVENT_STOPPED);
    CHECK_EQ(events[i].tag, events[i].sender == second ? 22 : 0);
  }
  for (int i = 0; i < 2; i++) presence_stream_free(streams[i]);
  presence_sender_free(first);
  presence_sender_free(second);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

static void anonymous_request_is_no_client(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "anonymous");
  presence_stream *stream = request(gateway, "anonymous", "", 1);
  const char *value;
  size_t length;
  presence_event event = expect(worker.queue, PRESENCE_EVENT_REQUEST);
  CHECK_EQ(event.client_len, 0);
  CHECK_EQ(presence_online_count(), 0);
  OK(presence_sender_header(event.sender, "Connect-ID", &value, &length));
  CHECK(!value);
  const char *name;
  size_t name_length;
  OK(presence_sender_header_at(event.sender, 0, &name, &name_length, &value, &length));
  CHECK(!name && !value);
  OK(mark_client_offline("")); /* stops nothing */
  OK(send_text(event.sender, "for nobody"));
  OK(presence_sender_end(event.sender));
  expect_data(gateway.queue, "for nobody");
  expect(gateway.queue, PRESENCE_EVENT_END);
  presence_sender_free(event.sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

static void error_ends_the_stream(void) {
  pair both = open_pair("c");
  OK(send_text(both.sender, "some"));
  OK(presence_sender_error(both.sender, "out of \xc3\xb6il", 11));
  expect_data(both.gateway.queue, "some");
  presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  CHECK(is_text(last.data, last.data_len, "out of \xc3\xb6il"));
  CHECK(last.stream == both.stream);
  expect_nothing(both.gateway.queue);
  close_pair(both);
}

/* The reader gets the code, which changes neither the text nor its status. */
static void error_code_arrives_with_its_text(void) {
  static const struct {
    int32_t code;
    const char *text;
    int32_t status;
  } errors[] = {
      {0, "no code", PRESENCE_REMOTE},
      {1, "", PRESENCE_REMOTE},
      {404, "no such model: \xc3\xb6il", PRESENCE_REMOTE},
      {INT32_MAX, "the largest", PRESENCE_REMOTE},
      {7, "server busy", PRESENCE_BUSY},
      {8, "the client is offline", PRESENCE_OFFLINE},
  };
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
    pair both = open_pair("c");
    OK(send_text(both.sender, "some"));
    CHECK_STATUS(presence_sender_error_code(both.sender, -1, "wrong", 5), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_error_code(both.sender, INT32_MIN, "wrong", 5), PRESENCE_INVALID);
    CHECK(!presence_sender_is_closed(both.sender));
    OK(presence_sender_error_code(both.sender, errors[i].code, errors[i].text, strlen(errors[i].text)));
    CHECK_STATUS(presence_sender_error_code(both.sender, 5, "again", 5), PRESENCE_CLOSED);
    CHECK_EQ(status_word(both.sender), (uint32_t)PRESENCE_CLOSED);
    expect_data(both.gateway.queue, "some");
    presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, errors[i].status);
    CHECK(is_text(last.data, last.data_len, errors[i].text));
    CHECK_EQ(last.error_code, errors[i].code);
    expect_nothing(both.gateway.queue);
    close_pair(both);
  }
}

/* Other ends of a stream have no code. */
static void only_errors_of_the_worker_have_a_code(void) {
  pair both = open_pair("c");
  OK(presence_sender_end(both.sender));
  CHECK_EQ(expect(both.gateway.queue, PRESENCE_EVENT_END).error_code, 0);
  presence_stream *cancelled = request(both.gateway, "pair", "c", 2);
  presence_sender *sender = accept_request(both.worker);
  OK(presence_stream_cancel(cancelled));
  CHECK_EQ(expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_CANCELLED).error_code, 0);
  presence_sender_error_code(sender, 5, "late", 4);
  expect_nothing(both.gateway.queue);
  presence_sender_free(sender);
  presence_stream_free(cancelled);
  close_pair(both);
}

/* Ends a stream in each way and then in each way again: nothing more happens, and the reader sees one end. */
static void stream_ends_once(void) {
  for (int by_error = 0; by_error < 2; by_error++) {
    pair both = open_pair("c");
    OK(send_text(both.sender, "one"));
    if (by_error) OK(presence_sender_error(both.sender, "no", 2));
    else OK(presence_sender_end(both.sender));

    OK(presence_sender_end(both.sender));
    OK(presence_sender_end(both.sender));
    CHECK_STATUS(presence_sender_error(both.sender, "again", 5), PRESENCE_CLOSED);
    CHECK_STATUS(send_text(both.sender, "late"), PRESENCE_CLOSED);
    CHECK_STATUS(presence_sender_send_wait(both.sender, "late", 4, -1), PRESENCE_CLOSED);
    CHECK(presence_sender_is_closed(both.sender));
    CHECK_EQ(status_word(both.sender), (uint32_t)PRESENCE_CLOSED);
    CHECK_EQ(presence_sender_send_count(both.sender), 1);

    expect_data(both.gateway.queue, "one");
    presence_event last = expect(both.gateway.queue, by_error ? PRESENCE_EVENT_ERROR : PRESENCE_EVENT_END);
    CHECK(!by_error || is_text(last.data, last.data_len, "no"));
    OK(mark_client_offline("c")); /* its status stays */
    CHECK_EQ(status_word(both.sender), (uint32_t)PRESENCE_CLOSED);
    expect_nothing(both.worker.queue);
    expect_nothing(both.gateway.queue);
    close_pair(both);
  }
}

static void freed_sender_ends_with_an_error(void) {
  pair both = open_pair("c");
  OK(send_text(both.sender, "some"));
  presence_sender_free(both.sender);
  both.sender = NULL;
  expect_data(both.gateway.queue, "some");
  presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  CHECK(last.data_len > 0);
  CHECK_EQ(stats_of(both.worker).senders, 0);
  close_pair(both);
}

static void *send_and_end(void *sender) {
  for (int i = 0; i < 100; i++) OK(presence_sender_send_wait((presence_sender *)sender, &i, sizeof i, TIMEOUT_MS));
  OK(presence_sender_end((presence_sender *)sender));
  return NULL;
}

/* Two threads answer one stream each, after the queue's next wait: each keeps its order, and the tag tells them
 * apart. */
static void two_threads_send_two_streams(void) {
  pair first = open_pair("a");
  presence_stream *second_stream = request(first.gateway, "pair", "b", 2);
  presence_sender *second = accept_request(first.worker);
  pthread_t threads[] = {start_thread(send_and_end, first.sender), start_thread(send_and_end, second)};
  int next[3] = {0, 0, 0}, ends = 0;
  while (ends < 2) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(first.gateway.queue, &event, 1, TIMEOUT_MS), 1);
    CHECK(event.stream == (event.tag == 1 ? first.stream : second_stream));
    if (event.kind == PRESENCE_EVENT_DATA) {
      CHECK_EQ(event.data_len, sizeof(int));
      CHECK(memcmp(event.data, &next[event.tag], sizeof(int)) == 0);
      next[event.tag]++;
    } else {
      CHECK_EQ(event.kind, PRESENCE_EVENT_END);
      CHECK_EQ(next[event.tag], 100);
      ends++;
    }
  }
  join_thread(threads[0]);
  join_thread(threads[1]);
  presence_stream_free(second_stream);
  presence_sender_free(second);
  close_pair(first);
}

/* The message is refused, and the stream goes on. */
static void unsendable_messages_are_refused(void) {
  enum { MAX_PAYLOAD = 1 << 20 };
  pair both = open_pair("c");
  char *large = (char *)calloc(1, MAX_PAYLOAD + 1);
  const char *reserved[] = {"__STREAM_END__", "__STREAM_END__ and more", "__STREAM_ERROR__", "__STREAM_ERROR__:text",
                            "{\"stream\":\"AUDIT\",\"seq\":1}"};
  size_t largest = presence_sender_max_message(both.sender);
  CHECK_EQ(largest, MAX_PAYLOAD - 64);
  if (!on_lanes()) {
    for (int i = 0; i < 5; i++) CHECK_STATUS(send_text(both.sender, reserved[i]), PRESENCE_RESERVED);
    CHECK_STATUS(presence_sender_send_wait(both.sender, reserved[0], strlen(reserved[0]), -1), PRESENCE_RESERVED);
  }
  CHECK_STATUS(presence_sender_send(both.sender, large, largest + 1), PRESENCE_TOO_LARGE);
  CHECK_STATUS(presence_sender_send_wait(both.sender, large, largest + 1, -1), PRESENCE_TOO_LARGE);
  CHECK_EQ(presence_sender_send_count(both.sender), 0);
  CHECK_EQ(status_word(both.sender), 0);
  OK(send_text(both.sender, "__STREAM_END_"));
  OK(send_text(both.sender, " __STREAM_END__"));
  OK(presence_sender_send(both.sender, large, largest));
  OK(presence_sender_end(both.sender));
  expect_data(both.gateway.queue, "__STREAM_END_");
  expect_data(both.gateway.queue, " __STREAM_END__");
  CHECK_EQ(expect(both.gateway.queue, PRESENCE_EVENT_DATA).data_len, largest);
  expect(both.gateway.queue, PRESENCE_EVENT_END);

  presence_stream *stream = NULL;
  presence_error error;
  CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", large, MAX_PAYLOAD + 1, "c", 1, NULL, 0,
                                &stream, &error), PRESENCE_TOO_LARGE);
  CHECK_CONTAINS(error.message, "1048576");
  CHECK(!stream && !is_client_online("c"));
  CHECK_EQ(stats_of(both.gateway).connects, 1); /* nothing of it reached the server */
  free(large);
  close_pair(both);
}

/* Messages of all lengths in one buffer, a few in each call, up to the first that is refused. */
static void send_many_delivers_in_order(void) {
  enum { COUNT = 1000, MAX_PAYLOAD = 1 << 20 };
  pair both = open_pair_with("c", "stream_buffer_bytes=4194304");
  unsigned char *data = (unsigned char *)malloc(COUNT * COUNT);
  size_t lengths[COUNT], at = 0;
  for (size_t i = 0; i < COUNT * COUNT; i++) data[i] = (unsigned char)(i * 7 + i / 256);
  for (size_t i = 0; i < COUNT; i++) lengths[i] = i;
  for (size_t i = 0; i < COUNT;) {
    size_t count = i % 60 + 1 < COUNT - i ? i % 60 + 1 : COUNT - i;
    CHECK_EQ(presence_sender_send_many(both.sender, data + at, lengths + i, count), count);
    for (size_t end = i + count; i < end; i++) at += lengths[i];
  }
  CHECK_EQ(presence_sender_send_count(both.sender), COUNT);
  at = 0;
  for (size_t i = 0; i < COUNT; i++) {
    presence_event event = expect(both.gateway.queue, PRESENCE_EVENT_DATA);
    CHECK(event.data_len == i && memcmp(event.data, data + at, i) == 0);
    at += i;
  }
  free(data);

  /* Nothing after the first refused message is sent. */
  char *large = (char *)calloc(1, MAX_PAYLOAD + 10);
  size_t too_large[] = {2, 3, MAX_PAYLOAD + 1, 1};
  CHECK_EQ(presence_sender_send_many(both.sender, large, too_large, 4), 2);
  CHECK_STATUS(presence_sender_send_many(both.sender, large, too_large + 2, 2), PRESENCE_TOO_LARGE);
  free(large);
  size_t reserved[] = {1, 14, 1};
  CHECK_EQ(presence_sender_send_many(both.sender, "x__STREAM_END__y", reserved, 3), on_lanes() ? 3 : 1);
  if (!on_lanes()) {
    CHECK_STATUS(presence_sender_send_many(both.sender, "__STREAM_END__y", reserved + 1, 2), PRESENCE_RESERVED);
  }
  CHECK_EQ(presence_sender_send_many(both.sender, NULL, NULL, 0), 0);
  OK(presence_sender_end(both.sender));
  CHECK_STATUS(presence_sender_send_many(both.sender, "xy", reserved, 1), PRESENCE_CLOSED);
  CHECK_EQ(presence_sender_send_many(both.sender, NULL, NULL, 0), 0);
  CHECK_EQ(presence_sender_send_count(both.sender), COUNT + (on_lanes() ? 5 : 3));
  CHECK_EQ(expect(both.gateway.queue, PRESENCE_EVENT_DATA).data_len, 2);
  CHECK_EQ(expect(both.gateway.queue, PRESENCE_EVENT_DATA).data_len, 3);
  expect_data(both.gateway.queue, "x");
  if (on_lanes()) expect_data(both.gateway.queue, "__STREAM_END__");
  if (on_lanes()) expect_data(both.gateway.queue, "y");
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  close_pair(both);
}

/* The text of an error is cut to the server's max_payload. */
static void long_error_text_is_cut(void) {
  enum { MAX_PAYLOAD = 1 << 20 };
  pair both = open_pair("c");
  char *text = (char *)malloc(MAX_PAYLOAD);
  memset(text, 'x', MAX_PAYLOAD);
  OK(presence_sender_error(both.sender, text, MAX_PAYLOAD));
  presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  CHECK_EQ(last.data_len, MAX_PAYLOAD - (on_lanes() ? 64 : strlen("__STREAM_ERROR__:")));
  CHECK(memcmp(last.data, text, last.data_len) == 0);
  close_pair(both);

  /* On level 0 a code needs a header, which counts for max_payload, too. */
  both = open_pair("c");
  OK(presence_sender_error_code(both.sender, INT32_MAX, text, MAX_PAYLOAD));
  last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  CHECK_EQ(last.error_code, INT32_MAX);
  CHECK(last.data_len <= MAX_PAYLOAD - 32 && last.data_len >= MAX_PAYLOAD - 64);
  CHECK_EQ(stats_of(both.worker).connects, 1);
  free(text);
  close_pair(both);
}

static void unserved_subject_has_no_responders(void) {
  peer gateway = open_peer();
  presence_stream *stream = request(gateway, "nobody", "c", 9);
  presence_event last = expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_NO_RESPONDERS);
  CHECK(last.stream == stream && last.tag == 9 && last.data_len > 0);
  CHECK(!is_client_online("c"));
  CHECK_STATUS(presence_stream_cancel(stream), PRESENCE_CLOSED);
  presence_stream_free(stream);
  close_peer(gateway);
}

static void request_is_retried_until_served(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_config *config = presence_config_new();
  presence_stream *stream;
  OK(presence_config_set(config, "retries", "100000"));
  OK(presence_config_set(config, "retry_delay_ms", "5"));
  OK(start_request(gateway.conn, gateway.queue, "later", "x", 1, "c", 1, config, 1, &stream, NULL));
  presence_config_free(config);
  while (stats_of(gateway).messages_in < 3) usleep(1000); /* it received three "no responders" */
  presence_service *service = serve(worker, "later");
  presence_event event = expect(worker.queue, PRESENCE_EVENT_REQUEST);
  CHECK(is_text(event.data, event.data_len, "x") && is_text(event.client, event.client_len, "c"));
  OK(presence_sender_end(event.sender));
  presence_sender_free(event.sender);
  expect(gateway.queue, PRESENCE_EVENT_END); /* the first event: retries are not reported */
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

static void request_is_retried_as_often_as_configured(void) {
  peer gateway = open_peer();
  presence_config *config = presence_config_new();
  presence_stream *stream;
  OK(presence_config_set(config, "retries", "3"));
  OK(presence_config_set(config, "retry_delay_ms", "0"));
  OK(start_request(gateway.conn, gateway.queue, "nobody", "", 0, "", 0, config, 1, &stream, NULL));
  presence_config_free(config);
  expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_NO_RESPONDERS);
  CHECK_EQ(stats_of(gateway).messages_in, 4); /* one "no responders" for each of the four attempts */
  presence_stream_free(stream);
  close_peer(gateway);
}

static void request_beyond_max_streams_is_busy(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service;
  OK(presence_serve(worker.conn, worker.queue, "busy", NULL, 2, 0, &service, NULL));
  presence_stream *streams[5];
  for (uint64_t i = 0; i < 3; i++) streams[i] = request(gateway, "busy", "c", i);
  presence_sender *senders[] = {accept_request(worker), accept_request(worker)};
  presence_event refused = expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_BUSY);
  CHECK(is_text(refused.data, refused.data_len, "server busy"));
  CHECK_EQ(refused.tag, 2);
  CHECK_EQ(stats_of(worker).requests_busy, 1);
  expect_nothing(worker.queue);

  /* A retried request is accepted when there is capacity. */
  streams[3] = request_with(gateway, "busy", "c", 3, "retries=100000");
  OK(presence_sender_end(senders[0]));
  presence_sender_free(senders[0]);
  CHECK_EQ(expect(gateway.queue, PRESENCE_EVENT_END).tag, 0);
  senders[0] = accept_request(worker);
  /* A stopped sender frees capacity, too. */
  OK(mark_client_offline("c"));
  streams[4] = request(gateway, "busy", "d", 4);
  for (int i = 0; i < 2; i++) expect_status(worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_OFFLINE);
  presence_sender *last = accept_request(worker);
  OK(presence_sender_end(last));
  presence_sender_free(last);
  for (int i = 0; i < 2; i++) {
    expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_OFFLINE);
    presence_sender_free(senders[i]);
  }
  expect(gateway.queue, PRESENCE_EVENT_END);
  for (int i = 0; i < 5; i++) presence_stream_free(streams[i]);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* A later request is refused or has no responders: it is never accepted. */
static void expect_not_served(peer gateway) {
  presence_stream *stream = request(gateway, "pair", "late", 5);
  presence_event last = expect(gateway.queue, PRESENCE_EVENT_ERROR);
  CHECK(last.tag == 5 && (last.status == PRESENCE_NO_RESPONDERS || last.status == PRESENCE_BUSY));
  presence_stream_free(stream);
}

static void stopped_service_takes_no_requests(void) {
  pair both = open_pair("c");
  OK(presence_service_stop(both.service));
  CHECK_STATUS(presence_service_stop(both.service), PRESENCE_CLOSED);
  expect_not_served(both.gateway);
  OK(send_text(both.sender, "goes on")); /* running streams continue */
  expect_data(both.gateway.queue, "goes on");
  presence_service_free(both.service);
  CHECK_STATUS(presence_service_stop(both.service), PRESENCE_CLOSED);
  OK(presence_sender_end(both.sender));
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  expect_nothing(both.worker.queue);
  close_pair(both);
}

static void freed_service_takes_no_requests(void) {
  pair both = open_pair("c");
  presence_service_free(both.service);
  expect_not_served(both.gateway);
  OK(send_text(both.sender, "lives on"));
  expect_data(both.gateway.queue, "lives on");
  close_pair(both);
}

/* Requests that arrive at a freed queue are answered with an error, as are those that it held. */
static void freed_worker_queue_ends_its_streams(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "freed");
  presence_stream *streams[] = {request(gateway, "freed", "a", 0), NULL};
  while (stats_of(worker).requests == 0) usleep(1000);
  presence_queue_free(worker.queue);
  expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  streams[1] = request(gateway, "freed", "b", 1);
  expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  CHECK_EQ(stats_of(worker).senders, 0);
  for (int i = 0; i < 2; i++) presence_stream_free(streams[i]);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

static void in_a_group_one_worker_serves(void) {
  peer gateway = open_peer(), workers[] = {open_peer(), open_peer()};
  presence_service *services[2];
  for (int i = 0; i < 2; i++) {
    OK(presence_serve(workers[i].conn, workers[0].queue, "grouped", "g", 0, 0, &services[i], NULL));
  }
  for (int i = 0; i < 10; i++) {
    presence_stream *stream = request(gateway, "grouped", "", 0);
    presence_sender *sender = accept_request(workers[0]);
    OK(presence_sender_end(sender));
    presence_sender_free(sender);
    expect(gateway.queue, PRESENCE_EVENT_END);
    presence_stream_free(stream);
  }
  CHECK_EQ(stats_of(workers[0]).requests + stats_of(workers[1]).requests, 10);
  for (int i = 0; i < 2; i++) presence_service_free(services[i]);
  close_peer(workers[0]);
  close_peer(workers[1]);
  close_peer(gateway);
}

/* On a lane the first worker to answer has the stream: see lane_peers.c. */
static void without_a_group_both_workers_answer(void) {
  peer gateway = open_peer(), workers[] = {open_peer(), open_peer()};
  presence_service *services[2];
  for (int i = 0; i < 2; i++) {
    OK(presence_serve(workers[i].conn, workers[0].queue, "alone", "", 0, 1, &services[i], NULL));
  }
  presence_stream *stream = request(gateway, "alone", "", 0);
  presence_sender *senders[] = {accept_request(workers[0]), accept_request(workers[0])};
  OK(send_text(senders[0], "both answer"));
  expect_data(gateway.queue, "both answer");
  OK(send_text(senders[1], "the same stream"));
  expect_data(gateway.queue, "the same stream");
  presence_stream_free(stream);
  for (int i = 0; i < 2; i++) presence_sender_free(senders[i]);
  for (int i = 0; i < 2; i++) presence_service_free(services[i]);
  close_peer(workers[0]);
  close_peer(workers[1]);
  close_peer(gateway);
}

static void timeout_ends_the_stream(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "slow");
  presence_stream *stream = request_with(gateway, "slow", "c", 1, "timeout_ms=500");
  presence_sender *sender = accept_request(worker);
  OK(send_text(sender, "in time"));
  expect_data(gateway.queue, "in time");
  presence_event last = expect_status(gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_TIMEOUT);
  CHECK(last.stream == stream && last.data_len > 0);
  expect_status(worker.queue, PRESENCE_EVENT_STOPPED, CANCELLED); /* nothing waits for it any longer */
  presence_sender_free(sender);
  presence_stream_free(stream);

  /* A stream that ends in time does not time out later. */
  stream = request_with(gateway, "slow", "c", 2, "timeout_ms=1");
  presence_event request_event;
  CHECK(presence_queue_wait(worker.queue, &request_event, 1, TIMEOUT_MS) == 1);
  if (presence_sender_end(request_event.sender) == PRESENCE_OK) {
    presence_event event;
    CHECK_EQ(presence_queue_wait(gateway.queue, &event, 1, TIMEOUT_MS), 1);
    CHECK(event.kind == PRESENCE_EVENT_END || event.status == PRESENCE_TIMEOUT);
    CHECK_EQ(presence_queue_wait(gateway.queue, &event, 1, 20), 0); /* exactly one of them */
  }
  presence_sender_free(request_event.sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* The worker's connection closes: its services end, and readers are informed. */
static void worker_close_ends_the_streams(void) {
  pair both = open_pair("c");
  OK(send_text(both.sender, "some"));
  OK(presence_close(both.worker.conn, TIMEOUT_MS));
  presence_event stopped = expect_status(both.worker.queue, PRESENCE_EVENT_STOPPED, PRESENCE_CLOSED);
  CHECK(stopped.sender == both.sender && is_text(stopped.client, stopped.client_len, "c"));
  CHECK_STATUS(send_text(both.sender, "late"), PRESENCE_CLOSED);
  CHECK_STATUS(presence_service_stop(both.service), PRESENCE_CLOSED);
  expect_data(both.gateway.queue, "some");
  expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  presence_sender_free(both.sender);
  presence_stream_free(both.stream);
  presence_service_free(both.service);
  presence_queue_free(both.worker.queue);
  close_peer(both.gateway);
}

/* The gateway's connection closes: its streams end, and their workers are informed. */
static void gateway_close_ends_the_streams(void) {
  pair both = open_pair("c");
  run_whole_stream(both.worker, both.gateway, "pair");
  OK(presence_close(both.gateway.conn, TIMEOUT_MS));
  presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_CLOSED);
  CHECK(last.stream == both.stream);
  CHECK_STATUS(presence_stream_cancel(both.stream), PRESENCE_CLOSED);
  expect_status(both.worker.queue, PRESENCE_EVENT_STOPPED, CANCELLED);
  presence_sender_free(both.sender);
  presence_stream_free(both.stream);
  presence_service_free(both.service);
  presence_queue_free(both.gateway.queue);
  close_peer(both.worker);
}

/* When close returns, the server has everything that was sent before. */
static void close_drains(void) {
  enum { COUNT = 20000 };
  pair both = open_pair_with("c", "stream_buffer_bytes=4194304");
  for (int i = 0; i < COUNT; i++) OK(presence_sender_send_wait(both.sender, &i, sizeof i, TIMEOUT_MS));
  OK(presence_sender_end(both.sender));
  OK(presence_close(both.worker.conn, TIMEOUT_MS));
  for (int i = 0; i < COUNT; i++) {
    presence_event event = expect(both.gateway.queue, PRESENCE_EVENT_DATA);
    CHECK(event.data_len == sizeof i && memcmp(event.data, &i, sizeof i) == 0);
  }
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  presence_sender_free(both.sender);
  presence_stream_free(both.stream);
  presence_service_free(both.service);
  presence_queue_free(both.worker.queue);
  close_peer(both.gateway);
}

static peer taker;

static void *take_one(void *taken) {
  *(presence_event *)taken = expect(taker.queue, PRESENCE_EVENT_DATA);
  return NULL;
}

/* Events stay valid until the next wait: after the thread that took them ended, the stream was freed and the
 * connection closed. Handles in kept events are stale. */
static void events_stay_valid_until_the_next_wait(void) {
  static const char text[] = "a message that is kept for longer than all that it came from";
  pair both = open_pair("c");
  presence_event kept, again;
  OK(send_text(both.sender, text));
  taker = both.gateway;
  join_thread(start_thread(take_one, &kept));
  CHECK(kept.stream == both.stream);
  for (int i = 0; i < 1000; i++) OK(send_text(both.sender, "more"));
  while (stats_of(both.gateway).messages_in < (on_lanes() ? 2 : 1001)) usleep(100);
  presence_stream_free(both.stream);
  expect_status(both.worker.queue, PRESENCE_EVENT_STOPPED, CANCELLED);
  presence_sender_free(both.sender);
  presence_service_free(both.service);
  OK(presence_close(both.worker.conn, TIMEOUT_MS));
  OK(presence_close(both.gateway.conn, TIMEOUT_MS));
  CHECK(is_text(kept.data, kept.data_len, text));
  CHECK_STATUS(presence_stream_cancel(kept.stream), PRESENCE_CLOSED);
  CHECK_EQ(presence_queue_wait(both.gateway.queue, &again, 1, 0), 0);
  CHECK_STATUS(presence_stream_consumed(kept.stream, 1), PRESENCE_CLOSED);
  presence_stream_free(kept.stream);
  presence_queue_free(both.gateway.queue);
  presence_queue_free(both.worker.queue);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN_ON_BOTH(thousand_messages_arrive_in_order);
  RUN_ON_BOTH(request_event_has_all_fields);
  RUN_ON_BOTH(sender_events_have_the_tag_of_the_sender);
  RUN_ON_BOTH(sender_is_stopped_in_a_wait_after_its_request);
  RUN_ON_BOTH(anonymous_request_is_no_client);
  RUN_ON_BOTH(error_ends_the_stream);
  RUN_ON_BOTH(error_code_arrives_with_its_text);
  RUN_ON_BOTH(only_errors_of_the_worker_have_a_code);
  RUN_ON_BOTH(stream_ends_once);
  RUN_ON_BOTH(freed_sender_ends_with_an_error);
  RUN_ON_BOTH(two_threads_send_two_streams);
  RUN_ON_BOTH(unsendable_messages_are_refused);
  RUN_ON_BOTH(send_many_delivers_in_order);
  RUN_ON_BOTH(long_error_text_is_cut);
  RUN_ON_BOTH(unserved_subject_has_no_responders);
  RUN_ON_BOTH(request_is_retried_until_served);
  RUN_ON_BOTH(request_is_retried_as_often_as_configured);
  RUN_ON_BOTH(request_beyond_max_streams_is_busy);
  RUN_ON_BOTH(stopped_service_takes_no_requests);
  RUN_ON_BOTH(freed_service_takes_no_requests);
  RUN_ON_BOTH(freed_worker_queue_ends_its_streams);
  RUN_ON_LEVEL_0(without_a_group_both_workers_answer);
  RUN_ON_BOTH(in_a_group_one_worker_serves);
  RUN_ON_BOTH(timeout_ends_the_stream);
  RUN_ON_BOTH(worker_close_ends_the_streams);
  RUN_ON_BOTH(gateway_close_ends_the_streams);
  RUN_ON_BOTH(close_drains);
  RUN_ON_BOTH(events_stay_valid_until_the_next_wait);
  return 0;
}
