/* Extreme arguments: unlimited timeouts, lengths beyond memory, misaligned pointers. */
#include "peer.h"
#include <sys/mman.h>
#include <sys/resource.h>

/* Times --------------------------------------------------------------------------------------------------------------- */

static char data[1 << 16];

static void *read_later(void *self) {
  presence_event event;
  usleep(50000); /* most likely a sender is blocked by then */
  while (presence_queue_wait(((pair *)self)->gateway.queue, &event, 1, TIMEOUT_MS) == 1) {
    if (event.kind != PRESENCE_EVENT_DATA) return NULL;
  }
  CHECK(!"the end came");
  return NULL;
}

/* Timeouts of send_wait and close (queue.c tests queue_wait): beyond the clock's range, 0, and unlimited. */
static void extreme_timeouts(void) {
  static const int64_t for_ever[] = {INT64_MAX, INT64_MAX - 1, (int64_t)1 << 53, -1, INT64_MIN};
  for (int i = 0; i < 5; i++) {
    pair both = open_pair("c");
    presence_stream *narrow = request_with(both.gateway, "pair", "d", 2, "stream_buffer_bytes=100000");
    presence_sender *sender = accept_request(both.worker);
    if (on_lanes()) {
      while (presence_sender_send(sender, data, sizeof data) == PRESENCE_OK) continue;
      CHECK_STATUS(presence_sender_send_wait(sender, data, sizeof data, 0), PRESENCE_TIMEOUT);
      pthread_t reader = start_thread(read_later, &both);
      for (int k = 0; k < 10; k++) OK(presence_sender_send_wait(sender, data, sizeof data, for_ever[i]));
      OK(presence_sender_end(sender));
      join_thread(reader);
    }
    presence_sender_free(sender);
    presence_sender_free(both.sender);
    presence_stream_free(narrow);
    presence_stream_free(both.stream);
    presence_service_free(both.service);
    OK(presence_close(both.gateway.conn, for_ever[i]));
    OK(presence_close(both.worker.conn, for_ever[i]));
    presence_queue_free(both.gateway.queue);
    presence_queue_free(both.worker.queue);
  }
  peer self = open_peer();
  int32_t status = presence_close(self.conn, 0); /* it closes, whatever it reports about pending messages */
  CHECK(status == PRESENCE_OK || status == PRESENCE_TIMEOUT);
  CHECK_STATUS(presence_close(self.conn, 0), PRESENCE_CLOSED);
  presence_queue_free(self.queue);
}

/* Lengths ------------------------------------------------------------------------------------------------------------- */

/* Lengths beyond the address space are refused before anything is read. */
static void lengths_beyond_memory_are_refused(void) {
  pair both = open_pair("c");
  presence_session *session = NULL;
  presence_stream *stream = NULL;
  presence_error error;
  static const size_t lengths[] = {SIZE_MAX, SIZE_MAX - 1, SIZE_MAX / 2 + 1, SIZE_MAX - 4095};
  for (int i = 0; i < 4; i++) {
    size_t length = lengths[i];
    CHECK_STATUS(presence_sender_send(both.sender, "x", length), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_send_wait(both.sender, "x", length, 0), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_send_many(both.sender, "x", &length, 1), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_error(both.sender, "x", length), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_error_code(both.sender, 1, "x", length), PRESENCE_INVALID);
    CHECK_STATUS(presence_mark_online("x", length), PRESENCE_INVALID);
    CHECK_STATUS(presence_mark_offline("x", length), PRESENCE_INVALID);
    CHECK_STATUS(presence_mark_many(true, "x", &length, 1, &error), PRESENCE_INVALID);
    CHECK(!presence_is_online("x", length));
    CHECK_STATUS(presence_session_open("x", length, &session), PRESENCE_INVALID);
    CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", "x", length, "c", 1, NULL, 2, &stream, &error),
                 PRESENCE_INVALID);
    CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", "x", 1, "x", length, NULL, 2, &stream, &error),
                 PRESENCE_INVALID);
    presence_event event;
    CHECK_STATUS(presence_queue_wait(both.worker.queue, &event, length, 0), PRESENCE_INVALID);
    CHECK(!session && !stream);
  }
  OK(presence_stream_consumed(both.stream, SIZE_MAX));
  OK(send_text(both.sender, "goes on"));
  expect_data(both.gateway.queue, "goes on");
  close_pair(both);
}

/* 4 GiB + 5, which 32 bits would take for 5: refused or cut without allocating a copy. */
static void role_four_gib_are_refused_without_a_copy(void) {
  const size_t length = ((size_t)1 << 32) + 5;
  char *much = (char *)mmap(NULL, length, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(much != MAP_FAILED);
  pair both = open_pair("c");
  presence_session *session = NULL;
  presence_stream *stream = NULL;
  presence_error error;
  struct rlimit limit;
  CHECK_EQ(getrlimit(RLIMIT_AS, &limit), 0);
  limit.rlim_cur = length + ((rlim_t)1 << 31); /* enough for everything but a copy */
  CHECK_EQ(setrlimit(RLIMIT_AS, &limit), 0);
  CHECK_STATUS(presence_sender_send(both.sender, much, length), PRESENCE_TOO_LARGE);
  CHECK_STATUS(presence_sender_send_wait(both.sender, much, length, 0), PRESENCE_TOO_LARGE);
  CHECK_STATUS(presence_sender_send_many(both.sender, much, &length, 1), PRESENCE_TOO_LARGE);
  CHECK_STATUS(presence_mark_online(much, length), PRESENCE_INVALID);
  CHECK_STATUS(presence_mark_offline(much, length), PRESENCE_INVALID);
  CHECK_STATUS(presence_mark_many(false, much, &length, 1, NULL), PRESENCE_INVALID);
  CHECK(!presence_is_online(much, length));
  CHECK_STATUS(presence_session_open(much, length, &session), PRESENCE_INVALID);
  CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", much, length, "d", 1, NULL, 2, &stream, &error),
               PRESENCE_TOO_LARGE);
  CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", "x", 1, much, length, NULL, 2, &stream, &error),
               PRESENCE_INVALID);
  CHECK(!session && !stream);
  OK(presence_sender_error(both.sender, much, length)); /* the text is cut */
  presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
  CHECK(last.data_len > 1000 && last.data_len <= 1 << 20);
  close_pair(both);
  CHECK_EQ(munmap(much, length), 0);
}

static void four_gib_are_refused_without_a_copy(void) { expect_exit(start("role_four_gib_are_refused_without_a_copy"), 0); }

/* Pointers ------------------------------------------------------------------------------------------------------------ */

/* Bytes may start at any address. */
static void byte_pointers_need_no_alignment(void) {
  for (size_t offset = 1; offset < 16; offset++) {
    char id[64], message[64];
    pair both = open_pair("c");
    memcpy(id + offset, "odd", 4);
    memcpy(message + offset, "message", 8);
    OK(presence_mark_online(id + offset, 3));
    CHECK(is_client_online(id + offset));
    OK(mark_client_offline(id + offset));
    OK(presence_sender_send(both.sender, message + offset, 7));
    expect_data(both.gateway.queue, "message");
    OK(presence_sender_error(both.sender, message + offset, 7));
    presence_event last = expect_status(both.gateway.queue, PRESENCE_EVENT_ERROR, PRESENCE_REMOTE);
    CHECK(is_text(last.data, last.data_len, "message"));
    close_pair(both);
  }
}

/* Anything larger than a byte must be aligned: otherwise the call is refused and writes nothing. (A misaligned error
 * is treated as NULL.) */
static void misaligned_pointers_are_refused(void) {
  static char buffer[sizeof(presence_event) * 4], untouched[sizeof buffer];
  pair both = open_pair("c");
  const char *name = NULL;
  size_t length = 7;
  for (int offset = 1; offset < 8; offset++) {
    void *odd = (void *)((uintptr_t)buffer + (uintptr_t)offset);
    memset(buffer, 'x', sizeof buffer);
    memset(untouched, 'x', sizeof untouched);
    OK(send_text(both.sender, "waits"));
    CHECK_STATUS(presence_queue_wait(both.gateway.queue, (presence_event *)odd, 1, TIMEOUT_MS), PRESENCE_INVALID);
    expect_data(both.gateway.queue, "waits"); /* it was not lost */
    CHECK_STATUS(presence_queue_new((presence_queue **)odd), PRESENCE_INVALID);
    CHECK_STATUS(presence_connect(url, NULL, (presence_conn **)odd, NULL), PRESENCE_INVALID);
    CHECK_STATUS(presence_session_open("d", 1, (presence_session **)odd), PRESENCE_INVALID);
    CHECK_STATUS(presence_conn_stats(both.worker.conn, (presence_stats *)odd), PRESENCE_INVALID);
    CHECK_STATUS(presence_serve(both.worker.conn, both.worker.queue, "s", "", 0, 0, (presence_service **)odd, NULL), PRESENCE_INVALID);
    CHECK_STATUS(start_request(both.gateway.conn, both.gateway.queue, "pair", "x", 1, "d", 1, NULL, 2,
                                  (presence_stream **)odd, NULL), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_header(both.sender, "Connect-ID", (const char **)odd, &length), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_header(both.sender, "Connect-ID", &name, (size_t *)odd), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_header_at(both.sender, 0, (const char **)odd, &length, &name, &length), PRESENCE_INVALID);
    CHECK_STATUS(presence_sender_header_at(both.sender, 0, &name, &length, &name, (size_t *)odd), PRESENCE_INVALID);
    CHECK(!presence_sender_reply(both.sender, (size_t *)odd));
    CHECK_STATUS(presence_sender_send_many(both.sender, "1234567", (size_t *)odd, 1), PRESENCE_INVALID);
    CHECK_STATUS(presence_mark_many(true, "1234567", (size_t *)odd, 1, NULL), PRESENCE_INVALID);
    if (offset % 4) {
      CHECK_STATUS(presence_connect("", NULL, NULL, (presence_error *)odd), PRESENCE_INVALID);
      CHECK_STATUS(presence_connect("http://x", NULL, (presence_conn **)&name, (presence_error *)odd), PRESENCE_INVALID);
    }
    CHECK(memcmp(buffer, untouched, sizeof buffer) == 0);
    CHECK(!name && length == 7 && !is_client_online("d"));
  }
  close_pair(both);
}

/* A program that was compiled for a later version passes a larger structure. */
static void request_arguments_of_later_versions_are_accepted_if_they_are_zero(void) {
  struct {
    presence_request_args known;
    uint64_t unknown;
  } later = {{sizeof later, "later", NULL, 0, NULL, 0, 1, NULL}, 0};
  peer self = open_peer();
  presence_stream *stream = NULL;
  presence_error error;
  OK(presence_request(self.conn, self.queue, &later.known, &stream, &error));
  expect_status(self.queue, PRESENCE_EVENT_ERROR, PRESENCE_NO_RESPONDERS);
  presence_stream_free(stream);

  later.unknown = 1;
  CHECK_STATUS(presence_request(self.conn, self.queue, &later.known, &stream, &error), PRESENCE_INVALID);
  CHECK(strstr(error.message, "args has a field after its first"));
  const size_t wrong[] = {0, sizeof later.known - 1, 4097, SIZE_MAX};
  for (int i = 0; i < 4; i++) {
    later.known.size = wrong[i];
    CHECK_STATUS(presence_request(self.conn, self.queue, &later.known, &stream, &error), PRESENCE_INVALID);
    CHECK(strstr(error.message, "it must be sizeof(struct presence_request_args)"));
  }
  close_peer(self);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(role_four_gib_are_refused_without_a_copy);
  RUN_ON_BOTH(extreme_timeouts);
  RUN_ON_BOTH(lengths_beyond_memory_are_refused);
  RUN_ON_BOTH(four_gib_are_refused_without_a_copy);
  RUN_ON_BOTH(byte_pointers_need_no_alignment);
  RUN(misaligned_pointers_are_refused);
  RUN(request_arguments_of_later_versions_are_accepted_if_they_are_zero);
  return 0;
}
