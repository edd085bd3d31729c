/* The queue: waits, wakeups, its file descriptor, the single waiter, and its end, without a server. */
#include "peer.h"
#include <fcntl.h>
#include <sched.h>
#include <sys/epoll.h>

static presence_queue *queue;

/* Opens a queue that receives an event for each `put`. */
static void open_queue(void) {
  OK(presence_queue_new(&queue));
  OK(presence_watch(queue, 0));
}

/* Puts one event into the queue. */
static void put(void) {
  if (is_client_online("q")) OK(mark_client_offline("q"));
  else OK(mark_client_online("q"));
}

static void close_queue(void) {
  presence_queue_free(queue);
  OK(mark_client_offline("q"));
}

static int64_t wait_for(size_t max, int64_t timeout_ms) {
  presence_event events[16];
  CHECK(max <= 16);
  return presence_queue_wait(queue, events, max, timeout_ms);
}

static void wait_honours_its_timeout(void) {
  open_queue();
  CHECK_EQ(wait_for(1, 0), 0);
  int64_t start = now_ms();
  CHECK_EQ(wait_for(1, 50), 0);
  CHECK(now_ms() - start >= 49);
  put();
  CHECK_EQ(wait_for(1, INT64_MAX), 1); /* beyond the clock's range */
  put();
  CHECK_EQ(wait_for(1, INT64_MIN), 1); /* negative: no limit */
  close_queue();
}

static void wait_without_capacity_is_refused(void) {
  presence_event event;
  open_queue();
  put();
  CHECK_STATUS(presence_queue_wait(queue, &event, 0, 0), PRESENCE_INVALID);
  CHECK_STATUS(presence_queue_wait(queue, NULL, 0, 0), PRESENCE_INVALID);
  CHECK_EQ(wait_for(1, 0), 1); /* it was not lost */
  close_queue();
}

static void wait_returns_as_many_as_fit(void) {
  open_queue();
  for (int i = 0; i < 40; i++) put();
  CHECK_EQ(wait_for(16, 0), 16);
  CHECK_EQ(wait_for(16, 0), 16);
  CHECK_EQ(wait_for(3, 0), 3);
  CHECK_EQ(wait_for(16, 0), 5);
  CHECK_EQ(wait_for(16, 0), 0);
  close_queue();
}

static void wake_before_the_wait_is_kept(void) {
  open_queue();
  presence_queue_wake(queue);
  presence_queue_wake(queue); /* both count as one */
  CHECK_EQ(wait_for(1, -1), 0);
  CHECK_EQ(wait_for(1, 0), 0);
  presence_queue_wake(queue);
  put();
  CHECK_EQ(wait_for(1, -1), 1); /* events come first */
  close_queue();
}

/* The result of wait_in_thread. */
static int64_t result;

/* Waits without limit. The check whether it waits already may be the one waiter for a moment. */
static void *wait_in_thread(void *unused) {
  do result = wait_for(1, -1);
  while (result == PRESENCE_BUSY);
  return unused;
}

/* Starts a thread that waits, and returns when it is the one waiter. */
static pthread_t start_waiting(void) {
  pthread_t thread = start_thread(wait_in_thread, NULL);
  while (wait_for(1, 0) != PRESENCE_BUSY) sched_yield();
  return thread;
}

static void second_waiter_is_busy(void) {
  open_queue();
  pthread_t thread = start_waiting();
  CHECK_STATUS(wait_for(1, -1), PRESENCE_BUSY);
  put();
  join_thread(thread);
  CHECK_EQ(result, 1);
  close_queue();
}

static void wake_ends_a_wait(void) {
  open_queue();
  pthread_t thread = start_waiting();
  presence_queue_wake(queue);
  join_thread(thread);
  CHECK_EQ(result, 0);
  close_queue();
}

static void free_ends_a_wait(void) {
  open_queue();
  pthread_t thread = start_waiting();
  presence_queue_free(queue);
  join_thread(thread);
  CHECK_STATUS(result, PRESENCE_CLOSED);
  CHECK_STATUS(wait_for(1, -1), PRESENCE_CLOSED);
  CHECK_STATUS(presence_queue_fd(queue), PRESENCE_CLOSED);
  CHECK_STATUS(presence_watch(queue, 0), PRESENCE_CLOSED);
  presence_queue_wake(queue);
  presence_queue_free(queue);
}

static bool is_readable(int fd) {
  struct pollfd source = {fd, POLLIN, 0};
  CHECK(poll(&source, 1, 0) >= 0);
  return source.revents != 0;
}

/* The descriptor is readable exactly while a wait would return at once. */
static void descriptor_is_readable_while_events_wait(void) {
  open_queue();
  put(); /* before presence_queue_fd was called */
  int fd = presence_queue_fd(queue);
  CHECK(fd >= 0);
  CHECK_EQ(presence_queue_fd(queue), fd);
  CHECK(is_readable(fd));
  CHECK_EQ(wait_for(1, 0), 1);
  CHECK(!is_readable(fd));
  for (int i = 0; i < 3; i++) put();
  CHECK_EQ(wait_for(2, 0), 2);
  CHECK(is_readable(fd));
  CHECK_EQ(wait_for(2, 0), 1);
  CHECK(!is_readable(fd));
  presence_queue_wake(queue);
  CHECK(is_readable(fd));
  CHECK_EQ(wait_for(1, 0), 0);
  CHECK(!is_readable(fd));
  CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
  close_queue();
}

static void *put_in_thread(void *unused) {
  put();
  return unused;
}

/* An event loop in epoll_wait, level-triggered or edge-triggered, is woken by another thread's event. */
static void epoll_reports_events(void) {
  for (int edge = 0; edge < 2; edge++) {
    open_queue();
    int loop = epoll_create1(EPOLL_CLOEXEC), fd = presence_queue_fd(queue);
    struct epoll_event source;
    memset(&source, 0, sizeof source);
    source.events = edge ? EPOLLIN | (uint32_t)EPOLLET : (uint32_t)EPOLLIN;
    CHECK_EQ(epoll_ctl(loop, EPOLL_CTL_ADD, fd, &source), 0);
    for (int round = 0; round < 100; round++) {
      CHECK_EQ(epoll_wait(loop, &source, 1, 0), 0);
      pthread_t thread = start_thread(put_in_thread, NULL);
      CHECK_EQ(epoll_wait(loop, &source, 1, TIMEOUT_MS), 1);
      CHECK_EQ(wait_for(16, 0), 1);
      join_thread(thread);
    }
    close(loop);
    close_queue();
  }
}

/* Events stay valid until the next wait, whatever happens to the queue's other events. */
static void events_stay_valid_until_the_next_wait(void) {
  presence_event event;
  open_queue();
  OK(mark_client_online("kept"));
  CHECK_EQ(presence_queue_wait(queue, &event, 1, 0), 1);
  OK(mark_client_offline("kept"));
  for (int i = 0; i < 1000; i++) put();
  CHECK(is_text(event.client, event.client_len, "kept"));
  close_queue();
}

int main(int argc, char **argv) {
  begin(argc, argv);
  RUN(wait_honours_its_timeout);
  RUN(wait_without_capacity_is_refused);
  RUN(wait_returns_as_many_as_fit);
  RUN(wake_before_the_wait_is_kept);
  RUN(second_waiter_is_busy);
  RUN(wake_ends_a_wait);
  RUN(free_ends_a_wait);
  RUN(descriptor_is_readable_while_events_wait);
  RUN(epoll_reports_events);
  RUN(events_stay_valid_until_the_next_wait);
  return 0;
}
