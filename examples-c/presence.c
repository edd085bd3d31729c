/*
 * Who is online? Marks, sessions and watches: presence in one process, without a server.
 *
 * A client is online while it is marked so, has an open session, or has a running stream (see worker.c and gateway.c).
 */
#include <nats_presence.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Every call that can fail returns PRESENCE_OK or a negative presence_status. */
static void check(const char *what, int32_t status) {
  if (status == PRESENCE_OK) return;
  fprintf(stderr, "%s: %s\n", what, presence_status_text(status));
  exit(1);
}

static presence_session *open_session(const char *id) {
  presence_session *session;
  check("presence_session_open", presence_session_open(id, strlen(id), &session));
  return session;
}

/* Takes all pending events. A timeout of 0 does not wait for more. */
static void print_events(presence_queue *queue) {
  presence_event events[8];
  int64_t count;
  while ((count = presence_queue_wait(queue, events, 8, 0)) > 0) {
    for (int64_t i = 0; i < count; i++) {
      const presence_event *event = &events[i];
      /* Text in events has a length and no NUL, and is valid until the next wait on the queue. */
      if (event->kind == PRESENCE_EVENT_ONLINE || event->kind == PRESENCE_EVENT_OFFLINE)
        printf("  %.*s went %s\n", (int)event->client_len, event->client,
               event->kind == PRESENCE_EVENT_ONLINE ? "online" : "offline");
    }
  }
  if (count < 0) check("presence_queue_wait", (int32_t)count);
}

static void show(presence_queue *queue, const char *what) {
  printf("%s: alice is %s, %llu online\n", what, is_client_online("alice") ? "online" : "offline",
         (unsigned long long)presence_online_count());
  print_events(queue);
}

int main(void) {
  printf("nats-presence %s\n", presence_version());

  /* Events arrive at a queue; this one receives presence changes. */
  presence_queue *queue;
  check("presence_queue_new", presence_queue_new(&queue));
  check("presence_watch", presence_watch(queue, 0));
  show(queue, "at first");

  check("mark_client_online", mark_client_online("alice"));
  show(queue, "marked online");

  check("mark_client_offline", mark_client_offline("alice"));
  show(queue, "marked offline");

  /* Two tabs of one browser are two sessions: alice is online until the last of them is closed. */
  presence_session *tab = open_session("alice"), *other_tab = open_session("alice");
  show(queue, "two sessions");
  presence_session_close(tab);
  show(queue, "one session");
  presence_session_close(other_tab);
  show(queue, "no session");

  /* Invalid input is refused and changes nothing. The empty id stands for "no client" and is always online. */
  printf("an id with a line break: %s\n", presence_status_text(mark_client_online("alice\n")));
  printf("the empty id is %s\n", is_client_online("") ? "online" : "offline");

  presence_queue_free(queue);
  return 0;
}
