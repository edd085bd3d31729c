/* Ten thousand short-lived threads make calls, thousands of children are forked, and processes connect and exit with
 * running streams. Nothing is left of them. */
#include "peer.h"
#include "usage.h"

enum { AT_ONCE = 20 };

static pair both;

/* Each of many threads makes a few calls and ends. */
static void *call_in(void *number) {
  char id[24];
  presence_event event;
  presence_session *session;
  snprintf(id, sizeof id, "thread-%d", *(int *)number);
  OK(mark_client_online(id));
  OK(presence_session_open(id, strlen(id), &session));
  OK(presence_sender_send_wait(both.sender, id, strlen(id), TIMEOUT_MS));
  int64_t count = presence_queue_wait(both.worker.queue, &event, 1, 0);
  CHECK(count == PRESENCE_BUSY || count == 0 || event.kind == PRESENCE_EVENT_WRITABLE);
  presence_session_close(session);
  OK(mark_client_offline(id));
  CHECK(!is_client_online(id));
  return NULL;
}

static void *take_data(void *count) {
  for (int i = 0; i < *(int *)count; i++) expect(both.gateway.queue, PRESENCE_EVENT_DATA);
  return NULL;
}

static void run_threads(int count) {
  pthread_t threads[AT_ONCE], reader = start_thread(take_data, &count);
  int numbers[AT_ONCE];
  for (int i = 0; i < count; i += AT_ONCE) {
    for (int k = 0; k < AT_ONCE; k++) {
      numbers[k] = i + k;
      threads[k] = start_thread(call_in, &numbers[k]);
    }
    for (int k = 0; k < AT_ONCE; k++) join_thread(threads[k]);
  }
  join_thread(reader);
}

static void ten_thousand_threads_leave_nothing(void) {
  both = open_pair("c");
  run_threads(1000);
  usage before = use_now();
  int64_t since = now_us();
  run_threads(10000);
  if (is_long) FIGURE("10,000 threads that call in and end: %.1f s", (double)(now_us() - since) / 1e6);
  check_no_growth(before);
  close_pair(both);
}

/* Runs in a child of a process that has connected. */
static void be_a_child(int number) {
  alarm(60);
  running = "a forked child";
  CHECK_EQ(presence_online_count(), 0);
  OK(mark_client_online("own"));
  CHECK_STATUS(send_text(both.sender, "x"), PRESENCE_FORKED);
  OK(mark_client_offline("own"));
  if (number % 2) exit(number % 100);
  presence_sender_free(both.sender);
  CHECK_STATUS(presence_close(both.worker.conn, -1), PRESENCE_FORKED);
  _exit(number % 100);
}

static void run_children(int count) {
  for (int i = 0; i < count; i += AT_ONCE) {
    pid_t children[AT_ONCE];
    for (int k = 0; k < AT_ONCE; k++) {
      children[k] = fork();
      CHECK(children[k] >= 0);
      if (children[k] == 0) be_a_child(i + k);
    }
    OK(send_text(both.sender, "goes on")); /* while the children run */
    expect_data(both.gateway.queue, "goes on");
    for (int k = 0; k < AT_ONCE; k++) expect_exit(children[k], (i + k) % 100);
  }
}

static void thousands_of_forks_leave_nothing(void) {
  both = open_pair("c");
  run_children(100);
  usage before = use_now();
  int64_t since = now_us();
  run_children(is_long ? 10000 : 5000);
  if (is_long) FIGURE("10,000 forks of a connected process, whose children call in and exit: %.1f s", (double)(now_us() - since) / 1e6);
  check_no_growth(before);
  close_pair(both);
}

/* Runs in a child of a process that has not connected: it connects, and exits while a thread sends. */
static void *send_for_ever(void *unused) {
  while (presence_sender_send_wait(both.sender, "x", 1, -1) == PRESENCE_OK) continue;
  return unused;
}

static void connect_and_exit(int number) {
  alarm(60);
  running = "a child that connects";
  char subject[40];
  snprintf(subject, sizeof subject, "thousands.%d", (int)getpid());
  both.worker = both.gateway = open_peer();
  both.service = serve(both.worker, subject);
  both.stream = request(both.gateway, subject, "c", 1);
  both.sender = accept_request(both.worker);
  start_thread(send_for_ever, NULL);
  if (number % 2) expect(both.gateway.queue, PRESENCE_EVENT_DATA);
  exit(number % 100);
}

static void role_exits(void) {
  int count = is_long ? 10000 : 300;
  usage before = use_now();
  int64_t since = now_us();
  for (int i = 0; i < count; i += AT_ONCE) {
    pid_t children[AT_ONCE];
    for (int k = 0; k < AT_ONCE; k++) {
      children[k] = fork();
      CHECK(children[k] >= 0);
      if (children[k] == 0) connect_and_exit(i + k);
    }
    for (int k = 0; k < AT_ONCE; k++) expect_exit(children[k], (i + k) % 100);
  }
  if (is_long) FIGURE("10,000 processes that connect, stream, and exit in the middle: %.1f s", (double)(now_us() - since) / 1e6);
  check_no_growth(before);
}

/* In a process that has not connected, so that its children may. */
static void hundreds_of_exits_leave_nothing(void) { expect_exit(start("role_exits"), 0); }

int main(int argc, char **argv) {
  begin(argc, argv);
  ROLE(role_exits);
  RUN_ON_BOTH(ten_thousand_threads_leave_nothing);
  RUN(thousands_of_forks_leave_nothing);
  RUN(hundreds_of_exits_leave_nothing);
  return 0;
}
