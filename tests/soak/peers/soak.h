/*
 * Shared by both peers in C. The commands are described in `run`, in the folder above.
 */
#ifndef SOAK_H
#define SOAK_H

#include <malloc.h>
#include <nats_presence.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { HEAD = 16, LARGEST = 1 << 16, SHIFTS = 4096, FURTHER = 10, STATS_MS = 500 };

static inline int64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static inline uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/* Message `number` of the stream with this key: both, then bytes derived from them. */
static inline const unsigned char *content(uint64_t key, uint64_t number, size_t size) {
  static unsigned char table[LARGEST + SHIFTS], message[LARGEST];
  if (!table[0]) {
    for (size_t i = 0; i < sizeof table; i++) table[i] = (unsigned char)(scramble(i / 8) >> (i % 8 * 8));
  }
  uint64_t head[2] = {key, number};
  memcpy(message, head, HEAD);
  memcpy(message + HEAD, table + (key + number) % SHIFTS, size - HEAD);
  return message;
}

static inline void check(int32_t status, const char *what, const char *why) {
  if (status == PRESENCE_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, presence_status_text(status), why);
  exit(1);
}

/* Opens a connection with the options "KEY=VALUE,..."; the one on level 0 leaves announcements to the other. */
static inline presence_conn *open_conn(const char *url, const char *options, bool has_lanes) {
  presence_conn *conn;
  presence_error error = {0};
  presence_config *config = presence_config_new();
  char *copy = strdup(options), *rest = copy;
  for (char *value; (value = strsep(&rest, ","));) {
    char *key = strsep(&value, "=");
    check(presence_config_set(config, key, value), key, "option");
  }
  if (!has_lanes) {
    check(presence_config_set(config, "lanes", "false"), "lanes", "option");
    check(presence_config_set(config, "announce", "never"), "announce", "option");
  }
  check(presence_connect(url, config, &conn, &error), "connect", error.message);
  presence_config_free(config);
  free(copy);
  return conn;
}

/* Prints statistics, with the bytes of the heap in use, as an event of this name. */
static inline void tell_stats(const char *event, presence_conn *conns[2], const char *more) {
  presence_stats sum = {.connects = 0};
  for (int i = 0; i < 2; i++) {
    presence_stats s;
    check(presence_conn_stats(conns[i], &s), "stats", "");
    sum.connected += s.connected, sum.connects += s.connects, sum.streams += s.streams, sum.senders += s.senders;
    sum.lanes += s.lanes, sum.bytes_waiting += s.bytes_waiting;
  }
  struct mallinfo2 heap = mallinfo2();
#define NUMBER(x) (unsigned long long)(x)
  printf("{\"event\": \"%s\", \"heap\": %llu, \"online\": %llu, \"connected\": %llu, \"connects\": %llu, "
         "\"streams\": %llu, \"senders\": %llu, \"lanes\": %llu, \"waiting\": %llu%s}\n",
         event, NUMBER(heap.uordblks + heap.hblkhd), NUMBER(presence_online_count()), NUMBER(sum.connected),
         NUMBER(sum.connects), NUMBER(sum.streams), NUMBER(sum.senders), NUMBER(sum.lanes), NUMBER(sum.bytes_waiting), more);
}

#endif
