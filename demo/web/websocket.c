#include "websocket.h"
#include <stdint.h>
#include <stdio.h>
#include <string.h>

char *websocket_space(struct websocket_reader *reader) {
  memmove(reader->data, reader->data + reader->begin, reader->end -= reader->begin);
  reader->begin = 0;
  return reader->data + reader->end;
}

/* One byte is left for the NUL behind the last frame. */
size_t websocket_space_size(const struct websocket_reader *reader) {
  return sizeof reader->data - 1 - (reader->end - reader->begin);
}

void websocket_received(struct websocket_reader *reader, size_t length) { reader->end += length; }

enum websocket_kind websocket_next(struct websocket_reader *reader, char **text, size_t *length) {
  const unsigned char *head = (unsigned char *)reader->data + reader->begin;
  size_t available = reader->end - reader->begin, head_length = 2, size;
  if (available < 2) return WEBSOCKET_NONE;
  /* Clients mask what they send. Messages in several frames are not needed here. */
  if ((head[0] & 0xf0) != 0x80 || !(head[1] & 0x80)) return WEBSOCKET_TOO_LARGE;
  size = head[1] & 0x7f;
  if (size == 126) {
    if (available < 4) return WEBSOCKET_NONE;
    size = (size_t)head[2] << 8 | head[3];
    head_length = 4;
  }
  if (size == 127 || size > WEBSOCKET_MAX_MESSAGE) return WEBSOCKET_TOO_LARGE;
  if (available < head_length + 4 + size) return WEBSOCKET_NONE;
  enum websocket_kind kind = (enum websocket_kind)(head[0] & 0x0f);
  unsigned char mask[4];
  memcpy(mask, head + head_length, sizeof mask);
  /* One byte further to the front, so that there is space for the NUL. */
  char *from = reader->data + reader->begin + head_length + 4, *to = from - 1;
  for (size_t i = 0; i < size; i++) to[i] = (char)(from[i] ^ mask[i % 4]);
  to[size] = 0;
  reader->begin += head_length + 4 + size;
  *text = to;
  *length = size;
  return kind;
}

size_t websocket_head(char *to, enum websocket_kind kind, size_t length) {
  to[0] = (char)(0x80 | kind);
  if (length < 126) return to[1] = (char)length, 2;
  to[1] = 126, to[2] = (char)(length >> 8), to[3] = (char)length;
  return 4;
}

/* SHA-1 of less than 120 bytes, which RFC 6455 asks for. It protects nothing. */
static void sha1(unsigned char out[20], const char *text, size_t length) {
  unsigned char data[128] = {0};
  uint32_t h[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
  size_t blocks = (length + 9 + 63) / 64;
  memcpy(data, text, length);
  data[length] = 0x80;
  for (int i = 0; i < 4; i++) data[blocks * 64 - 1 - (size_t)i] = (unsigned char)(length * 8 >> 8 * i);
  for (size_t block = 0; block < blocks; block++) {
    uint32_t w[80], v[5];
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 80; i++) {
      const unsigned char *at = data + block * 64 + i * 4;
      uint32_t mixed = i < 16 ? 0 : w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16];
      w[i] = i < 16 ? (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3] : mixed << 1 | mixed >> 31;
      uint32_t f = i < 20   ? ((v[1] & v[2]) | (~v[1] & v[3])) + 0x5a827999
                   : i < 40 ? (v[1] ^ v[2] ^ v[3]) + 0x6ed9eba1
                   : i < 60 ? ((v[1] & v[2]) | (v[1] & v[3]) | (v[2] & v[3])) + 0x8f1bbcdc
                            : (v[1] ^ v[2] ^ v[3]) + 0xca62c1d6;
      uint32_t next = (v[0] << 5 | v[0] >> 27) + f + v[4] + w[i];
      v[4] = v[3], v[3] = v[2], v[2] = v[1] << 30 | v[1] >> 2, v[1] = v[0], v[0] = next;
    }
    for (int i = 0; i < 5; i++) h[i] += v[i];
  }
  for (int i = 0; i < 20; i++) out[i] = (unsigned char)(h[i / 4] >> (24 - i % 4 * 8));
}

const char *websocket_accept(char to[WEBSOCKET_ACCEPT], const char *key) {
  static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  unsigned char hash[21] = {0};
  char text[64];
  int length = snprintf(text, sizeof text, "%.24s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key);
  sha1(hash, text, (size_t)length);
  for (int i = 0; i < 7; i++) {
    uint32_t bits = (uint32_t)hash[i * 3] << 16 | hash[i * 3 + 1] << 8 | hash[i * 3 + 2];
    for (int j = 0; j < 4; j++) to[i * 4 + j] = digits[bits >> (18 - 6 * j) & 63];
  }
  to[27] = '=', to[28] = 0;
  return to;
}
