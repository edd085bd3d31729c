/*
 * gateway URL LISTEN ORIGIN: a gateway between browsers and workers, over server-sent events and WebSocket.
 *
 *   GET /sse?client=ID&QUESTION    one stream as server-sent events: messages, then "end" or "failure"
 *   GET /ws?client=ID              a WebSocket with any number of streams of one client
 *
 * Only pages of ORIGIN may use it. README.md in this folder has the protocol.
 *
 * One thread and one epoll for everything: libmicrohttpd, the descriptor of the queue, and the browsers' sockets.
 */
#include <nats_presence.h>
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <microhttpd.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "websocket.h"

enum {
  KEEP_ALIVE_MS = 10000,
  USER_TIMEOUT_MS = 20000,   /* a connection whose data is not acknowledged, or not read, for so long is closed */
  SOCKET_BUFFER = 32 << 10,  /* its messages are computed even if the browser does not read them */
  MAX_WAITING = 16 << 10,    /* if more waits here for a browser, its workers get no more credit */
  MAX_STREAMS = 100,         /* for each WebSocket */
  MAX_CONNECTIONS = 10000,
  MAX_ID = 32,
  MAX_PROMPT = 1000,
  MAX_LENGTH = 100000,
  MAX_PAUSE = 1000,
};

struct stream {
  struct browser *browser;
  struct stream *next;
  presence_stream *handle; /* NULL: it has ended */
  char name[MAX_ID + 1];   /* the browser's name for it */
  size_t owed;             /* bytes of messages that the worker has no credit for yet */
};

/* A browser's connection: either one stream of server-sent events, or a WebSocket. */
struct browser {
  char client[MAX_ID + 1];
  int fd;
  struct stream *streams;
  int stream_count;
  char *out; /* bytes to be written */
  size_t out_length, out_size, out_written;
  bool has_left; /* its connection is closed, or to be closed */
  int64_t written_at;
  struct browser *next, *previous;

  struct MHD_Connection *connection; /* server-sent events */
  bool is_suspended, is_complete;

  struct MHD_UpgradeResponseHandle *upgrade; /* a WebSocket */
  struct websocket_reader reader;
};

static presence_conn *conn;
static presence_queue *queue;
static struct MHD_Daemon *daemon_;
static int epoll;
static const char *origin;
static struct browser browsers = {.next = &browsers, .previous = &browsers};
static struct stream *ended; /* to be freed when no event of the present batch can name them */
static struct browser *gone;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void *allocate(void *old, size_t size) {
  void *memory = realloc(old, size);
  if (!memory) abort();
  return memory;
}

/* ---- Reports to the supervisor ---- */

static void report(const char *event, const struct stream *s) {
  printf("{\"event\": \"%s\", \"at\": %" PRId64 ", \"stream\": \"%s.%s\"}\n", event, now_ns(), s->browser->client,
         s->name);
}

static void report_ended(const struct stream *s, int32_t status) {
  printf("{\"event\": \"ended\", \"at\": %" PRId64 ", \"stream\": \"%s.%s\", \"status\": %d}\n", now_ns(),
         s->browser->client, s->name, status);
}

/* ---- Browsers ---- */

static struct browser *new_browser(const char *client) {
  struct browser *b = calloc(1, sizeof *b);
  if (!b) abort();
  snprintf(b->client, sizeof b->client, "%s", client);
  b->fd = -1;
  b->written_at = now_ns();
  b->next = &browsers, b->previous = browsers.previous;
  b->previous->next = b, browsers.previous = b;
  return b;
}

static void watch(struct browser *b, uint32_t events) {
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, b->fd, &(struct epoll_event){.events = events, .data.ptr = b})) perror("epoll");
}

static void add_output(struct browser *b, const void *data, size_t length) {
  if (!length) return;
  if (b->out_written && b->out_length + length > b->out_size) {
    memmove(b->out, b->out + b->out_written, b->out_length -= b->out_written);
    b->out_written = 0;
  }
  if (b->out_length + length > b->out_size) {
    b->out_size = (b->out_length + length) * 2;
    b->out = allocate(b->out, b->out_size);
  }
  memcpy(b->out + b->out_length, data, length);
  b->out_length += length;
}

static size_t waiting(const struct browser *b) { return b->out_length - b->out_written; }

/* Counts bytes as written, and gives the workers credit again when little waits. */
static void output_written(struct browser *b, size_t length) {
  b->out_written += length;
  b->written_at = now_ns();
  if (b->out_written == b->out_length) b->out_length = b->out_written = 0;
  if (waiting(b) > MAX_WAITING) return;
  for (struct stream *s = b->streams; s; s = s->next) {
    if (s->owed && s->handle) presence_stream_consumed(s->handle, s->owed);
    s->owed = 0;
  }
}

/* Writes the pending output of a WebSocket. */
static void flush_socket(struct browser *b) {
  while (waiting(b)) {
    ssize_t sent = send(b->fd, b->out + b->out_written, waiting(b), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent <= 0) return; /* EPOLLOUT will come, or EPOLLHUP */
    output_written(b, (size_t)sent);
  }
}

/* Has what was added written. */
static void flush_output(struct browser *b) {
  if (b->upgrade) {
    flush_socket(b);
  } else if (b->is_suspended) {
    b->is_suspended = false;
    MHD_resume_connection(b->connection);
  }
}

/* Removes a stream that has ended. */
static void remove_stream(struct stream *s) {
  struct browser *b = s->browser;
  struct stream **place = &b->streams;
  while (*place != s) place = &(*place)->next;
  *place = s->next;
  b->stream_count--;
  presence_stream_free(s->handle); /* cancels it, if it runs: this stops its worker */
  s->handle = NULL;
  s->next = ended;
  ended = s;
}

static void leave_stream(struct stream *s) {
  report("left", s);
  report_ended(s, PRESENCE_CANCELLED);
  remove_stream(s);
}

/* The browser has left: stops the workers of all its streams. */
static void leave(struct browser *b) {
  while (b->streams) leave_stream(b->streams);
  if (b->has_left) return;
  b->has_left = true;
  if (b->upgrade) {
    epoll_ctl(epoll, EPOLL_CTL_DEL, b->fd, NULL);
    MHD_upgrade_action(b->upgrade, MHD_UPGRADE_ACTION_CLOSE);
  } else {
    flush_output(b); /* libmicrohttpd asks for data, learns that there is none, and frees the response */
    return;
  }
  b->previous->next = b->next, b->next->previous = b->previous;
  b->next = gone, gone = b;
}

/* ---- Events for browsers ---- */

/* Adds an event of a stream. `kind` is "message", "end" or "failure". */
static void add_event(struct browser *b, const char *kind, const char *stream, const char *text, size_t length) {
  if (b->upgrade) {
    char head[MAX_ID + 16], frame[WEBSOCKET_MAX_HEAD];
    size_t head_length = (size_t)snprintf(head, sizeof head, "%s %s ", kind, stream);
    add_output(b, frame, websocket_head(frame, WEBSOCKET_TEXT, head_length + length));
    add_output(b, head, head_length);
    add_output(b, text, length);
  } else {
    if (strcmp(kind, "message") != 0) {
      add_output(b, "event: ", 7);
      add_output(b, kind, strlen(kind));
      add_output(b, "\n", 1);
    }
    add_output(b, "data: ", 6);
    for (size_t i = 0; i < length; i++) { /* a line end would end the event: each line gets a field of its own */
      if (text[i] == '\r' && i + 1 < length && text[i + 1] == '\n') continue;
      if (text[i] == '\r' || text[i] == '\n')
        add_output(b, "\ndata: ", 7);
      else
        add_output(b, &text[i], 1);
    }
    add_output(b, "\n\n", 2);
  }
  flush_output(b);
}

static void handle_event(const presence_event *event) {
  struct stream *s = (struct stream *)(uintptr_t)event->tag;
  if (!event->stream || !s->handle) return;
  struct browser *b = s->browser;
  const char *text = (const char *)event->data;
  switch (event->kind) {
    case PRESENCE_EVENT_DATA:
      s->owed += event->data_len;
      add_event(b, "message", s->name, text, event->data_len);
      break;
    case PRESENCE_EVENT_END:
    case PRESENCE_EVENT_ERROR:
      report_ended(s, event->status);
      b->is_complete = true;
      add_event(b, event->kind == PRESENCE_EVENT_END ? "end" : "failure", s->name, text, event->data_len);
      remove_stream(s);
      break;
    default:
      break;
  }
}

/* ---- Questions ---- */

struct question {
  char stream[MAX_ID + 1];
  char subject[32];
  char payload[MAX_PROMPT + 128];
};

static bool is_id(const char *id) {
  size_t length = strspn(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-");
  return length >= 1 && length <= MAX_ID && !id[length];
}

static bool is_one_of(const char *text, const char *const *list) {
  while (*list && strcmp(*list, text) != 0) list++;
  return *list;
}

/* Returns the number, or -1. */
static long parse_number(const char *text, long least, long most) {
  char *end;
  long number = strtol(text, &end, 10);
  return isdigit((unsigned char)*text) && !*end && number >= least && number <= most ? number : -1;
}

typedef const char *(*lookup)(void *from, const char *name);

/* Checks all parameters. Returns 0, or an HTTP status with a text for the client in `why`. */
static unsigned parse(struct question *q, const char *client, lookup get, void *from, char *why, size_t size) {
  static const char *const ways[] = {"presence", "plain", NULL}, *const workers[] = {"any", "c", "go", "python", NULL};
  const char *stream = get(from, "stream"), *way = get(from, "mode"), *worker = get(from, "worker");
  const char *length_text = get(from, "length"), *pause_text = get(from, "pause"), *prompt = get(from, "prompt");
  long length = parse_number(length_text, 1, MAX_LENGTH), pause = parse_number(pause_text, 0, MAX_PAUSE);
  unsigned status = MHD_HTTP_BAD_REQUEST;
  const char *wrong_id = !is_id(client) ? "client" : !is_id(stream) ? "stream" : NULL;
  if (wrong_id) {
    snprintf(why, size, "%s is \"%.80s\", not 1 to %d letters, digits, - or _\n", wrong_id,
             *wrong_id == 'c' ? client : stream, MAX_ID);
  } else if (!is_one_of(way, ways) || !is_one_of(worker, workers)) {
    snprintf(why, size, "no worker serves \"%.40s.%.40s\"\n", way, worker);
    status = MHD_HTTP_NOT_FOUND;
  } else if (length < 0) {
    snprintf(why, size, "length is \"%.80s\", not a number from 1 to %d\n", length_text, MAX_LENGTH);
  } else if (pause < 0) {
    snprintf(why, size, "pause is \"%.80s\", not a number of milliseconds from 0 to %d\n", pause_text, MAX_PAUSE);
  } else if (strlen(prompt) > MAX_PROMPT) {
    snprintf(why, size, "prompt is %zu bytes long; the limit is %d\n", strlen(prompt), MAX_PROMPT);
  } else {
    snprintf(q->stream, sizeof q->stream, "%s", stream);
    snprintf(q->subject, sizeof q->subject, "%s.%s", way, worker);
    int head = snprintf(q->payload, sizeof q->payload, "%s.%s %ld %ld ", client, stream, length, pause);
    char *to = q->payload + head;
    for (; *prompt; prompt++) *to++ = isspace((unsigned char)*prompt) ? ' ' : *prompt;
    *to = 0;
    return 0;
  }
  for (; why[strspn(why, "\n")]; why++) /* what was asked for may be anything, and an answer is text */
    if (!isprint((unsigned char)*why)) *why = '?';
  return status;
}

/* Requests a stream. Returns false, with a text for the client, if that is not possible. */
static bool request(struct browser *b, const struct question *q, presence_error *error) {
  struct stream *s = calloc(1, sizeof *s);
  if (!s) abort();
  s->browser = b;
  snprintf(s->name, sizeof s->name, "%s", q->stream);
  presence_config *config = presence_config_new();
  /* Workers get credit when a browser has read, not when this program has. */
  presence_config_set(config, "manual_credit", "true");
  presence_request_args args = {
    .size = sizeof args,
    .subject = q->subject,
    .data = q->payload,
    .data_len = strlen(q->payload),
    .client = b->client,
    .client_len = strlen(b->client),
    .tag = (uint64_t)(uintptr_t)s,
    .config = config,
  };
  report("ask", s);
  int32_t status = presence_request(conn, queue, &args, &s->handle, error);
  presence_config_free(config);
  if (status != PRESENCE_OK) {
    report_ended(s, status);
    free(s);
    return false;
  }
  s->next = b->streams, b->streams = s;
  b->stream_count++;
  return true;
}

/* ---- Server-sent events ---- */

/* libmicrohttpd asks for what to write. */
static ssize_t read_output(void *cls, uint64_t position, char *to, size_t max) {
  struct browser *b = cls;
  (void)position;
  if (b->has_left) return MHD_CONTENT_READER_END_WITH_ERROR;
  size_t length = waiting(b) < max ? waiting(b) : max;
  if (length) {
    memcpy(to, b->out + b->out_written, length);
    output_written(b, length);
    return (ssize_t)length;
  }
  if (b->is_complete) return MHD_CONTENT_READER_END_OF_STREAM;
  b->is_suspended = true;
  MHD_suspend_connection(b->connection);
  return 0;
}

/* The response is over, for whatever reason. */
static void free_events(void *cls) {
  struct browser *b = cls;
  b->has_left = true; /* libmicrohttpd has closed the connection, or will */
  if (b->fd >= 0) epoll_ctl(epoll, EPOLL_CTL_DEL, b->fd, NULL);
  while (b->streams) leave_stream(b->streams);
  b->previous->next = b->next, b->next->previous = b->previous;
  b->next = gone, gone = b;
}

static enum MHD_Result answer(struct MHD_Connection *connection, unsigned status, const char *text) {
  struct MHD_Response *response = MHD_create_response_from_buffer(strlen(text), (void *)text, MHD_RESPMEM_MUST_COPY);
  MHD_add_response_header(response, "Content-Type", "text/plain; charset=utf-8");
  MHD_add_response_header(response, "Access-Control-Allow-Origin", origin);
  if (status == MHD_HTTP_METHOD_NOT_ALLOWED) MHD_add_response_header(response, "Allow", "GET");
  if (status == MHD_HTTP_CONTENT_TOO_LARGE) MHD_add_response_header(response, "Connection", "close");
  enum MHD_Result result = MHD_queue_response(connection, status, response);
  MHD_destroy_response(response);
  return result;
}

static const char *parameter(void *connection, const char *name) {
  const char *value = MHD_lookup_connection_value(connection, MHD_GET_ARGUMENT_KIND, name);
  return value ? value : "";
}

static const char *header(struct MHD_Connection *connection, const char *name) {
  const char *value = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, name);
  return value ? value : "";
}

static enum MHD_Result serve_events(struct MHD_Connection *connection) {
  struct question q;
  char why[256];
  presence_error error;
  const char *client = parameter(connection, "client");
  unsigned status = parse(&q, client, parameter, connection, why, sizeof why);
  if (status) return answer(connection, status, why);
  struct browser *b = new_browser(client);
  b->connection = connection;
  if (!request(b, &q, &error)) {
    free_events(b);
    return answer(connection, MHD_HTTP_BAD_GATEWAY, error.message);
  }
  b->fd = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
  /* libmicrohttpd does not watch a connection that is suspended, as it is whenever it waits for a word. */
  watch(b, EPOLLRDHUP | EPOLLET);
  add_output(b, ":\n\n", 3);
  struct MHD_Response *response =
    MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 8192, read_output, b, free_events);
  MHD_add_response_header(response, "Content-Type", "text/event-stream");
  MHD_add_response_header(response, "Cache-Control", "no-store, no-transform");
  MHD_add_response_header(response, "Access-Control-Allow-Origin", origin);
  enum MHD_Result result = MHD_queue_response(connection, MHD_HTTP_OK, response);
  MHD_destroy_response(response);
  return result;
}

/* ---- WebSockets ---- */

/* Returns the decoded value of a parameter of a query, until the next call for the same name. */
static const char *query_value(void *query, const char *name) {
  static struct {
    const char *name;
    char value[WEBSOCKET_MAX_MESSAGE + 1];
  } values[8];
  int slot = 0;
  while (values[slot].name && strcmp(values[slot].name, name) != 0) slot++;
  values[slot].name = name;
  char *value = values[slot].value;
  *value = 0;
  size_t name_length = strlen(name);
  for (const char *at = query; at; at = strchr(at, '&') ? strchr(at, '&') + 1 : NULL) {
    if (strncmp(at, name, name_length) != 0 || at[name_length] != '=') continue;
    at += name_length + 1;
    snprintf(value, sizeof values->value, "%.*s", (int)strcspn(at, "&"), at);
    for (char *c = value; *c; c++)
      if (*c == '+') *c = ' ';
    MHD_http_unescape(value);
    break;
  }
  return value;
}

static struct stream *find_stream(struct browser *b, const char *name) {
  struct stream *s = b->streams;
  while (s && strcmp(s->name, name) != 0) s = s->next;
  return s;
}

static void fail(struct browser *b, const char *stream, const char *text) {
  add_event(b, "failure", is_id(stream) ? stream : "-", text, strcspn(text, "\n"));
}

static void ask(struct browser *b, char *query) {
  struct question q;
  char why[256];
  presence_error error;
  const char *name = query_value(query, "stream");
  if (parse(&q, b->client, query_value, query, why, sizeof why)) {
    fail(b, name, why);
  } else if (find_stream(b, q.stream)) {
    snprintf(why, sizeof why, "stream %s runs already", q.stream);
    fail(b, name, why);
  } else if (b->stream_count == MAX_STREAMS) {
    snprintf(why, sizeof why, "%d streams run already, which is the limit", MAX_STREAMS);
    fail(b, name, why);
  } else if (!request(b, &q, &error)) {
    fail(b, name, error.message);
  }
}

/* Closes a WebSocket, and says why. */
static void refuse(struct browser *b, unsigned code, const char *why) {
  char frame[WEBSOCKET_MAX_HEAD + 128];
  size_t length = strlen(why), head = websocket_head(frame, WEBSOCKET_CLOSE, length + 2);
  frame[head] = (char)(code >> 8), frame[head + 1] = (char)code;
  memcpy(frame + head + 2, why, length);
  add_output(b, frame, head + 2 + length);
  flush_socket(b);
  leave(b);
}

/* Handles a message of the browser. */
static void handle_message(struct browser *b, enum websocket_kind kind, char *text, size_t length) {
  struct stream *s;
  if (kind == WEBSOCKET_PING) {
    char frame[WEBSOCKET_MAX_HEAD];
    add_output(b, frame, websocket_head(frame, WEBSOCKET_PONG, length));
    add_output(b, text, length);
    flush_socket(b);
  } else if (kind == WEBSOCKET_CLOSE) {
    refuse(b, 1000, "");
  } else if (kind == WEBSOCKET_TEXT && !strncmp(text, "ask ", 4)) {
    ask(b, text + 4);
  } else if (kind == WEBSOCKET_TEXT && !strncmp(text, "leave ", 6)) {
    if ((s = find_stream(b, text + 6))) leave_stream(s);
  } else if (kind != WEBSOCKET_PONG) {
    refuse(b, 1008, "a message is not \"ask QUESTION\" or \"leave STREAM\"");
  }
}

/* Handles the messages that have arrived. */
static void handle_messages(struct browser *b) {
  enum websocket_kind kind;
  char *text;
  size_t length;
  while (!b->has_left && (kind = websocket_next(&b->reader, &text, &length)) != WEBSOCKET_NONE) {
    if (kind == WEBSOCKET_TOO_LARGE)
      refuse(b, 1009, "a message is too large");
    else
      handle_message(b, kind, text, length);
  }
}

static void handle_socket(struct browser *b, uint32_t events) {
  if (events & EPOLLOUT) flush_socket(b);
  if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
    bool is_open = true;
    while (is_open && !b->has_left) {
      ssize_t count = recv(b->fd, websocket_space(&b->reader), websocket_space_size(&b->reader), MSG_DONTWAIT);
      if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
      is_open = count > 0;
      if (is_open) {
        websocket_received(&b->reader, (size_t)count);
        handle_messages(b);
      }
    }
    leave(b);
  }
}

static void begin_socket(void *cls, struct MHD_Connection *connection, void *con_cls, const char *extra,
                         size_t extra_size, MHD_socket fd, struct MHD_UpgradeResponseHandle *upgrade) {
  struct browser *b = new_browser(parameter(connection, "client"));
  (void)cls, (void)con_cls;
  b->fd = fd;
  b->upgrade = upgrade;
  watch(b, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
  if (extra_size > websocket_space_size(&b->reader)) {
    leave(b);
    return;
  }
  if (extra_size) memcpy(websocket_space(&b->reader), extra, extra_size);
  websocket_received(&b->reader, extra_size);
  handle_messages(b);
}

static enum MHD_Result serve_socket(struct MHD_Connection *connection) {
  char why[256], accept[WEBSOCKET_ACCEPT];
  const char *client = parameter(connection, "client"), *key = header(connection, "Sec-WebSocket-Key");
  if (!is_id(client)) {
    snprintf(why, sizeof why, "client is \"%.80s\", not 1 to %d letters, digits, - or _\n", client, MAX_ID);
    return answer(connection, MHD_HTTP_BAD_REQUEST, why);
  }
  if (strcasecmp(header(connection, "Upgrade"), "websocket") != 0 || strlen(key) != 24 ||
      strcmp(header(connection, "Sec-WebSocket-Version"), "13") != 0)
    return answer(connection, MHD_HTTP_UPGRADE_REQUIRED, "this address is for WebSockets\n");
  struct MHD_Response *response = MHD_create_response_for_upgrade(begin_socket, NULL);
  MHD_add_response_header(response, "Upgrade", "websocket");
  MHD_add_response_header(response, "Sec-WebSocket-Accept", websocket_accept(accept, key));
  enum MHD_Result result = MHD_queue_response(connection, MHD_HTTP_SWITCHING_PROTOCOLS, response);
  MHD_destroy_response(response);
  return result;
}

/* ---- HTTP ---- */

static enum MHD_Result handle_request(void *cls, struct MHD_Connection *connection, const char *url,
                                      const char *method, const char *version, const char *data, size_t *size,
                                      void **state) {
  static int seen;
  char why[256];
  (void)cls, (void)version, (void)data, (void)size;
  const char *from = header(connection, "Origin"), *length = header(connection, "Content-Length");
  if (!*state) { /* the headers have arrived */
    *state = &seen;
    if ((*length && strcmp(length, "0") != 0) || *header(connection, "Transfer-Encoding"))
      return answer(connection, MHD_HTTP_CONTENT_TOO_LARGE, "a request has no body: the prompt is a parameter\n");
    return MHD_YES;
  }
  if (*from && strcmp(from, origin) != 0) {
    snprintf(why, sizeof why, "pages of \"%.80s\" may not use this gateway\n", from);
    return answer(connection, MHD_HTTP_FORBIDDEN, why);
  }
  if (strcmp(method, "GET") != 0) return answer(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET is allowed\n");
  if (!strcmp(url, "/sse")) return serve_events(connection);
  if (!strcmp(url, "/ws")) return serve_socket(connection);
  return answer(connection, MHD_HTTP_NOT_FOUND, "there are /sse and /ws only\n");
}

/* Browsers that vanished do not acknowledge what is sent to them. */
static void keep_alive(void) {
  int64_t now = now_ns();
  for (struct browser *b = browsers.next, *next; b != &browsers; b = next) {
    next = b->next;
    if (now - b->written_at < KEEP_ALIVE_MS * INT64_C(1000000) || waiting(b) || b->has_left) continue;
    char frame[WEBSOCKET_MAX_HEAD];
    if (b->upgrade)
      add_output(b, frame, websocket_head(frame, WEBSOCKET_PING, 0));
    else
      add_output(b, ": keep-alive\n\n", 14);
    flush_output(b);
  }
}

static int listen_on(const char *address, int *port) {
  struct sockaddr_in in = {.sin_family = AF_INET};
  socklen_t size = sizeof in;
  char host[64];
  int number, on = 1, ms = USER_TIMEOUT_MS, bytes = SOCKET_BUFFER;
  if (sscanf(address, "%63[0-9.]:%d", host, &number) != 2 || inet_pton(AF_INET, host, &in.sin_addr) != 1) return -1;
  in.sin_port = htons((uint16_t)number);
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &ms, sizeof ms); /* accepted connections inherit the options */
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
  if (bind(fd, (struct sockaddr *)&in, size) || listen(fd, 2048) || getsockname(fd, (struct sockaddr *)&in, &size))
    return -1;
  *port = ntohs(in.sin_port);
  return fd;
}

static void free_ended(void) {
  while (ended) {
    struct stream *s = ended;
    ended = s->next;
    free(s);
  }
  while (gone) {
    struct browser *b = gone;
    gone = b->next;
    free(b->out);
    free(b);
  }
}

static void run(int queue_fd) {
  static char is_mhd, is_queue, is_input; /* their addresses identify descriptors */
  const struct {
    int fd;
    void *what;
  } own[] = {
    {MHD_get_daemon_info(daemon_, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd, &is_mhd},
    {queue_fd, &is_queue},
    {STDIN_FILENO, &is_input},
  };
  for (size_t i = 0; i < 3; i++)
    epoll_ctl(epoll, EPOLL_CTL_ADD, own[i].fd, &(struct epoll_event){.events = EPOLLIN, .data.ptr = own[i].what});
  int64_t checked = now_ns();
  for (;;) {
    MHD_UNSIGNED_LONG_LONG ms;
    struct epoll_event ready[64];
    presence_event events[64];
    int timeout = MHD_get_timeout(daemon_, &ms) == MHD_YES && ms < 1000 ? (int)ms : 1000;
    int count = epoll_wait(epoll, ready, 64, timeout);
    for (int i = 0; i < count; i++) {
      struct browser *b = ready[i].data.ptr;
      if (ready[i].data.ptr == &is_input) return; /* the demo ends */
      if (ready[i].data.ptr == &is_mhd || ready[i].data.ptr == &is_queue || b->has_left) continue;
      if (b->upgrade)
        handle_socket(b, ready[i].events);
      else
        leave(b);
    }
    int64_t received = presence_queue_wait(queue, events, 64, 0);
    for (int64_t i = 0; i < received; i++) handle_event(&events[i]);
    MHD_run(daemon_);
    if (now_ns() - checked > INT64_C(1000000000)) {
      keep_alive();
      checked = now_ns();
    }
    free_ended();
  }
}

int main(int argc, char **argv) {
  presence_error error = {0};
  presence_config *config = presence_config_new();
  struct rlimit files;
  int port;
  if (argc != 4) return fprintf(stderr, "usage: gateway URL LISTEN ORIGIN\n"), 2;
  origin = argv[3];
  setvbuf(stdout, NULL, _IOLBF, 0);
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  /* More heartbeats than by default, so that a frozen worker is noticed after 3 s instead of 15. */
  if (presence_config_set(config, "name", "C gateway") || presence_config_set(config, "heartbeat_ms", "1000") ||
      presence_queue_new(&queue) || presence_connect(argv[1], config, &conn, &error) || presence_listen_offline(conn))
    return fprintf(stderr, "%s\n", error.message), 1;
  int listener = listen_on(argv[2], &port);
  if (listener < 0) return fprintf(stderr, "cannot listen on %s: %s\n", argv[2], strerror(errno)), 1;
  epoll = epoll_create1(EPOLL_CLOEXEC);
  daemon_ = MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_ALLOW_UPGRADE, 0, NULL, NULL,
                             handle_request, NULL, MHD_OPTION_LISTEN_SOCKET, listener, MHD_OPTION_CONNECTION_LIMIT,
                             (unsigned)MAX_CONNECTIONS, MHD_OPTION_CONNECTION_TIMEOUT, USER_TIMEOUT_MS / 1000U,
                             MHD_OPTION_END);
  if (!daemon_) return fprintf(stderr, "libmicrohttpd does not start\n"), 1;
  printf("{\"event\": \"ready\", \"at\": %" PRId64 ", \"port\": %d}\n", now_ns(), port);
  run(presence_queue_fd(queue));
  presence_close(conn, 1000);
  return 0;
}
