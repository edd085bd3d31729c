/* Checks that a process uses no more resources than before. */
#ifndef USAGE_H
#define USAGE_H

#include "check.h"
#include <dirent.h>

/* What must not grow: resident memory, descriptors and threads of this process. */
typedef struct usage {
  long kib;
  int fds, threads;
} usage;

static inline int count_entries(const char *path) {
  int count = 0;
  DIR *directory = opendir(path);
  CHECK(directory);
  while (readdir(directory)) count++;
  closedir(directory);
  return count;
}

static inline usage use_now(void) {
  usage now = {0, count_entries("/proc/self/fd"), count_entries("/proc/self/task")};
  FILE *statm = fopen("/proc/self/statm", "r");
  CHECK(statm);
  CHECK_EQ(fscanf(statm, "%*d %ld", &now.kib), 1);
  fclose(statm);
  now.kib *= sysconf(_SC_PAGESIZE) / 1024;
  return now;
}

/* Checks that usage is as before, except for memory that allocators keep. */
static inline void check_no_growth(usage before) {
  usage now = use_now();
  CHECK_EQ(now.fds, before.fds);
  CHECK_EQ(now.threads, before.threads);
  CHECK(now.kib < before.kib + 8192 || (fprintf(stderr, "from %ld to %ld KiB: ", before.kib, now.kib), 0));
}

#endif
