/* Streams on a lane within one process: order and content, backpressure, and ends that concern one stream only. */
#include "content.h"

enum { MAX_PAYLOAD = 1 << 20, LARGEST = MAX_PAYLOAD - 64, OVERHEAD = 64 };

/* Order and content ------------------------------------------------------------------------------------------------- */

/* The length of message i: mostly short, some long, a few of the maximum. */
static size_t length_of(uint64_t number) {
  uint64_t chance = scramble(number);
  if (number % 1000 == 0) return LARGEST - number / 1000;
  return chance % 100 == 0 ? chance / 100 % 200000 : chance / 100 % 300;
}

static void *send_all_lengths(void *sender) {
  unsigned char *message = (unsigned char *)malloc(LARGEST);
  for (uint64_t i = 0; i < 20000; i++) {
    fill_content(message, length_of(i), 1, i);
    OK(presence_sender_send_wait((presence_sender *)sender, message, length_of(i), TIMEOUT_MS));
  }
  OK(presence_sender_end((presence_sender *)sender));
  free(message);
  return NULL;
}

static void messages_of_many_lengths_arrive_in_order(void) {
  pair both = open_pair("c");
  pthread_t thread = start_thread(send_all_lengths, both.sender);
  presence_event events[100];
  uint64_t next = 0;
  for (bool has_ended = false; !has_ended;) {
    int64_t count = presence_queue_wait(both.gateway.queue, events, 1 + next % 100, TIMEOUT_MS);
    CHECK(count > 0);
    for (int64_t i = 0; i < count; i++) {
      CHECK(!has_ended);
      CHECK(events[i].stream == both.stream && events[i].tag == 1);
      has_ended = events[i].kind != PRESENCE_EVENT_DATA;
      if (!has_ended) {
        CHECK_CONTENT(&events[i], length_of(next), 1, next);
        next++;
      } else {
        CHECK_EQ(events[i].kind, PRESENCE_EVENT_END);
      }
    }
  }
  CHECK_EQ(next, 20000);
  join_thread(thread);
  CHECK_EQ(stats_of(both.gateway).lanes, 1);
  CHECK_EQ(stats_of(both.worker).lanes, 1);
  CHECK(stats_of(both.gateway).messages_in < 15000); /* they arrived in batches */
  expect_nothing(both.gateway.queue);
  expect_nothing(both.worker.queue);
  close_pair(both);
}

static void message_of_every_allowed_length(void) {
  pair both = open_pair("c");
  unsigned char *message = (unsigned char *)calloc(1, MAX_PAYLOAD + 1);
  size_t too_large[] = {LARGEST + 1, MAX_PAYLOAD, MAX_PAYLOAD + 1};
  for (int i = 0; i < 3; i++) {
    CHECK_STATUS(presence_sender_send(both.sender, message, too_large[i]), PRESENCE_TOO_LARGE);
    CHECK_STATUS(presence_sender_send_wait(both.sender, message, too_large[i], -1), PRESENCE_TOO_LARGE);
  }
  /* Lengths around the limits of one-, two- and three-byte numbers, a batch, and a message. */
  size_t around[] = {0, 127, 128, 16383, 16384, 65536 - 41, 65536, LARGEST - 1, LARGEST};
  for (uint64_t i = 0; i < sizeof around / sizeof *around; i++) {
    for (size_t length = around[i] > 3 ? around[i] - 3 : 0; length <= around[i] + 3 && length <= LARGEST; length++) {
      fill_content(message, length, 1, i);
      OK(presence_sender_send_wait(both.sender, message, length, TIMEOUT_MS));
      presence_event event = expect(both.gateway.queue, PRESENCE_EVENT_DATA);
      CHECK_CONTENT(&event, length, 1, i);
    }
  }
  CHECK_EQ(stats_of(both.worker).connects, 1); /* the server accepted everything */
  free(message);
  close_pair(both);
}

/* What would end a stream on level 0 is plain data on a lane. */
static void reserved_texts_are_plain_data(void) {
  static const char *const texts[] = {"__STREAM_END__", "__STREAM_ERROR__:", "__STREAM_ERROR__:server busy", "", "__STREAM_END__ x"};
  pair both = open_pair("c");
  for (int i = 0; i < 5; i++) OK(send_text(both.sender, texts[i]));
  OK(presence_sender_end(both.sender));
  for (int i = 0; i < 5; i++) expect_data(both.gateway.queue, texts[i]);
  expect(both.gateway.queue, PRESENCE_EVENT_END);
  close_pair(both);
}

static void error_text_arrives(void) {
  static const char *const texts[] = {"", "out of \xc3\xb6il", "server busy", "the client is offline", "__STREAM_END__"};
  static const int32_t statuses[] = {PRESENCE_REMOTE, PRESENCE_REMOTE, PRESENCE_BUSY, PRESENCE_OFFLINE, PRESENCE_REMOTE};
  for (int i = 0; i < 5; i++) {
    pair both = open_pair("c");
    OK(send_text(both.sender, "some"));
    OK(presence_sender_error(both.sender, texts[i], strlen(texts[i])));
    expect_data(both.gateway.queue, "some");
    presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, statuses[i]);
    CHECK(is_text(last.data, last.data_len, texts[i]));
    expect_nothing(both.gateway.queue);
    close_pair(both);
  }
}

/* Backpressure ------------------------------------------------------------------------------------------------------ */

/* Sends empty messages until the sender is full, and returns how many. */
static int fill(presence_sender *sender) {
  int sent = 0;
  int32_t status;
  while ((status = presence_sender_send(sender, "", 0)) == PRESENCE_OK) sent++;
  CHECK_STATUS(status, PRESENCE_FULL);
  CHECK_STATUS(presence_sender_send(sender, "", 0), PRESENCE_FULL);
  CHECK_STATUS(presence_sender_send_wait(sender, "", 0, 0), PRESENCE_TIMEOUT);
  CHECK_EQ(status_word(sender), 0);
  return sent;
}

static void take(peer gateway, int count) {
  for (int i = 0; i < count; i++) expect(gateway.queue, PRESENCE_EVENT_DATA);
}

/* Checks that this queue has no event after the lane has delivered everything: a whole stream ran over it. */
static void check_still_nothing(peer worker, peer gateway, const char *subject) {
  expect_nothing(worker.queue);
  run_whole_stream(worker, gateway, subject);
  expect_nothing(worker.queue);
}

/* An idle reader blocks its worker, and nothing else on the lane. */
static void full_is_followed_by_writable(void) {
  enum { WINDOW = 64000 };
  peer worker = open_peer(), gateway = open_peer(), aside = second_queue(gateway);
  presence_service *service = serve(worker, "full");
  presence_stream *stream = request_with(gateway, "full", "c", 1, "stream_buffer_bytes=64000");
  presence_sender *sender = accept_request(worker);

  int window = fill(sender), waiting = window;
  CHECK_EQ(window, WINDOW / OVERHEAD);
  /* Everything arrived and is in the reader's queue; the reader has given no credit. */
  check_still_nothing(worker, aside, "full");
  CHECK_STATUS(presence_sender_send(sender, "", 0), PRESENCE_FULL);

  for (int round = 0; round < 10; round++) {
    /* A quarter of the window gives no credit yet; one message more gives credit for everything read. */
    take(gateway, window / 4);
    waiting -= window / 4;
    if (round == 0) check_still_nothing(worker, aside, "full");
    take(gateway, 1);
    waiting -= 1;
    CHECK(expect(worker.queue, PRESENCE_EVENT_WRITABLE).sender == sender);
    int more = fill(sender);
    CHECK(more >= window / 4 && more <= window / 4 + 2);
    waiting += more;
    check_still_nothing(worker, aside, "full"); /* one WRITABLE for each refusal */
  }
  OK(presence_sender_end(sender)); /* needs no window */
  take(gateway, waiting);
  expect(gateway.queue, PRESENCE_EVENT_END);
  expect_nothing(gateway.queue);
  run_whole_stream(worker, aside, "full");
  expect_nothing(worker.queue); /* there is credit now, but no sender to use it */
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  presence_queue_free(aside.queue);
  close_peer(gateway);
  close_peer(worker);
}

/* The window is stream_buffer_bytes: 256 KiB by default, 4 MiB at most. */
static void window_limits_unread_messages(void) {
  struct {
    const char *option;
    int fits;
  } windows[] = {{"stream_buffer_bytes=1", 1},
                 {"stream_buffer_bytes=64", 1},
                 {"stream_buffer_bytes=640", 10},
                 {"stream_buffer_bytes=100000000", (4 << 20) / OVERHEAD},
                 {NULL, (256 << 10) / OVERHEAD}};
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "windows");
  for (int i = 0; i < 5; i++) {
    presence_stream *stream = request_with(gateway, "windows", "c", 1, windows[i].option);
    presence_sender *sender = accept_request(worker);
    int sent = 0;
    int32_t status;
    while ((status = presence_sender_send_wait(sender, "", 0, 500)) == PRESENCE_OK) sent++;
    CHECK_STATUS(status, PRESENCE_TIMEOUT);
    CHECK_EQ(sent, windows[i].fits);
    take(gateway, sent);
    OK(presence_sender_send_wait(sender, "", 0, TIMEOUT_MS));
    OK(presence_sender_end(sender));
    take(gateway, 1);
    expect(gateway.queue, PRESENCE_EVENT_END);
    presence_sender_free(sender);
    presence_stream_free(stream);
  }
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* Messages larger than the window get through, one at a time. */
static void message_larger_than_the_window(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "large");
  presence_stream *stream = request_with(gateway, "large", "c", 1, "stream_buffer_bytes=1000");
  presence_sender *sender = accept_request(worker);
  unsigned char *message = (unsigned char *)malloc(LARGEST);
  fill_content(message, LARGEST, 1, 0);
  OK(presence_sender_send(sender, message, LARGEST));
  for (int i = 0; i < 20; i++) {
    CHECK_STATUS(presence_sender_send(sender, message, LARGEST), PRESENCE_FULL);
    presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
    CHECK_CONTENT(&event, LARGEST, 1, 0);
    CHECK(expect(worker.queue, PRESENCE_EVENT_WRITABLE).sender == sender);
    OK(presence_sender_send_wait(sender, message, LARGEST, TIMEOUT_MS)); /* the lane's own buffer may still be full */
  }
  free(message);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

struct wait {
  presence_sender *sender;
  int32_t result;
};

static void *block_on_send(void *argument) {
  struct wait *wait = (struct wait *)argument;
  wait->result = presence_sender_send_wait(wait->sender, "", 0, -1);
  return NULL;
}

/* send_many sends as many as fit, and the next call is refused. */
static void send_many_stops_at_the_window(void) {
  enum { COUNT = 1000, WINDOW = 100 };
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "many");
  presence_stream *stream = request_with(gateway, "many", "c", 1, "stream_buffer_bytes=10000");
  presence_sender *sender = accept_request(worker);
  unsigned char data[COUNT * 36];
  size_t lengths[COUNT];
  for (uint64_t i = 0; i < COUNT; i++) {
    lengths[i] = 36; /* each counts 100 */
    fill_content(data + i * 36, 36, 1, i);
  }
  CHECK_EQ(presence_sender_send_many(sender, data, lengths, COUNT), WINDOW);
  uint64_t sent = WINDOW;
  for (uint64_t received = 0; received < COUNT;) {
    if (sent < COUNT) {
      CHECK_STATUS(presence_sender_send_many(sender, data + sent * 36, lengths, COUNT - sent), PRESENCE_FULL);
      for (uint64_t end = received + WINDOW / 4 + 1; received < end; received++) {
        presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
        CHECK_CONTENT(&event, 36, 1, received);
      }
      CHECK(expect(worker.queue, PRESENCE_EVENT_WRITABLE).sender == sender);
      int64_t count = presence_sender_send_many(sender, data + sent * 36, lengths, COUNT - sent);
      CHECK(count == WINDOW / 4 + 1 || (uint64_t)count == COUNT - sent);
      sent += (uint64_t)count;
      CHECK_EQ(presence_sender_send_count(sender), sent);
      continue;
    }
    presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
    CHECK_CONTENT(&event, 36, 1, received);
    received++;
  }
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* A blocked send continues when the reader reads, and whatever ends the sender ends the wait. */
static void blocked_send_ends_with_its_stream(void) {
  enum { READER, CANCEL, FREE, MARK, END, CLOSE_GATEWAY, CLOSE_WORKER, WAYS };
  for (int way = 0; way < WAYS; way++) {
    peer worker = open_peer(), gateway = open_peer();
    presence_service *service = serve(worker, "waiting");
    presence_stream *stream = request_with(gateway, "waiting", "c", 1, "stream_buffer_bytes=640");
    struct wait wait = {accept_request(worker), 1};
    CHECK_EQ(fill(wait.sender), 10);
    pthread_t thread = start_thread(block_on_send, &wait);
    usleep(20000); /* most likely it is blocked by now; if not, the test still holds */
    int32_t expected = PRESENCE_OK;
    switch (way) {
      case READER:
        take(gateway, 10);
        break;
      case CANCEL:
        expected = PRESENCE_CANCELLED;
        OK(presence_stream_cancel(stream));
        break;
      case FREE:
        expected = PRESENCE_CANCELLED;
        presence_stream_free(stream);
        break;
      case MARK:
        expected = PRESENCE_OFFLINE;
        OK(mark_client_offline("c"));
        break;
      case END:
        expected = PRESENCE_CLOSED;
        OK(presence_sender_end(wait.sender));
        break;
      case CLOSE_GATEWAY:
        expected = PRESENCE_CANCELLED;
        OK(presence_close(gateway.conn, TIMEOUT_MS));
        break;
      default:
        expected = PRESENCE_CLOSED;
        OK(presence_close(worker.conn, TIMEOUT_MS));
    }
    join_thread(thread);
    CHECK_STATUS(wait.result, expected);
    presence_sender_free(wait.sender);
    presence_stream_free(stream);
    presence_service_free(service);
    if (way != CLOSE_GATEWAY) OK(presence_close(gateway.conn, TIMEOUT_MS));
    if (way != CLOSE_WORKER) OK(presence_close(worker.conn, TIMEOUT_MS));
    presence_queue_free(gateway.queue);
    presence_queue_free(worker.queue);
  }
}

/* One stream is not read; fifty others on the same lane run to their end meanwhile. */
static void slow_reader_does_not_delay_others(void) {
  enum { MANY = 50, COUNT = 2000 };
  peer worker = open_peer(), gateway = open_peer(), slow = second_queue(gateway);
  presence_service *service = serve(worker, "many");
  presence_stream *slow_stream = request_with(slow, "many", "slow", 0, "stream_buffer_bytes=6400");
  presence_sender *slow_sender = accept_request(worker), *senders[MANY];
  presence_stream *streams[MANY];
  CHECK_EQ(fill(slow_sender), 100);
  for (uint64_t i = 0; i < MANY; i++) {
    streams[i] = request_with(gateway, "many", "c", i, "stream_buffer_bytes=10000");
    senders[i] = accept_request(worker);
  }
  uint64_t sent[MANY] = {0}, received[MANY] = {0}, ended = 0;
  unsigned char message[64];
  while (ended < MANY) {
    for (uint64_t i = 0; i < MANY; i++) {
      int32_t status = PRESENCE_OK;
      while (sent[i] < COUNT && status == PRESENCE_OK) {
        fill_content(message, sent[i] % 64, i, sent[i]);
        status = presence_sender_send(senders[i], message, sent[i] % 64);
        sent[i] += status == PRESENCE_OK;
      }
      CHECK(status == PRESENCE_OK || status == PRESENCE_FULL);
      if (sent[i] == COUNT) OK(presence_sender_end(senders[i]));
    }
    presence_event events[64];
    int64_t count = presence_queue_wait(gateway.queue, events, 64, 10);
    for (int64_t i = 0; i < count; i++) {
      uint64_t *number = &received[events[i].tag];
      if (events[i].kind == PRESENCE_EVENT_DATA) {
        CHECK_CONTENT(&events[i], *number % 64, events[i].tag, *number);
        ++*number;
      } else {
        CHECK_EQ(events[i].kind, PRESENCE_EVENT_END);
        CHECK_EQ(*number, COUNT);
        ended++;
      }
    }
  }
  CHECK_STATUS(presence_sender_send(slow_sender, "", 0), PRESENCE_FULL);
  take(slow, 100);
  OK(presence_sender_send_wait(slow_sender, "last", 4, TIMEOUT_MS));
  OK(presence_sender_end(slow_sender));
  expect_data(slow.queue, "last");
  expect(slow.queue, PRESENCE_EVENT_END);
  for (int i = 0; i < MANY; i++) {
    presence_sender_free(senders[i]);
    presence_stream_free(streams[i]);
  }
  presence_sender_free(slow_sender);
  presence_stream_free(slow_stream);
  presence_service_free(service);
  presence_queue_free(slow.queue);
  close_peer(gateway);
  close_peer(worker);
}

/* The reader's queue is freed: its stream goes on without events, and its worker is not blocked. */
static void stream_outlives_its_queue(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "freed");
  presence_stream *stream = request_with(gateway, "freed", "c", 1, "stream_buffer_bytes=6400");
  presence_sender *sender = accept_request(worker);
  CHECK_EQ(fill(sender), 100);
  presence_queue_free(gateway.queue);
  expect(worker.queue, PRESENCE_EVENT_WRITABLE);
  for (int i = 0; i < 10000; i++) OK(presence_sender_send_wait(sender, "x", 1, 3000));
  OK(presence_sender_end(sender));
  while (stats_of(gateway).streams > 0) usleep(1000);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  OK(presence_close(gateway.conn, TIMEOUT_MS));
  close_peer(worker);
}

/* Manual credit ----------------------------------------------------------------------------------------------------- */

static presence_stream *request_manually(peer gateway, const char *subject, const char *bytes) {
  presence_stream *stream;
  presence_config *config = presence_config_new();
  OK(presence_config_set(config, "manual_credit", "true"));
  OK(presence_config_set(config, "stream_buffer_bytes", bytes));
  OK(start_request(gateway.conn, gateway.queue, subject, NULL, 0, "c", 1, config, 1, &stream, NULL));
  presence_config_free(config);
  return stream;
}

/* Messages that were read but not reported as consumed still count. */
static void manual_credit_opens_the_window(void) {
  enum { SIZE = 936, WINDOW = 100 }; /* each counts 1000 */
  static const char data[SIZE] = {0};
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "manual");
  presence_stream *stream = request_manually(gateway, "manual", "100000");
  presence_sender *sender = accept_request(worker);
  for (int i = 0; i < WINDOW; i++) OK(presence_sender_send(sender, data, SIZE));
  CHECK_STATUS(presence_sender_send(sender, data, SIZE), PRESENCE_FULL);
  take(gateway, WINDOW);
  CHECK_STATUS(presence_sender_send_wait(sender, data, SIZE, 300), PRESENCE_TIMEOUT);
  /* A quarter of the window gives no credit yet; more gives it at once, with the 64 extra bytes of each message. */
  OK(presence_stream_consumed(stream, WINDOW / 4 * SIZE));
  CHECK_STATUS(presence_sender_send_wait(sender, data, SIZE, 300), PRESENCE_TIMEOUT);
  OK(presence_stream_consumed(stream, SIZE));
  CHECK(expect(worker.queue, PRESENCE_EVENT_WRITABLE).sender == sender);
  int sent = 0;
  while (presence_sender_send(sender, data, SIZE) == PRESENCE_OK) sent++;
  CHECK_EQ(sent, WINDOW / 4 + 1);
  take(gateway, sent);
  /* For many messages at once, and one by one. */
  OK(presence_stream_consumed(stream, (size_t)(WINDOW - WINDOW / 4 - 1 + sent) * SIZE));
  for (int i = 0; i < 1000; i++) {
    OK(presence_sender_send_wait(sender, data, SIZE, TIMEOUT_MS));
    take(gateway, 1);
    OK(presence_stream_consumed(stream, SIZE));
  }
  OK(presence_sender_end(sender));
  expect(gateway.queue, PRESENCE_EVENT_END);
  CHECK_STATUS(presence_stream_consumed(stream, SIZE), PRESENCE_CLOSED);
  presence_stream_free(stream);
  CHECK_STATUS(presence_stream_consumed(stream, SIZE), PRESENCE_CLOSED);
  presence_sender_free(sender);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

/* Empty messages use the window, too, until those before them are reported as consumed. */
static void manual_credit_counts_empty_messages(void) {
  peer worker = open_peer(), gateway = open_peer();
  presence_service *service = serve(worker, "manual");
  presence_stream *stream = request_manually(gateway, "manual", "6400");
  presence_sender *sender = accept_request(worker);
  for (int round = 0; round < 20; round++) {
    for (int i = 0; i < 100; i++) OK(presence_sender_send_wait(sender, "", 0, TIMEOUT_MS));
    CHECK_STATUS(presence_sender_send_wait(sender, "", 0, 0), PRESENCE_TIMEOUT);
    take(gateway, 100);
    if (round == 0) CHECK_STATUS(presence_sender_send_wait(sender, "", 0, 200), PRESENCE_TIMEOUT);
    OK(presence_stream_consumed(stream, 0));
  }
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  close_peer(gateway);
  close_peer(worker);
}

static void *send_twenty_thousand(void *sender) {
  unsigned char message[100];
  for (uint64_t i = 0; i < 20000; i++) {
    fill_content(message, i % 100, 1, i);
    OK(presence_sender_send_wait((presence_sender *)sender, message, i % 100, TIMEOUT_MS));
  }
  return NULL;
}

/* Always reports more as consumed than arrived: the stream is not affected. */
static void excess_manual_credit_is_ignored(void) {
  static const size_t too_much[] = {0, 1, 1000000, SIZE_MAX / 2, SIZE_MAX, SIZE_MAX - 63};
  for (size_t i = 0; i < sizeof too_much / sizeof *too_much; i++) {
    peer worker = open_peer(), gateway = open_peer();
    presence_service *service = serve(worker, "manual");
    presence_stream *stream = request_manually(gateway, "manual", "6400");
    presence_sender *sender = accept_request(worker);
    OK(presence_stream_consumed(stream, too_much[i])); /* the stream may not be accepted yet */
    pthread_t thread = start_thread(send_twenty_thousand, sender);
    for (uint64_t number = 0; number < 20000; number++) {
      presence_event event = expect(gateway.queue, PRESENCE_EVENT_DATA);
      CHECK_CONTENT(&event, number % 100, 1, number);
      OK(presence_stream_consumed(stream, event.data_len));
      OK(presence_stream_consumed(stream, too_much[i]));
    }
    join_thread(thread);
    OK(presence_sender_end(sender));
    expect(gateway.queue, PRESENCE_EVENT_END);
    presence_sender_free(sender);
    presence_stream_free(stream);
    presence_service_free(service);
    close_peer(gateway);
    close_peer(worker);
  }
}

/* Without the option presence_stream_consumed has no effect: only reading gives credit. */
static void consumed_without_manual_credit_has_no_effect(void) {
  peer worker = open_peer(), gateway = open_peer(), aside = second_queue(gateway);
  presence_service *service = serve(worker, "manual");
  presence_stream *stream = request_with(gateway, "manual", "c", 1, "stream_buffer_bytes=640");
  presence_sender *sender = accept_request(worker);
  CHECK_EQ(fill(sender), 10);
  for (int i = 0; i < 10; i++) OK(presence_stream_consumed(stream, 1000000));
  check_still_nothing(worker, aside, "manual");
  CHECK_STATUS(presence_sender_send(sender, "", 0), PRESENCE_FULL);
  take(gateway, 10);
  expect(worker.queue, PRESENCE_EVENT_WRITABLE);
  presence_sender_free(sender);
  presence_stream_free(stream);
  presence_service_free(service);
  presence_queue_free(aside.queue);
  close_peer(gateway);
  close_peer(worker);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(messages_of_many_lengths_arrive_in_order);
  RUN(message_of_every_allowed_length);
  RUN(reserved_texts_are_plain_data);
  RUN(error_text_arrives);
  RUN(full_is_followed_by_writable);
  RUN(window_limits_unread_messages);
  RUN(message_larger_than_the_window);
  RUN(send_many_stops_at_the_window);
  RUN(blocked_send_ends_with_its_stream);
  RUN(slow_reader_does_not_delay_others);
  RUN(stream_outlives_its_queue);
  RUN(manual_credit_opens_the_window);
  RUN(manual_credit_counts_empty_messages);
  RUN(excess_manual_credit_is_ignored);
  RUN(consumed_without_manual_credit_has_no_effect);
  return 0;
}
