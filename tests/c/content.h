/* Messages whose content follows from the stream's number and their own, so that lost, duplicated, reordered or
 * changed messages are noticed. */
#ifndef CONTENT_H
#define CONTENT_H

#include "peer.h"

enum { CONTENT_HEAD = 16 }; /* the numbers of the stream and the message; shorter messages cut them */

static inline uint64_t scramble(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/* Fills in the message with this number. */
static inline void fill_content(unsigned char *message, size_t length, uint64_t stream, uint64_t number) {
  uint64_t head[2] = {stream, number};
  memcpy(message, head, length < sizeof head ? length : sizeof head);
  uint64_t state = scramble(stream * 1000003 + number + 1);
  for (size_t i = CONTENT_HEAD; i < length; i += 8) {
    state = scramble(state + i);
    memcpy(message + i, &state, length - i < 8 ? length - i : 8);
  }
}

/* Checks that an event's data is the message with this number. */
#define CHECK_CONTENT(event, length, stream, number) check_content(__FILE__, __LINE__, event, length, stream, number)
static inline void check_content(const char *file, int line, const presence_event *event, size_t length, uint64_t stream,
                                 uint64_t number) {
  unsigned char *expected = (unsigned char *)malloc(length + 1);
  CHECK(expected);
  fill_content(expected, length, stream, number);
  if (event->data_len != length || memcmp(event->data, expected, length) != 0) {
    uint64_t head[2] = {0, 0};
    memcpy(head, event->data, event->data_len < sizeof head ? event->data_len : sizeof head);
    begin_failure(file, line);
    fprintf(stderr, "message %llu of stream %llu, with %zu bytes, is message %llu of stream %llu, or no such, with %zu",
            (unsigned long long)number, (unsigned long long)stream, length, (unsigned long long)head[1],
            (unsigned long long)head[0], event->data_len);
    end_failure();
  }
  free(expected);
}

#endif
