/* Client ids, marks, sessions, and the events of a watching queue, without a server. */
#include "peer.h"

static void check_online(const char *id, bool is) {
  CHECK_EQ(is_client_online(id), is);
  CHECK_EQ(presence_is_online(id, strlen(id)), is);
}

static void marks_set_and_clear_presence(void) {
  check_online("a", false);
  OK(mark_client_online("a"));
  OK(mark_client_online("a"));
  OK(presence_mark_online("ab", 1)); /* the same client */
  check_online("a", true);
  CHECK_EQ(presence_online_count(), 1);
  OK(mark_client_online("b"));
  CHECK_EQ(presence_online_count(), 2);
  OK(mark_client_offline("a"));
  OK(mark_client_offline("a"));
  check_online("a", false);
  check_online("b", true);
  OK(presence_mark_offline("b", 1));
  OK(mark_client_offline("never seen"));
}

static void empty_id_is_always_online(void) {
  presence_session *session;
  check_online("", true);
  OK(mark_client_online(""));
  CHECK_EQ(presence_online_count(), 0);
  OK(mark_client_offline(""));
  check_online("", true);
  OK(presence_session_open("", 0, &session));
  CHECK_EQ(presence_online_count(), 0);
  presence_session_close(session);
}

static void valid_ids_are_accepted(void) {
  char longest[1025];
  memset(longest, 'x', 1024);
  longest[1024] = '\0';
  const char *good[] = {
      "x", longest, " ", "with space", "a/b.c*>", "\xc3\xbc\xe5\xae\xa2\xe6\x88\xb7", "\xf0\x9f\x8e\x88",
      "twenty-three bytes long", "twenty-four bytes, so so", "twenty-five bytes, so so.",
  };
  int count = sizeof good / sizeof *good;
  for (int i = 0; i < count; i++) OK(mark_client_online(good[i]));
  CHECK_EQ(presence_online_count(), count);
  for (int i = 0; i < count; i++) {
    check_online(good[i], true);
    OK(mark_client_offline(good[i]));
    check_online(good[i], false);
  }
}

static void check_bad(const char *id, size_t length) {
  presence_session *session = NULL;
  CHECK_STATUS(presence_mark_online(id, length), PRESENCE_INVALID);
  CHECK_STATUS(presence_mark_offline(id, length), PRESENCE_INVALID);
  CHECK(!presence_is_online(id, length));
  CHECK_STATUS(presence_session_open(id, length, &session), PRESENCE_INVALID);
  CHECK(!session);
  if (!memchr(id, '\0', length)) { /* it can be passed as a C string, too */
    char text[2048];
    memcpy(text, id, length);
    text[length] = '\0';
    CHECK_STATUS(mark_client_online(text), PRESENCE_INVALID);
    CHECK_STATUS(mark_client_offline(text), PRESENCE_INVALID);
    CHECK(!is_client_online(text));
  }
  CHECK_EQ(presence_online_count(), 0);
}

static void invalid_ids_are_refused(void) {
  char too_long[1025];
  memset(too_long, 'x', sizeof too_long);
  check_bad(too_long, sizeof too_long);
  const char *not_utf8[] = {"\xff", "a\xffz", "\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80"};
  for (int i = 0; i < 6; i++) check_bad(not_utf8[i], strlen(not_utf8[i]));
  for (char c = 0; c < 0x20; c++) {
    char id[] = {'a', c, 'z'};
    check_bad(id, 3);
  }
  check_bad("\x7f", 1);
  check_bad("a\xc2\x85", 3); /* a control character beyond ASCII */
}

static void many_ids_are_marked_in_one_call(void) {
  enum { COUNT = 40000 }; /* more than are sorted at a time */
  static char ids[COUNT * 5];
  static size_t lens[COUNT];
  for (int i = 0; i < COUNT; i++) {
    char id[6];
    snprintf(id, sizeof id, "%05d", i);
    memcpy(ids + i * 5, id, 5);
    lens[i] = 5;
  }
  presence_error error;
  error.status = 1;
  OK(presence_mark_many(true, ids, lens, COUNT, &error));
  OK(presence_mark_many(true, ids, lens, COUNT / 2, NULL));
  CHECK_EQ(presence_online_count(), COUNT);
  for (int i = 0; i < COUNT; i++) CHECK(presence_is_online(ids + i * 5, 5));
  OK(presence_mark_many(false, ids + 5, lens + 1, COUNT - 1, &error));
  CHECK_EQ(presence_online_count(), 1);
  check_online("00000", true);
  CHECK_EQ(error.status, 1);

  /* The empty id has no effect. The same id twice is the same client. */
  size_t mixed[] = {0, 3, 0, 3, 1024, 0};
  char data[1030] = "abcabc";
  memset(data + 6, 'x', 1024);
  OK(presence_mark_many(true, data, mixed, 6, NULL));
  CHECK_EQ(presence_online_count(), 3);
  check_online("abc", true);
  OK(presence_mark_many(false, data, mixed, 6, NULL));
  OK(presence_mark_many(true, NULL, NULL, 0, NULL));
  OK(presence_mark_many(true, NULL, mixed, 1, NULL));
  CHECK_EQ(presence_online_count(), 1);

  /* One that is invalid is named, and nothing changes. */
  size_t three[] = {5, 1, 2}, long_one[] = {1, 1025};
  char much[1026];
  memset(much, 'x', sizeof much);
  for (int online = 0; online < 2; online++) {
    CHECK_STATUS(presence_mark_many(online, "00000ab\n", three, 3, &error), PRESENCE_INVALID);
    CHECK_EQ(error.status, PRESENCE_INVALID);
    CHECK(strncmp(error.message, "id 2: client id has the control character", 40) == 0);
    CHECK_STATUS(presence_mark_many(online, much, long_one, 2, &error), PRESENCE_INVALID);
    CHECK(strcmp(error.message, "id 1: client id is 1025 bytes; the limit is 1024") == 0);
    CHECK_STATUS(presence_mark_many(online, "\xc3\xbc", long_one, 1, NULL), PRESENCE_INVALID); /* half a character */
  }
  CHECK_EQ(presence_online_count(), 1);
  check_online("00000", true);
  OK(mark_client_offline("00000"));
}

static void last_session_ends_presence(void) {
  presence_session *first, *second, *late;
  OK(presence_session_open("s", 1, &first));
  OK(presence_session_open("s", 1, &second));
  CHECK_EQ(presence_online_count(), 1);
  presence_session_close(first);
  presence_session_close(first); /* recognised as stale: it closes no other session */
  check_online("s", true);
  presence_session_close(second);
  check_online("s", false);

  /* A mark outlasts sessions. */
  OK(presence_session_open("s", 1, &first));
  OK(mark_client_online("s"));
  presence_session_close(first);
  check_online("s", true);
  OK(mark_client_offline("s"));

  /* An offline mark ends sessions; closing one of them later does not affect a new one. */
  OK(presence_session_open("s", 1, &first));
  OK(mark_client_offline("s"));
  check_online("s", false);
  OK(presence_session_open("s", 1, &late));
  presence_session_close(first);
  check_online("s", true);
  presence_session_close(late);
}

static void expect_presence(presence_queue *queue, int32_t kind, uint64_t tag, const char *client) {
  presence_event event = expect(queue, kind);
  CHECK(is_text(event.client, event.client_len, client));
  CHECK_EQ(event.tag, tag);
  CHECK_EQ(event.status, PRESENCE_OK);
  CHECK(!event.sender && !event.stream);
}

static void watchers_receive_presence_changes(void) {
  presence_queue *queue, *other;
  presence_session *session;
  OK(presence_queue_new(&queue));
  OK(presence_queue_new(&other));
  OK(mark_client_online("before"));
  OK(presence_watch(queue, 1));
  OK(presence_watch(queue, 7)); /* changes the tag */
  OK(presence_watch(other, 8));
  OK(mark_client_online("w"));
  OK(mark_client_online("w"));
  OK(presence_session_open("w", 1, &session));
  OK(mark_client_offline("w"));
  OK(mark_client_offline("w"));
  presence_session_close(session);
  OK(presence_session_open("v", 1, &session));
  presence_session_close(session);
  size_t lens[] = {6, 1, 6};
  OK(presence_mark_many(true, "before", lens, 1, NULL));
  OK(presence_mark_many(false, "beforexbefore", lens, 3, NULL));
  CHECK_STATUS(mark_client_online("\n"), PRESENCE_INVALID);
  for (int i = 0; i < 2; i++) {
    presence_queue *watcher = i == 0 ? queue : other;
    uint64_t tag = i == 0 ? 7 : 8;
    expect_presence(watcher, PRESENCE_EVENT_ONLINE, tag, "w");
    expect_presence(watcher, PRESENCE_EVENT_OFFLINE, tag, "w");
    expect_presence(watcher, PRESENCE_EVENT_ONLINE, tag, "v");
    expect_presence(watcher, PRESENCE_EVENT_OFFLINE, tag, "v");
    expect_presence(watcher, PRESENCE_EVENT_OFFLINE, tag, "before");
    expect_nothing(watcher);
    presence_queue_free(watcher);
  }
}

/* A queue holds at most 65,536 presence events; then a LOG event reports the loss. */
static void unread_presence_events_are_bounded(void) {
  enum { LIMIT = 65536, MAX = 1000 };
  presence_queue *queue;
  static presence_event events[MAX];
  OK(presence_queue_new(&queue));
  OK(presence_watch(queue, 3));
  for (int i = 0; i < LIMIT / 2 + 100; i++) {
    OK(mark_client_online("x"));
    OK(mark_client_offline("x"));
  }
  int presences = 0, logs = 0;
  int64_t count;
  while ((count = presence_queue_wait(queue, events, MAX, 0)) > 0) {
    for (int64_t i = 0; i < count; i++) {
      if (events[i].kind == PRESENCE_EVENT_LOG) {
        CHECK_EQ(events[i].status, PRESENCE_FULL);
        CHECK_EQ(events[i].tag, 3);
        CHECK_EQ(presences, LIMIT);
        logs++;
      } else {
        CHECK_EQ(events[i].kind, presences % 2 ? PRESENCE_EVENT_OFFLINE : PRESENCE_EVENT_ONLINE);
        presences++;
      }
    }
  }
  OK((int32_t)count);
  CHECK_EQ(presences, LIMIT);
  CHECK_EQ(logs, 1);
  OK(mark_client_online("x")); /* events are delivered again */
  expect_presence(queue, PRESENCE_EVENT_ONLINE, 3, "x");
  OK(mark_client_offline("x"));
  presence_queue_free(queue);
}

enum { THREADS = 4, ROUNDS = 5000 };

static void *mark_own_and_shared(void *name) {
  for (int i = 0; i < ROUNDS; i++) {
    presence_session *session;
    OK(mark_client_online((const char *)name));
    OK(mark_client_online("shared"));
    OK(presence_session_open("tabs", 4, &session));
    CHECK(is_client_online((const char *)name) && is_client_online("tabs"));
    OK(mark_client_offline("shared"));
    presence_session_close(session);
    OK(mark_client_offline((const char *)name));
    CHECK(!is_client_online((const char *)name));
  }
  return NULL;
}

static void threads_mark_different_clients(void) {
  pthread_t threads[THREADS];
  char names[THREADS][16];
  for (int i = 0; i < THREADS; i++) {
    snprintf(names[i], sizeof names[i], "own-%d", i);
    threads[i] = start_thread(mark_own_and_shared, names[i]);
  }
  for (int i = 0; i < THREADS; i++) join_thread(threads[i]);
}

static void *mark_shared(void *unused) {
  for (int i = 0; i < ROUNDS; i++) {
    OK(mark_client_online("shared"));
    OK(mark_client_offline("shared"));
  }
  return unused;
}

/* However the marks race, a watcher sees online and offline events in turn. */
static void online_and_offline_events_alternate(void) {
  presence_queue *queue;
  pthread_t threads[THREADS];
  presence_event event;
  OK(presence_queue_new(&queue));
  OK(presence_watch(queue, 0));
  for (int i = 0; i < THREADS; i++) threads[i] = start_thread(mark_shared, NULL);
  for (int i = 0; i < THREADS; i++) join_thread(threads[i]);
  int count = 0;
  while (presence_queue_wait(queue, &event, 1, 0) == 1) {
    CHECK_EQ(event.kind, count % 2 ? PRESENCE_EVENT_OFFLINE : PRESENCE_EVENT_ONLINE);
    count++;
  }
  CHECK(count >= 2 && count % 2 == 0 && count <= 2 * THREADS * ROUNDS);
  presence_queue_free(queue);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(marks_set_and_clear_presence);
  RUN(empty_id_is_always_online);
  RUN(valid_ids_are_accepted);
  RUN(invalid_ids_are_refused);
  RUN(many_ids_are_marked_in_one_call);
  RUN(last_session_ends_presence);
  RUN(watchers_receive_presence_changes);
  RUN(unread_presence_events_are_bounded);
  RUN(threads_mark_different_clients);
  RUN(online_and_offline_events_alternate);
  return 0;
}
