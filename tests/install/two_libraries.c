/* Two static libraries made by Rust in one program: both panic, both catch it, and nats-presence works afterwards. */
#define _GNU_SOURCE /* clockid_t, syscall */
#include <errno.h>
#include <nats_presence.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int other_panics(void);

static atomic_bool clock_is_broken;

/* Rust panics if the clock fails. */
int clock_gettime(clockid_t clock, struct timespec *time) {
  if (!clock_is_broken) return (int)syscall(SYS_clock_gettime, clock, time);
  errno = EINVAL;
  return -1;
}

int main(void) {
  presence_queue *queue;
  presence_event event;

  if (presence_queue_new(&queue) != PRESENCE_OK) return 1;
  clock_is_broken = 1;
  int64_t in_a_panic = presence_queue_wait(queue, &event, 1, 10);
  clock_is_broken = 0;
  if (in_a_panic != PRESENCE_INTERNAL) {
    fprintf(stderr, "presence_queue_wait returns %lld with a broken clock\n", (long long)in_a_panic);
    return 1;
  }
  if (other_panics() != 1) return 2;
  if (presence_queue_wait(queue, &event, 1, 10) != 0) return 3;
  if (presence_mark_online("client", 6) != PRESENCE_OK || !presence_is_online("client", 6)) return 4;
  presence_queue_free(queue);
  puts(presence_version());
  return 0;
}
