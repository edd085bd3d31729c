/* The header can be included twice; the layout of its structs and its numbers are fixed; its version is the
 * library's. */
#include <nats_presence.h>
#include <nats_presence.h>

#include "check.h"
#include <assert.h>
#include <stddef.h>

#if UINTPTR_MAX == UINT64_MAX
static_assert(sizeof(presence_event) == 96, "presence_event");
static_assert(offsetof(presence_event, kind) == 0, "kind");
static_assert(offsetof(presence_event, status) == 4, "status");
static_assert(offsetof(presence_event, tag) == 8, "tag");
static_assert(offsetof(presence_event, sender) == 16, "sender");
static_assert(offsetof(presence_event, stream) == 24, "stream");
static_assert(offsetof(presence_event, client) == 32, "client");
static_assert(offsetof(presence_event, client_len) == 40, "client_len");
static_assert(offsetof(presence_event, subject) == 48, "subject");
static_assert(offsetof(presence_event, subject_len) == 56, "subject_len");
static_assert(offsetof(presence_event, data) == 64, "data");
static_assert(offsetof(presence_event, data_len) == 72, "data_len");
static_assert(offsetof(presence_event, error_code) == 80, "error_code");
static_assert(offsetof(presence_event, reserved) == 84, "reserved");
#endif

static_assert(sizeof(presence_error) == 512, "presence_error");
static_assert(offsetof(presence_error, status) == 0, "status");
static_assert(offsetof(presence_error, message) == 4, "message");
static_assert(sizeof(((presence_error *)0)->message) == PRESENCE_ERROR_MESSAGE, "message");

#if UINTPTR_MAX == UINT64_MAX
static_assert(sizeof(presence_request_args) == 64, "presence_request_args");
static_assert(offsetof(presence_request_args, size) == 0, "size");
static_assert(offsetof(presence_request_args, subject) == 8, "subject");
static_assert(offsetof(presence_request_args, data) == 16, "data");
static_assert(offsetof(presence_request_args, data_len) == 24, "data_len");
static_assert(offsetof(presence_request_args, client) == 32, "client");
static_assert(offsetof(presence_request_args, client_len) == 40, "client_len");
static_assert(offsetof(presence_request_args, tag) == 48, "tag");
static_assert(offsetof(presence_request_args, config) == 56, "config");
#endif

static_assert(sizeof(presence_stats) == 160, "presence_stats");
static_assert(offsetof(presence_stats, connected) == 0, "connected");
static_assert(offsetof(presence_stats, connects) == 8, "connects");
static_assert(offsetof(presence_stats, streams) == 16, "streams");
static_assert(offsetof(presence_stats, senders) == 24, "senders");
static_assert(offsetof(presence_stats, requests) == 32, "requests");
static_assert(offsetof(presence_stats, requests_busy) == 40, "requests_busy");
static_assert(offsetof(presence_stats, requests_ignored) == 48, "requests_ignored");
static_assert(offsetof(presence_stats, messages_out) == 56, "messages_out");
static_assert(offsetof(presence_stats, messages_in) == 64, "messages_in");
static_assert(offsetof(presence_stats, messages_ignored) == 72, "messages_ignored");
static_assert(offsetof(presence_stats, offline_out) == 80, "offline_out");
static_assert(offsetof(presence_stats, offline_in) == 88, "offline_in");
static_assert(offsetof(presence_stats, bytes_waiting) == 96, "bytes_waiting");
static_assert(offsetof(presence_stats, lanes) == 104, "lanes");
static_assert(offsetof(presence_stats, reserved) == 112, "reserved");

static_assert(PRESENCE_OK == 0 && PRESENCE_INVALID == -1 && PRESENCE_OFFLINE == -2 && PRESENCE_CLOSED == -3, "status");
static_assert(PRESENCE_CANCELLED == -4 && PRESENCE_FULL == -5 && PRESENCE_TOO_LARGE == -6, "status");
static_assert(PRESENCE_RESERVED == -7 && PRESENCE_DISCONNECTED == -8 && PRESENCE_PEER_GONE == -9, "status");
static_assert(PRESENCE_NO_RESPONDERS == -10 && PRESENCE_BUSY == -11 && PRESENCE_TIMEOUT == -12, "status");
static_assert(PRESENCE_REMOTE == -13 && PRESENCE_FORKED == -14 && PRESENCE_INTERNAL == -15, "status");

static_assert(PRESENCE_EVENT_REQUEST == 1 && PRESENCE_EVENT_DATA == 2 && PRESENCE_EVENT_END == 3, "kind");
static_assert(PRESENCE_EVENT_ERROR == 4 && PRESENCE_EVENT_STOPPED == 5 && PRESENCE_EVENT_WRITABLE == 6, "kind");
static_assert(PRESENCE_EVENT_ONLINE == 7 && PRESENCE_EVENT_OFFLINE == 8 && PRESENCE_EVENT_CONNECTED == 9, "kind");
static_assert(PRESENCE_EVENT_DISCONNECTED == 10 && PRESENCE_EVENT_LOG == 11, "kind");

/* Fails to compile if a field changes its type. */
static void fields_keep_their_types(void) {
  presence_event event;
  memset(&event, 0, sizeof event);
  int32_t *status = &event.kind;
  uint64_t *tag = &event.tag;
  presence_sender **sender = &event.sender;
  presence_stream **stream = &event.stream;
  const char **text = &event.client;
  const uint8_t **data = &event.data;
  size_t *length = &event.data_len;
  CHECK(*status == 0 && *tag == 0 && !*sender && !*stream && !*text && !*data && *length == 0);
}

static void status_texts_are_distinct(void) {
  for (int32_t status = PRESENCE_INTERNAL; status <= PRESENCE_OK; status++) {
    const char *text = presence_status_text(status);
    CHECK(text && *text && strcmp(text, "unknown status") != 0);
    for (int32_t other = PRESENCE_INTERNAL; other < status; other++) CHECK(strcmp(text, presence_status_text(other)) != 0);
  }
  int32_t unknown[] = {1, PRESENCE_INTERNAL - 1, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) CHECK(strcmp(presence_status_text(unknown[i]), "unknown status") == 0);
}

static void event_kinds_have_their_names(void) {
  const char *const names[] = {"REQUEST", "DATA",    "END",       "ERROR",        "STOPPED", "WRITABLE",
                               "ONLINE",  "OFFLINE", "CONNECTED", "DISCONNECTED", "LOG"};
  for (int32_t kind = PRESENCE_EVENT_REQUEST; kind <= PRESENCE_EVENT_LOG; kind++)
    CHECK(strcmp(presence_event_kind_text(kind), names[kind - 1]) == 0);
  int32_t unknown[] = {0, PRESENCE_EVENT_LOG + 1, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) CHECK(strcmp(presence_event_kind_text(unknown[i]), "unknown kind") == 0);
}

static void version_is_that_of_cargo_toml(void) {
  int major, minor, patch, length;
  CHECK_EQ(sscanf(presence_version(), "%d.%d.%d%n", &major, &minor, &patch, &length), 3);
  CHECK_EQ(presence_version()[length], '\0');
  const char *expected = getenv("VERSION"); /* the version in Cargo.toml, set by tests/c/run */
  CHECK(expected && strcmp(presence_version(), expected) == 0);
  CHECK(strcmp(PRESENCE_VERSION, expected) == 0);
  CHECK(major == PRESENCE_VERSION_MAJOR && minor == PRESENCE_VERSION_MINOR && patch == PRESENCE_VERSION_PATCH);
  CHECK_EQ(PRESENCE_VERSION_NUMBER, major * 10000 + minor * 100 + patch);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(fields_keep_their_types);
  RUN(status_texts_are_distinct);
  RUN(event_kinds_have_their_names);
  RUN(version_is_that_of_cargo_toml);
  return 0;
}
