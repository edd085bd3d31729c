/*
 * Assertions, and how tests run. A program is started with the URL of its own nats-server, and runs its tests in order:
 *
 *   program URL [TEST]
 */
#ifndef CHECK_H
#define CHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <nats_presence.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Timeout in ms for anything that must happen. It usually takes a few. */
#define TIMEOUT_MS 20000

static const char *url;
static const char *selected_test; /* the one test to run; NULL: all */
static const char *running = "main";
static const char *level = ""; /* printed after the test's name */
static bool is_long;           /* the long form, which prints figures: `tests/c/run --long` */

static inline void begin_failure(const char *file, int line) {
  fprintf(stderr, "%s:%d: %s%s: ", file, line, running, level);
}

/* Exits without running atexit handlers: the test may be about them. */
static inline void end_failure(void) {
  fputc('\n', stderr);
  _exit(1);
}

#define CHECK(condition)                       \
  do {                                         \
    if (!(condition)) {                        \
      begin_failure(__FILE__, __LINE__);       \
      fputs("failed: " #condition, stderr);    \
      end_failure();                           \
    }                                          \
  } while (0)

#define CHECK_EQ(actual, expected)                                                              \
  do {                                                                                          \
    long long is_ = (long long)(actual), should_be_ = (long long)(expected);                    \
    if (is_ != should_be_) {                                                                    \
      begin_failure(__FILE__, __LINE__);                                                        \
      fprintf(stderr, "%s is %lld, not %s (%lld)", #actual, is_, #expected, should_be_);        \
      end_failure();                                                                            \
    }                                                                                           \
  } while (0)

/* Checks that a call returned this status. */
#define CHECK_STATUS(call, expected)                                                                             \
  do {                                                                                                           \
    long long is_ = (long long)(call), should_be_ = (long long)(expected);                                       \
    if (is_ != should_be_) {                                                                                     \
      begin_failure(__FILE__, __LINE__);                                                                         \
      fprintf(stderr, "%s is %lld (%s), not %s", #call, is_, presence_status_text((int32_t)is_), #expected);     \
      end_failure();                                                                                             \
    }                                                                                                            \
  } while (0)

#define OK(call) CHECK_STATUS(call, PRESENCE_OK)

/* Checks that a message contains this text. */
#define CHECK_CONTAINS(message, part)                                                 \
  do {                                                                             \
    if (!strstr((message), (part))) {                                              \
      begin_failure(__FILE__, __LINE__);                                           \
      fprintf(stderr, "\"%s\" does not contain \"%s\"", (message), (part));           \
      end_failure();                                                               \
    }                                                                              \
  } while (0)

/* Call this first in main. A program that hangs is ended by SIGALRM after 100 s, or after CHECK_SECONDS. */
static inline void begin(int argc, char **argv) {
  const char *seconds = getenv("CHECK_SECONDS");
  is_long = getenv("LONG") != NULL;
  alarm(seconds ? (unsigned)atoi(seconds) : is_long ? 280 : 100);
  url = argc > 1 ? argv[1] : "nats://127.0.0.1:4222";
  selected_test = argc > 2 ? argv[2] : NULL;
  running = selected_test ? selected_test : "main";
}

static inline bool is_selected(const char *test) { return selected_test && strcmp(selected_test, test) == 0; }

/* Runs a test, which must leave no client online. */
#define RUN(test)                               \
  do {                                          \
    if (!selected_test || is_selected(#test)) {    \
      running = #test;                          \
      test();                                   \
      CHECK_EQ(presence_online_count(), 0);     \
    }                                           \
  } while (0)

/* Runs a test twice: with lanes, and with all streams on level 0. */
#define RUN_ON_BOTH(test)                       \
  do {                                          \
    CHECK_EQ(setenv("LANES", "true", 1), 0);    \
    RUN(test);                                  \
    RUN_ON_LEVEL_0(test);                       \
  } while (0)

#define RUN_ON_LEVEL_0(test)                    \
  do {                                          \
    CHECK_EQ(setenv("LANES", "false", 1), 0);   \
    level = " on level 0";                      \
    RUN(test);                                  \
    level = "";                                 \
    CHECK_EQ(setenv("LANES", "true", 1), 0);    \
  } while (0)

/* Runs the part of a test that needs a process of its own. */
#define ROLE(role)                       \
  do {                                   \
    if (is_selected(#role)) role();     \
  } while (0)

/* Prints a figure of the long form. */
#define FIGURE(...)                    \
  do {                                 \
    printf("figure: " __VA_ARGS__);    \
    printf("%s\n", level);             \
    fflush(stdout);                    \
  } while (0)

static inline int64_t now_us(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static inline int64_t now_ms(void) { return now_us() / 1000; }

/* Starts this program again, for one of its tests or roles. */
static inline pid_t start(const char *test) {
  pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    execl("/proc/self/exe", "test", url, test, (char *)NULL);
    _exit(127);
  }
  return child;
}

/* Waits for a process, which must exit with this code. */
static inline void expect_exit(pid_t child, int code) {
  int status;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(!WIFSIGNALED(status) || (fprintf(stderr, "signal %d: ", WTERMSIG(status)), 0));
  CHECK_EQ(WEXITSTATUS(status), code);
}

#endif
