#include "forking.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREADS 20

/* Uses _exit because the exit handlers belong to the parent's threads. The line must fit into the 8 bits of an exit status. */
#define CHECK(is_true) \
  do { \
    if (!(is_true)) _exit(__LINE__); \
  } while (0)

static void *wait_until_freed(void *queue) {
  presence_event event;
  while (presence_queue_wait(queue, &event, 1, -1) >= 0) continue;
  return NULL;
}

static void use_marks(presence_queue *queue) {
  presence_event event;
  CHECK(presence_online_count() == 0);
  CHECK(presence_watch(queue, 0) == PRESENCE_OK);
  CHECK(mark_client_online("child's") == PRESENCE_OK);
  CHECK(is_client_online("child's"));
  CHECK(presence_queue_wait(queue, &event, 1, -1) == 1 && event.kind == PRESENCE_EVENT_ONLINE);
  CHECK(mark_client_offline("child's") == PRESENCE_OK);
  CHECK(presence_queue_wait(queue, &event, 1, -1) == 1 && event.kind == PRESENCE_EVENT_OFFLINE);
  CHECK(presence_queue_wait(queue, &event, 1, 1) == 0);
  CHECK(presence_online_count() == 0);
}

static void use_threads(void) {
  pthread_t threads[THREADS];
  presence_queue *queues[THREADS];
  for (int i = 0; i < THREADS; i++) {
    CHECK(presence_queue_new(&queues[i]) == PRESENCE_OK);
    CHECK(pthread_create(&threads[i], NULL, wait_until_freed, queues[i]) == 0);
  }
  for (int i = 0; i < THREADS; i++) {
    presence_queue_free(queues[i]);
    CHECK(pthread_join(threads[i], NULL) == 0);
  }
}

static void child(const char *url, presence_conn *of_parent) {
  presence_queue *queue;
  presence_conn *conn = NULL;
  presence_stats stats;
  presence_error error;
  CHECK(presence_queue_new(&queue) == PRESENCE_OK);
  use_marks(queue);
  use_threads();
  presence_queue_free(queue);
  CHECK(presence_connect(url, NULL, &conn, &error) == PRESENCE_FORKED && !conn);
  CHECK(strstr(error.message, "fork"));
  CHECK(presence_conn_stats(of_parent, &stats) == PRESENCE_FORKED);
  CHECK(presence_close(of_parent, -1) == PRESENCE_FORKED);
}

int fork_and_use(const char *url, presence_conn *of_parent) {
  pid_t pid = fork();
  if (pid < 0) return -errno;
  if (pid == 0) {
    /* Go's handler of this signal needs Go's threads, which do not exist in the child. */
    signal(SIGALRM, SIG_DFL);
    alarm(60);
    child(url, of_parent);
    _exit(0);
  }
  int status;
  while (waitpid(pid, &status, 0) < 0) {
    if (errno != EINTR) return -errno;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}
