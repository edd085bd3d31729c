/* The framing of WebSockets (RFC 6455), for the end that accepts them. */
#include <stdbool.h>
#include <stddef.h>

enum { WEBSOCKET_MAX_MESSAGE = 4096, WEBSOCKET_MAX_HEAD = 4, WEBSOCKET_ACCEPT = 29 };

enum websocket_kind {
  WEBSOCKET_TOO_LARGE = -2, /* or malformed */
  WEBSOCKET_NONE = -1,      /* no whole frame has arrived */
  WEBSOCKET_TEXT = 1,
  WEBSOCKET_BINARY = 2,
  WEBSOCKET_CLOSE = 8,
  WEBSOCKET_PING = 9,
  WEBSOCKET_PONG = 10,
};

/* What has arrived. Begin with zeros. */
struct websocket_reader {
  char data[2 * WEBSOCKET_MAX_MESSAGE];
  size_t begin, end;
};

/* Where to put what arrives, and how much fits. Then call websocket_received. */
char *websocket_space(struct websocket_reader *reader);
size_t websocket_space_size(const struct websocket_reader *reader);
void websocket_received(struct websocket_reader *reader, size_t length);

/* Takes the next frame. `*text` ends with a NUL, and is valid until more is received. */
enum websocket_kind websocket_next(struct websocket_reader *reader, char **text, size_t *length);

/* Writes the head of a frame with `length` bytes. Returns the length of the head. */
size_t websocket_head(char *to, enum websocket_kind kind, size_t length);

/* Writes the value of Sec-WebSocket-Accept for a Sec-WebSocket-Key of 24 characters. Returns `to`. */
const char *websocket_accept(char to[WEBSOCKET_ACCEPT], const char *key);
