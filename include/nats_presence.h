/*
 * nats-presence: stop work for clients that have left.
 *
 * A gateway requests a stream of messages from a worker, over NATS, on behalf of a client. When the client leaves, the
 * worker's sender refuses to send, and its thread gets an event.
 *
 * A worker:
 *
 *   presence_connect("nats://127.0.0.1:4222", NULL, &conn, &error);
 *   presence_queue_new(&queue);
 *   presence_serve(conn, queue, "count", "workers", 0, 0, &service, &error);
 *   while (presence_queue_wait(queue, &event, 1, -1) == 1) {
 *     if (event.kind != PRESENCE_EVENT_REQUEST) continue;
 *     while (presence_sender_send(event.sender, "tick", 4) == PRESENCE_OK) sleep(1);   // until the client has left
 *     presence_sender_free(event.sender);
 *   }
 *
 * A gateway, which calls mark_client_offline when the client has left:
 *
 *   presence_request_args args = {.size = sizeof args, .subject = "count", .client = "client-1", .client_len = 8};
 *   presence_request(conn, queue, &args, &stream, &error);
 *   while (presence_queue_wait(queue, &event, 1, -1) == 1 && event.kind == PRESENCE_EVENT_DATA)
 *     fwrite(event.data, 1, event.data_len, stdout);
 *   presence_stream_free(stream);
 *
 * Complete programs are in examples-c. Link with `pkg-config --cflags --libs nats-presence`.
 * This file is generated from src/ffi by cbindgen; do not edit it.
 *
 * Words
 *   - Client: whom a gateway serves, such as a browser. Its id is 1 to 1024 bytes of UTF-8 without control characters.
 *     The empty id stands for no client, and is always online.
 *   - Level 0: the protocol of plain NATS messages, which peers without this library speak too. A stream on level 0 is
 *     not resumed after a connection was lost. Its worker can be stopped only by announcing the client offline to all
 *     processes.
 *   - Lane: what all streams between two processes share if both run this library. Messages on a lane are batched,
 *     flow-controlled, and resumed after a reconnect, and each stream can be stopped by itself.
 *
 * Rules for all functions
 *   - Threads: every function may be called from any thread at any time, unless its comment says otherwise. There are
 *     no callbacks. No function may be called in a signal handler, where it could wait for the thread that was
 *     interrupted; a status word may be read there. (Handle signals with sigwait in a thread of their own, or with
 *     signalfd.) No thread may be ended within a call: no pthread_cancel, no longjmp or C++ exception out of a signal
 *     handler.
 *   - Results: a presence_status is PRESENCE_OK (0) or negative. A call that fails has changed nothing, but
 *     presence_close always closes the connection. Any call can also return PRESENCE_INVALID for an invalid argument,
 *     PRESENCE_CLOSED for a handle that has ended, PRESENCE_FORKED and PRESENCE_INTERNAL.
 *   - `error` may be NULL. It is filled if the call fails, and otherwise left unchanged.
 *   - Handles are opaque. Each is ended by one call of its _free or _close function; ending NULL has no effect. A
 *     handle that has ended is recognised, with PRESENCE_CLOSED; but the use of a presence_sender or presence_config
 *     after it was freed is undefined (a debug build of the library refuses it).
 *   - Pointers: the caller promises that text without a length is NUL-terminated, that data is readable for its length,
 *     and that results are writable. NULL and pointers that are not aligned for their type are PRESENCE_INVALID, except
 *     where a comment allows NULL, and NULL data with length 0. (An `error` that is not aligned is left unchanged.)
 *   - Data that is passed in is copied before the call returns. Text is UTF-8.
 *   - Subjects are at most 2048 bytes long, inbox prefixes and groups 1024.
 *   - Times are milliseconds. A negative timeout is no limit; 0 does not wait.
 *   - Stack: presence_connect needs 64 KiB, all other functions 16 KiB.
 *   - Out of memory: Rust's allocator aborts the process.
 *   - fork: in the child, inherited handles return PRESENCE_FORKED, and freeing them has no effect. (A presence_config
 *     is only memory, and remains usable.)
 */


#ifndef NATS_PRESENCE_H
#define NATS_PRESENCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The version of this header. presence_version returns that of the library. */
#define PRESENCE_VERSION "0.1.0"
#define PRESENCE_VERSION_MAJOR 0
#define PRESENCE_VERSION_MINOR 1
#define PRESENCE_VERSION_PATCH 0
/* The same as one number, for comparisons: 1.2.3 is 10203. */
#define PRESENCE_VERSION_NUMBER (PRESENCE_VERSION_MAJOR * 10000 + PRESENCE_VERSION_MINOR * 100 + PRESENCE_VERSION_PATCH)
/* The version of the ABI, which is also the version in the library's SONAME. */
#define PRESENCE_ABI 0

/* For functions whose result must not be ignored. */
#ifndef PRESENCE_NODISCARD
#if (defined(__cplusplus) && __cplusplus >= 201703L) || (defined(__STDC_VERSION__) && __STDC_VERSION__ >= 202311L)
#define PRESENCE_NODISCARD [[nodiscard]]
#elif defined(__GNUC__)
#define PRESENCE_NODISCARD __attribute__((warn_unused_result))
#else
#define PRESENCE_NODISCARD
#endif
#endif


/**
 * The size of a presence_error's message, including the NUL.
 */
#define PRESENCE_ERROR_MESSAGE 508

/**
 * The result of a call, or why a stream has ended. The values never change.
 */
enum presence_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Success.
   */
  PRESENCE_OK = 0,
  /**
   * An argument is invalid: NULL, not UTF-8, empty, too long, or with a character that is not allowed.
   */
  PRESENCE_INVALID = -1,
  /**
   * The client is offline: it was marked offline in this process, its last session here was closed, or another
   * process announced or reported it.
   */
  PRESENCE_OFFLINE = -2,
  /**
   * The sender, stream, service, connection or queue has ended already.
   */
  PRESENCE_CLOSED = -3,
  /**
   * The reader cancelled the stream. A worker gets it also if the client left before the stream had begun.
   */
  PRESENCE_CANCELLED = -4,
  /**
   * A buffer or limit is full. A sender can send again after PRESENCE_EVENT_WRITABLE. A stream ends with it if its
   * reader is too slow.
   */
  PRESENCE_FULL = -5,
  /**
   * The message is larger than presence_sender_max_message, or the request larger than max_payload of nats-server.
   */
  PRESENCE_TOO_LARGE = -6,
  /**
   * The stream is on level 0, and the reader would mistake the payload for something else: it begins with
   * "__STREAM_END__" or "__STREAM_ERROR__", or looks like a JetStream acknowledgement. On a lane any payload can be
   * sent.
   */
  PRESENCE_RESERVED = -7,
  /**
   * There is no connection to nats-server, or it was lost while the stream ran.
   */
  PRESENCE_DISCONNECTED = -8,
  /**
   * The process at the other end is gone.
   */
  PRESENCE_PEER_GONE = -9,
  /**
   * No worker serves the subject.
   */
  PRESENCE_NO_RESPONDERS = -10,
  /**
   * In use: only one thread at a time may wait on a queue. As the status of a PRESENCE_EVENT_ERROR: the worker has
   * reached its limit of running streams and refused this one.
   */
  PRESENCE_BUSY = -11,
  /**
   * The timeout has passed.
   */
  PRESENCE_TIMEOUT = -12,
  /**
   * The worker ended the stream with an error; the event's `data` is its text.
   */
  PRESENCE_REMOTE = -13,
  /**
   * The handle belongs to the parent of this forked process, or the parent had connected before the fork.
   */
  PRESENCE_FORKED = -14,
  /**
   * A defect of this library, which remains usable.
   */
  PRESENCE_INTERNAL = -15,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum presence_status presence_status;
#else
typedef int32_t presence_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The kind of an event, with the fields that it sets besides `kind`, `status` and `tag`.
 */
enum presence_event_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * A service received a request. `sender` answers it: the caller owns it and must call presence_sender_free.
   * `client` is the client's id, or empty; `subject` is what the request was sent to; `data` is its payload.
   */
  PRESENCE_EVENT_REQUEST = 1,
  /**
   * A message of a stream: `stream`, `data`.
   */
  PRESENCE_EVENT_DATA = 2,
  /**
   * The worker ended the stream: `stream`. It is the stream's last event.
   */
  PRESENCE_EVENT_END = 3,
  /**
   * The stream ended in another way: `stream`; `status` is why, `data` a text, and `error_code` the code that the
   * worker gave, if it gave one. It is the stream's last event.
   */
  PRESENCE_EVENT_ERROR = 4,
  /**
   * A sender was stopped: `sender`, `client`; `status` is why. Delivered at most once, after REQUEST, and never for
   * a sender that you ended yourself. The sender must still be freed.
   */
  PRESENCE_EVENT_STOPPED = 5,
  /**
   * A sender that returned PRESENCE_FULL can send again: `sender`, `client`.
   */
  PRESENCE_EVENT_WRITABLE = 6,
  /**
   * A client came online in this process: `client`. Only in queues that were passed to presence_watch.
   */
  PRESENCE_EVENT_ONLINE = 7,
  /**
   * A client went offline in this process: `client`. Only in queues that were passed to presence_watch.
   */
  PRESENCE_EVENT_OFFLINE = 8,
  /**
   * The connection to nats-server was made: `data` is the server's host:port. Only in queues that were passed to
   * presence_conn_watch.
   *
   * With a `subject`, in a service's queue: nats-server has accepted the service's subscription again.
   */
  PRESENCE_EVENT_CONNECTED = 9,
  /**
   * The connection to nats-server is lost: `data` is why. Streams and senders on level 0, and requests that no
   * worker has accepted, end with PRESENCE_DISCONNECTED. The library reconnects, unless `status` is PRESENCE_CLOSED.
   * Only in queues that were passed to presence_conn_watch.
   *
   * With a `subject`, in a service's queue: nats-server has refused the service's subscription or taken it back, so
   * no requests come; `data` is why. See presence_serve.
   */
  PRESENCE_EVENT_DISCONNECTED = 10,
  /**
   * Something that an operator should know: `data` is a text; `status` and `tag` say what it is about.
   */
  PRESENCE_EVENT_LOG = 11,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum presence_event_kind presence_event_kind;
#else
typedef int32_t presence_event_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Options for presence_connect and presence_request.
 *
 * *Thread safety*: only one thread at a time may use it.
 */
typedef struct presence_config presence_config;

/**
 * A connection to nats-server. It reconnects whenever it is lost, until presence_close.
 */
typedef struct presence_conn presence_conn;

/**
 * A queue of events. Any number of services, streams and watches may use the same queue.
 */
typedef struct presence_queue presence_queue;

/**
 * The worker's end of one stream. Each PRESENCE_EVENT_REQUEST has one.
 *
 * The caller owns it and must call presence_sender_free. It may be used from any thread, before and after the next
 * wait on the queue. Once it has ended, it never sends again.
 */
typedef struct presence_sender presence_sender;

/**
 * A subject that this process serves.
 */
typedef struct presence_service presence_service;

/**
 * One of a client's connections to this process, such as a browser tab.
 */
typedef struct presence_session presence_session;

/**
 * The gateway's end of one stream, which this process requested.
 */
typedef struct presence_stream presence_stream;

/**
 * Filled by a call that fails.
 */
typedef struct presence_error {
  /**
   * The presence_status that the call returned.
   */
  int32_t status;
  /**
   * Which value was wrong and what would be right. UTF-8, NUL-terminated, truncated if it is too long.
   */
  char message[PRESENCE_ERROR_MESSAGE];
} presence_error;

/**
 * Something that happened. Which fields are set depends on `kind`; the others are 0 or NULL. A field that is set is
 * not NULL, even if its length is 0.
 *
 * `client`, `subject` and `data` are not NUL-terminated. They are valid until the next wait on the same queue, or
 * until the queue is freed. For as long, `sender` and `stream` name the handles that the event is about, which the
 * caller may have freed.
 */
typedef struct presence_event {
  /**
   * A presence_event_kind. Later versions may add kinds: ignore those that you do not know.
   */
  int32_t kind;
  /**
   * A presence_status.
   */
  int32_t status;
  /**
   * The number that was passed to presence_serve, presence_request, presence_watch, presence_conn_watch or
   * presence_sender_set_tag.
   */
  uint64_t tag;
  /**
   * REQUEST: a new sender, which the caller owns. STOPPED, WRITABLE: the sender that the event is about.
   */
  struct presence_sender *sender;
  /**
   * DATA, END, ERROR: the stream that the event is about.
   */
  struct presence_stream *stream;
  /**
   * REQUEST, STOPPED, WRITABLE, ONLINE, OFFLINE: the client's id. It is empty for a request without a client.
   */
  const char *client;
  /**
   * The length of `client`.
   */
  size_t client_len;
  /**
   * REQUEST: the subject that the request was sent to. CONNECTED, DISCONNECTED: the service's subject, or NULL if
   * the event is about the connection.
   */
  const char *subject;
  /**
   * The length of `subject`.
   */
  size_t subject_len;
  /**
   * REQUEST, DATA: the payload. ERROR, CONNECTED, DISCONNECTED, LOG: a text.
   */
  const uint8_t *data;
  /**
   * The length of `data`.
   */
  size_t data_len;
  /**
   * ERROR: the code that the worker passed to presence_sender_error_code; 0 if it passed none.
   */
  int32_t error_code;
  /**
   * 0.
   */
  uint32_t reserved[3];
} presence_event;

/**
 * What presence_request needs. Set what a request has, and leave the rest 0 or NULL:
 * `struct presence_request_args args = {.size = sizeof args, .subject = "count"};`
 */
typedef struct presence_request_args {
  /**
   * sizeof(struct presence_request_args). Later versions may add fields after the last one.
   */
  size_t size;
  /**
   * The subject that workers serve.
   */
  const char *subject;
  /**
   * The request's payload, or NULL.
   */
  const void *data;
  /**
   * The length of `data`.
   */
  size_t data_len;
  /**
   * The client's id, or NULL if the stream belongs to no client.
   */
  const char *client;
  /**
   * The length of `client`.
   */
  size_t client_len;
  /**
   * The tag of the stream's events, such as the address of the caller's own data of this stream.
   */
  uint64_t tag;
  /**
   * Options, or NULL for the defaults.
   */
  const struct presence_config *config;
} presence_request_args;

/**
 * What a connection has done since presence_connect, and its present state.
 */
typedef struct presence_stats {
  /**
   * 1 while there is a connection to nats-server, otherwise 0.
   */
  uint64_t connected;
  /**
   * How often a connection to nats-server was made. Above 1, it was lost in between.
   */
  uint64_t connects;
  /**
   * Running streams that were requested here.
   */
  uint64_t streams;
  /**
   * Running streams that are served here.
   */
  uint64_t senders;
  /**
   * Requests that services here received.
   */
  uint64_t requests;
  /**
   * Requests that were answered with "server busy".
   */
  uint64_t requests_busy;
  /**
   * Requests that were ignored or refused: without a reply subject, with one that may not be answered, or with an
   * invalid Connect-ID header.
   */
  uint64_t requests_ignored;
  /**
   * Messages of all kinds that were handed to the NATS client.
   */
  uint64_t messages_out;
  /**
   * Messages of all kinds that were received.
   */
  uint64_t messages_in;
  /**
   * Messages that were received for no running stream, or that no peer should have sent.
   */
  uint64_t messages_ignored;
  /**
   * Offline announcements sent.
   */
  uint64_t offline_out;
  /**
   * Offline announcements received from other processes.
   */
  uint64_t offline_in;
  /**
   * Bytes that wait to be handed to the NATS client or, on lanes, to be acknowledged.
   */
  uint64_t bytes_waiting;
  /**
   * Lanes, each of which connects this process to another one with this library.
   */
  uint64_t lanes;
  /**
   * 0.
   */
  uint64_t reserved[6];
} presence_stats;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/* ---- Texts ----------------------------------------------------------------------------------------------- */

/**
 * Returns a short English text for a status. It is never NULL and need not be freed.
 */
const char *presence_status_text(int32_t status);

/**
 * Returns the name of an event's kind, such as "REQUEST", for logs. It is never NULL and need not be freed.
 */
const char *presence_event_kind_text(int32_t kind);

/**
 * Returns the library's version, "major.minor.patch". It need not be freed.
 */
const char *presence_version(void);

/* ---- Connect --------------------------------------------------------------------------------------------- */

/**
 * Connects to nats-server. Waits until a server has accepted the connection, or until all have failed.
 *
 * `url` is one URL or several separated by commas, such as "nats://a:4222,tls://b:4222". A URL may contain user and
 * password, or a token. `config` is NULL for the defaults; the library does not keep it.
 *
 * Servers, and the addresses of a server's name, are tried in random order, those that failed in the last minute after
 * the others. The next one is tried as well when one has not answered for 250 ms. The other servers of a cluster,
 * which nats-server names, are tried too; the certificate of one that is named by its address may be for the host name
 * in the URL. The library reconnects whenever the connection is lost.
 *
 * Returns PRESENCE_OK; PRESENCE_INVALID (URL, options), PRESENCE_DISCONNECTED (no server is reached, or all refuse),
 * PRESENCE_TIMEOUT, PRESENCE_FULL (the system gives no thread or file descriptor), PRESENCE_FORKED.
 *
 * The caller owns `*out` and must call presence_close.
 */
PRESENCE_NODISCARD
presence_status presence_connect(const char *url,
                                 const struct presence_config *config,
                                 struct presence_conn **out,
                                 struct presence_error *error);

/**
 * Applies the offline announcements of other processes in this one. presence_serve does so too. A second call has no
 * effect.
 *
 * Waits until nats-server has the subscription. Without a connection it returns at once, and the subscription is made
 * after the reconnect.
 *
 * Returns PRESENCE_OK; PRESENCE_TIMEOUT, PRESENCE_CLOSED; PRESENCE_DISCONNECTED (permissions) or PRESENCE_FULL
 * (max_subscriptions) if nats-server refuses the subscription, which is then tried again.
 */
presence_status presence_listen_offline(struct presence_conn *conn);

/**
 * Adds events with `tag` to the queue when this connection is made (PRESENCE_EVENT_CONNECTED) and lost
 * (PRESENCE_EVENT_DISCONNECTED), and when there is something that an operator should know (PRESENCE_EVENT_LOG).
 *
 * Up to 16 LOG events from before the first call come first. A second call for the same queue changes its tag.
 *
 * Returns PRESENCE_OK or PRESENCE_CLOSED.
 */
presence_status presence_conn_watch(struct presence_conn *conn, struct presence_queue *queue, uint64_t tag);

/**
 * Closes a connection and frees it.
 *
 * Services stop. Senders and streams that still run end with PRESENCE_CLOSED, and the other ends are notified. Then it
 * waits, for at most `drain_ms`, until nats-server and the other ends of lanes have all that was sent before. It never
 * waits for a reconnect. The handles of the connection's services, senders and streams must still be freed.
 *
 * Returns PRESENCE_OK if all was delivered. After PRESENCE_TIMEOUT and PRESENCE_DISCONNECTED (there is no connection,
 * or it was lost meanwhile) it may not have been, but the connection is closed all the same. PRESENCE_CLOSED: it was
 * closed before.
 */
presence_status presence_close(struct presence_conn *conn, int64_t drain_ms);

/* ---- Read events ----------------------------------------------------------------------------------------- */

/**
 * Creates a queue.
 *
 * Returns PRESENCE_OK. The caller owns `*out` and must call presence_queue_free.
 */
PRESENCE_NODISCARD presence_status presence_queue_new(struct presence_queue **out);

/**
 * Returns a file descriptor that is readable (poll, epoll, asyncio, libuv) while a wait would return at once, or a
 * negative presence_status: PRESENCE_FULL if the system has no file descriptor left.
 *
 * The queue owns it: do not read, write or close it.
 */
int presence_queue_fd(const struct presence_queue *queue);

/**
 * Waits for events, and fills `events` with up to `max` of them. The events of the last wait become invalid.
 *
 * Returns how many there are; 0 if `timeout_ms` passed or presence_queue_wake was called; or PRESENCE_INVALID,
 * PRESENCE_BUSY (another thread waits), PRESENCE_CLOSED (the queue was freed), PRESENCE_FORKED.
 *
 * *Thread safety*: one thread at a time may wait, and not while another one still reads the events of the last wait.
 */
PRESENCE_NODISCARD
int64_t presence_queue_wait(struct presence_queue *queue,
                            struct presence_event *events,
                            size_t max,
                            int64_t timeout_ms);

/**
 * Makes the thread that waits on the queue return 0, or else the next wait.
 */
void presence_queue_wake(struct presence_queue *queue);

/**
 * Frees a queue and the events in it. A thread that waits on it gets PRESENCE_CLOSED, and has left when this returns.
 *
 * Services and streams that use the queue go on without events. Requests, queued and new, are answered with an error.
 *
 * *Thread safety*: no thread may still read the events of the last wait.
 */
void presence_queue_free(struct presence_queue *queue);

/* ---- Serve: the worker's side ---------------------------------------------------------------------------- */

/**
 * Serves a subject: each request is a PRESENCE_EVENT_REQUEST with `tag` in `queue`. The subject may have wildcards.
 * Also does what presence_listen_offline does.
 *
 * Processes that serve the subject in the same `group` share the requests: each request goes to one of them. NULL or
 * "" is no group: each request goes to all. At most `max_streams` streams run at once (0: 10,000); further requests
 * are answered with "server busy".
 *
 * Waits until nats-server has the subscription. Without a connection it returns at once, and the subscription is made
 * after the reconnect. If nats-server refuses the subscription later, or takes it back when its configuration changes,
 * one PRESENCE_EVENT_DISCONNECTED with `tag` and the subject comes to `queue`. The subscription is tried again with
 * the delays of a reconnect, and a PRESENCE_EVENT_CONNECTED with `tag` and the subject reports success. Running
 * streams go on.
 *
 * Returns PRESENCE_OK; PRESENCE_INVALID, PRESENCE_TIMEOUT, PRESENCE_CLOSED; PRESENCE_DISCONNECTED (permissions) or
 * PRESENCE_FULL (max_subscriptions), with the text of nats-server, if it refuses the subscription.
 *
 * The caller owns `*out` and must call presence_service_free.
 */
PRESENCE_NODISCARD
presence_status presence_serve(struct presence_conn *conn,
                               struct presence_queue *queue,
                               const char *subject,
                               const char *group,
                               uint32_t max_streams,
                               uint64_t tag,
                               struct presence_service **out,
                               struct presence_error *error);

/**
 * Stops a service: it accepts no more requests. Running streams go on.
 *
 * Returns PRESENCE_OK, or PRESENCE_CLOSED if it was stopped before.
 */
presence_status presence_service_stop(struct presence_service *service);

/**
 * Stops a service and frees it. Its senders go on, and must still be freed.
 */
void presence_service_free(struct presence_service *service);

/**
 * Sets the tag of the sender's PRESENCE_EVENT_STOPPED and PRESENCE_EVENT_WRITABLE, such as the address of the caller's
 * own data of this stream. Until then they have the tag of the service.
 *
 * A wait that returns a PRESENCE_EVENT_REQUEST returns no later event of its sender. So if the tag is set before the
 * next wait, no event has the tag of the service.
 *
 * Returns PRESENCE_OK or PRESENCE_INVALID.
 */
presence_status presence_sender_set_tag(struct presence_sender *sender, uint64_t tag);

/**
 * Sends one message of the stream. Never blocks.
 *
 * Returns PRESENCE_OK; PRESENCE_OFFLINE once the client is offline, and for ever after; PRESENCE_FULL if the message
 * does not fit now: a PRESENCE_EVENT_WRITABLE comes when to try again, which is when the reader has taken some
 * messages, or when half of send_buffer_bytes is free.
 *
 * PRESENCE_TOO_LARGE (see presence_sender_max_message) and, on level 0, PRESENCE_RESERVED concern this message only,
 * and the stream goes on. Other statuses are why it has ended: PRESENCE_CLOSED; on a lane PRESENCE_CANCELLED and
 * PRESENCE_PEER_GONE; on level 0 PRESENCE_DISCONNECTED.
 */
PRESENCE_NODISCARD presence_status presence_sender_send(struct presence_sender *sender, const void *data, size_t len);

/**
 * Sends several messages of the stream, up to the first that is refused. Never blocks.
 *
 * `data` contains the messages one after the other, and `lens` their `count` lengths.
 *
 * Returns how many were sent. If that is fewer than `count`, the next call returns why. If the first one is refused,
 * returns what presence_sender_send would return for it.
 */
PRESENCE_NODISCARD
int64_t presence_sender_send_many(struct presence_sender *sender,
                                  const void *data,
                                  const size_t *lens,
                                  size_t count);

/**
 * As presence_sender_send, but where that would return PRESENCE_FULL this blocks until the message is sent, for at
 * most `timeout_ms`. The end of the stream ends the wait too.
 *
 * Returns what presence_sender_send returns, but PRESENCE_TIMEOUT in place of PRESENCE_FULL.
 */
PRESENCE_NODISCARD
presence_status presence_sender_send_wait(struct presence_sender *sender,
                                          const void *data,
                                          size_t len,
                                          int64_t timeout_ms);

/**
 * Ends the stream with an error. The reader gets `message`, which may be any bytes, or NULL with `len` 0 for no text.
 * It is truncated to what nats-server takes in one message, and on a lane without capacity for more to 256 bytes.
 *
 * Returns PRESENCE_OK; PRESENCE_CLOSED if the stream has ended already; why it was stopped, if it was.
 */
presence_status presence_sender_error(struct presence_sender *sender, const char *message, size_t len);

/**
 * As presence_sender_error, and the reader also gets `code` as the `error_code` of its PRESENCE_EVENT_ERROR. The code is
 * a number that the application chooses, from 1 to 2147483647; 0 is no code. Readers that do not know codes get the
 * text.
 *
 * Returns what presence_sender_error returns; PRESENCE_INVALID for a negative code, and the stream goes on.
 */
presence_status presence_sender_error_code(struct presence_sender *sender,
                                           int32_t code,
                                           const char *message,
                                           size_t len);

/**
 * Ends the stream.
 *
 * Returns PRESENCE_OK, also if the caller has ended it before; why it was stopped, if it was.
 */
presence_status presence_sender_end(struct presence_sender *sender);

/**
 * Returns true if the stream has ended, for whatever reason, so that no message can be sent. True for NULL.
 */
bool presence_sender_is_closed(const struct presence_sender *sender);

/**
 * Returns the size limit of a message, in bytes: max_payload of the present nats-server, less 64. It is the same on
 * lanes and on level 0. 0 for NULL.
 */
size_t presence_sender_max_message(const struct presence_sender *sender);

/**
 * Returns how many messages were sent so far. 0 for NULL.
 */
uint64_t presence_sender_send_count(const struct presence_sender *sender);

/**
 * Returns the address of the sender's status word, or NULL for NULL. The word is 0 while the stream runs. When the
 * stream ends, it becomes, for ever, the presence_status that says why, as a uint32_t.
 *
 * Reading it is the cheapest way to see whether the client has left: use a relaxed atomic load of 32 bits, from any
 * thread, until the sender is freed.
 */
const uint32_t *presence_sender_status_word(const struct presence_sender *sender);

/**
 * Reads a header of the request. `name` is compared as it was sent. If there are several with this name, reads the
 * first.
 *
 * `*value` is not NUL-terminated, and valid until the sender is freed. It is NULL if there is no such header.
 *
 * Returns PRESENCE_OK or PRESENCE_INVALID.
 */
presence_status presence_sender_header(const struct presence_sender *sender,
                                       const char *name,
                                       const char **value,
                                       size_t *len);

/**
 * Reads the request's header number `index`, counted from 0. A name that has several values is as many headers, in the
 * order of the values. `Connect-ID` is the first one, if the request has a client.
 *
 * `*name` and `*value` are not NUL-terminated, and valid until the sender is freed. They are NULL if there are not so
 * many headers.
 *
 * Returns PRESENCE_OK or PRESENCE_INVALID.
 */
presence_status presence_sender_header_at(const struct presence_sender *sender,
                                          size_t index,
                                          const char **name,
                                          size_t *name_len,
                                          const char **value,
                                          size_t *value_len);

/**
 * Returns the request's reply subject, and its length in `*len`. It is not NUL-terminated, and valid until the sender
 * is freed. NULL for NULL.
 *
 * It is for logs and for peers on level 0: on a lane, what is published to it is ignored. Answer with
 * presence_sender_send.
 */
const char *presence_sender_reply(const struct presence_sender *sender, size_t *len);

/**
 * Frees a sender. A stream that has not ended ends with an error at the reader.
 *
 * *Thread safety*: no other thread may use the sender or its status word any longer.
 */
void presence_sender_free(struct presence_sender *sender);

/* ---- Request: the gateway's side ------------------------------------------------------------------------- */

/**
 * Requests a stream for a client from a worker that serves `args->subject`. Does not wait for the worker.
 *
 * Each message of the stream is a PRESENCE_EVENT_DATA with `args->tag` in `queue`. Exactly one PRESENCE_EVENT_END or
 * PRESENCE_EVENT_ERROR follows. The library keeps nothing of `args`.
 *
 * The request tells the worker the client's id. The client is online in this process while the stream runs, and
 * mark_client_offline ends the stream with PRESENCE_OFFLINE. Without a client (`args->client_len` is 0), no mark stops
 * the stream's worker.
 *
 * Returns PRESENCE_OK; PRESENCE_INVALID, PRESENCE_TOO_LARGE, PRESENCE_FULL (the send buffer is full),
 * PRESENCE_DISCONNECTED, PRESENCE_CLOSED; with the option only_online PRESENCE_OFFLINE.
 *
 * Later errors are the `status` of the PRESENCE_EVENT_ERROR: PRESENCE_NO_RESPONDERS (no worker serves the subject),
 * PRESENCE_BUSY (the worker has no capacity), PRESENCE_OFFLINE (the client is offline in this process or the
 * worker's), PRESENCE_REMOTE (the worker ended the stream with this text, and with `error_code` if that is not 0),
 * PRESENCE_FULL, PRESENCE_TIMEOUT, PRESENCE_PEER_GONE, PRESENCE_DISCONNECTED, PRESENCE_CANCELLED, PRESENCE_CLOSED.
 *
 * The caller owns `*out` and must call presence_stream_free.
 */
PRESENCE_NODISCARD
presence_status presence_request(struct presence_conn *conn,
                                 struct presence_queue *queue,
                                 const struct presence_request_args *args,
                                 struct presence_stream **out,
                                 struct presence_error *error);

/**
 * Returns the tag that was passed to presence_request. 0 for NULL and for a stream that was freed.
 */
uint64_t presence_stream_tag(const struct presence_stream *stream);

/**
 * Returns the client's id, and its length in `*len`. It is not NUL-terminated, and valid until the stream is freed.
 * NULL for NULL and for a stream that was freed.
 */
const char *presence_stream_client(const struct presence_stream *stream, size_t *len);

/**
 * Reports that `bytes` of the stream's messages, which have left the queue, were consumed, so that the worker may send
 * as many more. Only for streams with the option manual_credit: for others, messages that leave the queue are
 * consumed, and this has no effect.
 *
 * One call may report many messages; the 64 bytes that each counts in addition are added here. Report 0 for messages
 * without bytes. More than there was counts as all.
 *
 * Returns PRESENCE_OK, or PRESENCE_CLOSED if the stream has ended.
 */
presence_status presence_stream_consumed(struct presence_stream *stream, size_t bytes);

/**
 * Cancels a running stream: it ends with a PRESENCE_EVENT_ERROR whose status is PRESENCE_CANCELLED, and the worker is
 * notified.
 *
 * On a lane this stops the stream's sender, with PRESENCE_CANCELLED, and nothing else. A worker on level 0 can be
 * stopped only by announcing the client offline, which also stops the client's streams at other gateways. The
 * announcement is made unless another stream, a session or a mark keeps the client online here; then the worker goes
 * on. Before the worker's first answer it is not known which of the two it is: the announcement, if there is one,
 * follows that answer, or 5 seconds without one.
 *
 * Returns PRESENCE_OK, or PRESENCE_CLOSED if the stream has ended already.
 */
presence_status presence_stream_cancel(struct presence_stream *stream);

/**
 * Frees a stream. One that runs is cancelled. No wait that begins after this returns an event of it.
 */
void presence_stream_free(struct presence_stream *stream);

/* ---- Presence: who is online ----------------------------------------------------------------------------- */

/**
 * Marks a client online in this process, until mark_client_offline or an announcement marks it offline.
 *
 * A second mark has no effect, and neither has the empty id. The mark is not announced: a request tells the worker
 * which client it is for.
 *
 * Returns PRESENCE_OK or PRESENCE_INVALID.
 */
presence_status mark_client_online(const char *client_id);

/**
 * Marks a client offline. Before this returns, the client's senders and streams in this process have stopped, and its
 * sessions are over: no send to this client is accepted any more. Every open connection announces it to the other
 * processes, unless its option announce says otherwise.
 *
 * A client that is unknown here is announced too, because other processes may know it. The empty id has no effect.
 * This never blocks: without a connection to nats-server the announcement waits for the reconnect.
 *
 * Returns PRESENCE_OK or PRESENCE_INVALID.
 */
presence_status mark_client_offline(const char *client_id);

/**
 * Returns true if a client is online in this process: it is marked online, has an open session, or has a running
 * stream.
 *
 * The empty id is always online. NULL, an invalid id and an unknown id are not.
 */
bool is_client_online(const char *client_id);

/**
 * As mark_client_online, for an id of `len` bytes without a NUL.
 */
presence_status presence_mark_online(const char *id, size_t len);

/**
 * As mark_client_offline, for an id of `len` bytes without a NUL.
 */
presence_status presence_mark_offline(const char *id, size_t len);

/**
 * Marks many clients online (`online` is true) or offline, each as presence_mark_online and presence_mark_offline do.
 *
 * `ids` contains the ids one after the other, and `lens` their `count` lengths. The more ids a call has, up to about
 * 10,000, the less time each one needs. The order in which different clients are marked is not defined.
 *
 * Returns PRESENCE_OK; PRESENCE_INVALID if one of the ids is invalid: `error` says which one, counted from 0, and why,
 * and no client was marked.
 */
presence_status presence_mark_many(bool online,
                                   const char *ids,
                                   const size_t *lens,
                                   size_t count,
                                   struct presence_error *error);

/**
 * As is_client_online, for an id of `len` bytes without a NUL.
 */
bool presence_is_online(const char *id, size_t len);

/**
 * Returns how many clients are online in this process.
 */
uint64_t presence_online_count(void);

/**
 * Opens a session of a client, for one of its connections to this process. The client is online here as long as one of
 * its sessions is open.
 *
 * A client may have sessions in several gateway processes, each of which knows its own only. A session of the empty id
 * has no effect.
 *
 * Returns PRESENCE_OK or PRESENCE_INVALID. The caller owns `*out` and must call presence_session_close.
 */
PRESENCE_NODISCARD presence_status presence_session_open(const char *id, size_t len, struct presence_session **out);

/**
 * Returns true if the client is still online by this session: it was not closed, and the client was not marked offline
 * since it was opened, not even if the client has come back meanwhile. False for NULL.
 */
bool presence_session_is_open(const struct presence_session *session);

/**
 * Closes a session and frees it.
 *
 * When a client's last session in this process is closed, and none is opened within session_grace_ms (default 0: at
 * once), the streams that this process requested for the client end with PRESENCE_OFFLINE, unless the client is also
 * marked online. Streams that other processes requested go on, because the client may be connected to those processes;
 * mark_client_offline ends them too.
 *
 * **A worker on level 0 can be stopped only by announcing the client offline to all processes.** So if one of the
 * streams that end here is on level 0, the client's streams at all other gateways end too. If clients are connected to
 * several gateways at a time, run this library in all workers, with lanes.
 */
void presence_session_close(struct presence_session *session);

/**
 * Adds an event with `tag` to the queue whenever a client comes online (PRESENCE_EVENT_ONLINE) or goes offline
 * (PRESENCE_EVENT_OFFLINE) in this process.
 *
 * A second call for the same queue changes its tag. The queue holds at most 65,536 of these events. Further ones are
 * dropped, and one PRESENCE_EVENT_LOG with PRESENCE_FULL says so.
 *
 * Returns PRESENCE_OK or PRESENCE_CLOSED.
 */
presence_status presence_watch(struct presence_queue *queue, uint64_t tag);

/* ---- Options --------------------------------------------------------------------------------------------- */

/* The names of options, which presence_config_set describes. */
#define PRESENCE_OPTION_NAME "name"
#define PRESENCE_OPTION_USER "user"
#define PRESENCE_OPTION_PASSWORD "password"
#define PRESENCE_OPTION_TOKEN "token"
#define PRESENCE_OPTION_NKEY_SEED "nkey_seed"
#define PRESENCE_OPTION_CREDS_FILE "creds_file"
#define PRESENCE_OPTION_AUTH_SOCKET "auth_socket"
#define PRESENCE_OPTION_TLS_REQUIRED "tls_required"
#define PRESENCE_OPTION_TLS_FIRST "tls_first"
#define PRESENCE_OPTION_TLS_CA_FILE "tls_ca_file"
#define PRESENCE_OPTION_TLS_CERT_FILE "tls_cert_file"
#define PRESENCE_OPTION_TLS_KEY_FILE "tls_key_file"
#define PRESENCE_OPTION_CONNECT_TIMEOUT_MS "connect_timeout_ms"
#define PRESENCE_OPTION_RETRY_ON_INITIAL_CONNECT "retry_on_initial_connect"
#define PRESENCE_OPTION_RECONNECT_MIN_MS "reconnect_min_ms"
#define PRESENCE_OPTION_RECONNECT_MAX_MS "reconnect_max_ms"
#define PRESENCE_OPTION_MAX_RECONNECTS "max_reconnects"
#define PRESENCE_OPTION_PING_INTERVAL_MS "ping_interval_ms"
#define PRESENCE_OPTION_INBOX_PREFIX "inbox_prefix"
#define PRESENCE_OPTION_OFFLINE_SUBJECT "offline_subject"
#define PRESENCE_OPTION_ANNOUNCE "announce"
#define PRESENCE_OPTION_LANES "lanes"
#define PRESENCE_OPTION_DISCOVERY "discovery"
#define PRESENCE_OPTION_HEARTBEAT_MS "heartbeat_ms"
#define PRESENCE_OPTION_PEER_GRACE_MS "peer_grace_ms"
#define PRESENCE_OPTION_SEND_BUFFER_BYTES "send_buffer_bytes"
#define PRESENCE_OPTION_RECEIVE_BUFFER_BYTES "receive_buffer_bytes"
#define PRESENCE_OPTION_SESSION_GRACE_MS "session_grace_ms"
#define PRESENCE_OPTION_WORKER_THREADS "worker_threads"
#define PRESENCE_OPTION_TIMEOUT_MS "timeout_ms"
#define PRESENCE_OPTION_RETRIES "retries"
#define PRESENCE_OPTION_RETRY_DELAY_MS "retry_delay_ms"
#define PRESENCE_OPTION_STREAM_BUFFER_BYTES "stream_buffer_bytes"
#define PRESENCE_OPTION_MANUAL_CREDIT "manual_credit"
#define PRESENCE_OPTION_ONLY_ONLINE "only_online"
/* Before the name of a header: PRESENCE_OPTION_HEADER "X-Model" */
#define PRESENCE_OPTION_HEADER "header."

/**
 * Creates a set of options, all of which have their defaults.
 *
 * Returns NULL only after a defect of the library. The caller owns the result and must call presence_config_free.
 */
PRESENCE_NODISCARD struct presence_config *presence_config_new(void);

/**
 * Sets one option. Files are read when they are used.
 *
 * Returns PRESENCE_OK; PRESENCE_INVALID for an unknown key or an invalid value, which changes nothing:
 * presence_config_error says what was wrong.
 *
 * Options for presence_connect
 *   - name: the connection's name in the monitoring of nats-server. Default "nats-presence".
 *   - user and password, token, nkey_seed, or creds_file: how to authenticate. The URL may contain user and password,
 *     or a token, instead.
 *   - auth_socket: in place of all these, the path of a Unix socket. For each attempt to connect, the library connects
 *     to it and writes the nonce of nats-server and a line feed. It then reads lines until the end, each of which is a
 *     name, a space and a value: user, password, token, jwt, nkey, signature (of the nonce, in hexadecimal digits), or
 *     error and a text. Use it for secrets that change, or that another process has.
 *   - tls_required, tls_first: true or false (default). tls_ca_file, tls_cert_file, tls_key_file: PEM files. Each of
 *     these except tls_required implies tls_required.
 *   - connect_timeout_ms: the limit for each address of each server, and for presence_serve and
 *     presence_listen_offline to get an answer of nats-server. Default 5000.
 *   - retry_on_initial_connect: true: presence_connect returns at once and connects in the background. Default false.
 *   - reconnect_min_ms, reconnect_max_ms: the delay before a reconnect doubles from the one to the other; a random
 *     half of it is jitter. Defaults 50 and 4000. The first attempt is made at once, unless the connection was lost as
 *     soon as it was made.
 *   - max_reconnects: the connection is closed after so many failed attempts in a row. Default 0: never.
 *   - ping_interval_ms: how often nats-server is pinged. The connection is lost after two unanswered pings. Default
 *     20000.
 *   - inbox_prefix: the prefix of the subjects that answers are sent to. Default "_INBOX".
 *   - offline_subject: the subject of offline announcements, the same in all processes. Default "client.offline".
 *   - announce: which calls of mark_client_offline are announced to other processes: always (default): all; streams:
 *     those for clients with running streams that were requested here and are not on a lane; never: none. With always
 *     and streams, the ends of level-0 streams, and of sessions with such streams, are announced too.
 *   - lanes: true (default): streams use a lane if the other end runs this library; false: all streams of the
 *     connection use level 0.
 *   - discovery: true (default): a connection that serves subjects answers NATS's service protocol ($SRV.PING, INFO and
 *     STATS), so that `nats micro ls`, `info` and `stats` show it, under the option name; false: it does not.
 *   - heartbeat_ms: how often the peer of a lane that sends nothing is probed while streams run. It is gone after
 *     three intervals without a message. Default 5000.
 *   - peer_grace_ms: how long the peer of a lane may be away after nats-server has reported that it is not there (it
 *     was killed, or it reconnects), before it is gone. Set 0 to stop at once. Default 1000 for a peer on the same
 *     nats-server, and 3000 for others, because servers need a little over a second to restore a broken link.
 *   - send_buffer_bytes: how many bytes may wait to be sent and, on each lane, to be acknowledged. Above it, sends
 *     return PRESENCE_FULL. Default 4194304.
 *   - receive_buffer_bytes: how many bytes may be unread on the connection. Default 67108864. On lanes: once the
 *     windows of its streams (stream_buffer_bytes) add up to it, further streams get windows of 8192 bytes. On level
 *     0: while so much is unread, a stream that has more than a 64th of it ends with PRESENCE_FULL.
 *   - session_grace_ms: how long a client stays online after its last session. It applies to all sessions of the
 *     process; the last presence_connect that sets it wins. Default 0.
 *   - worker_threads: how many threads the library runs in this process, 1 to 64. The first presence_connect decides.
 *     Default 1.
 *
 * Options for presence_request
 *   - timeout_ms: the limit from the request to the end of the stream, which then ends with PRESENCE_TIMEOUT. Default
 *     0: no limit.
 *   - retries, retry_delay_ms: how often, and after what delay, the request is sent again while no worker serves the
 *     subject or the worker is busy, and no message has come. Defaults 0 and 100.
 *   - stream_buffer_bytes: how many bytes of the stream may wait in the queue, plus 64 for each message. On a lane it
 *     is the stream's window, at most 4194304: the worker is slowed down, and a stream carries at most so much per
 *     round trip. Each slow reader keeps up to so much in memory. Without this option the window is 262144 at first,
 *     and grows up to 4194304 while the reader is fast. On level 0 nothing slows the worker down, and the stream ends
 *     with PRESENCE_FULL. Default 67108864.
 *   - manual_credit: true: a message counts towards stream_buffer_bytes until presence_stream_consumed reports it;
 *     false (default): until it has left the queue.
 *   - only_online: true: a request for a client that is offline in this process fails with PRESENCE_OFFLINE. Use it
 *     for clients that are marked online or have a session, so that a late request does not bring them back. Default
 *     false.
 *   - header.NAME: a header of the request, such as header.X-Model. Connect-ID, Nats-* and Presence-* are reserved.
 */
presence_status presence_config_set(struct presence_config *config, const char *key, const char *value);

/**
 * Fills `error` with what was wrong in the last presence_config_set that failed on these options.
 *
 * Returns the status of that call, or PRESENCE_OK if none failed, which leaves `error` unchanged.
 */
presence_status presence_config_error(const struct presence_config *config, struct presence_error *error);

/**
 * Frees a set of options. Connections and streams that were made with it do not need it.
 */
void presence_config_free(struct presence_config *config);

/* ---- Statistics ------------------------------------------------------------------------------------------ */

/**
 * Fills `out` with the statistics of a connection.
 *
 * Returns PRESENCE_OK or PRESENCE_CLOSED.
 */
presence_status presence_conn_stats(const struct presence_conn *conn, struct presence_stats *out);

/**
 * Writes the metrics of this process, which are those of all its connections together, as OpenMetrics text: the body
 * of an answer to Prometheus, with the content type "application/openmetrics-text; version=1.0.0; charset=utf-8".
 *
 * At most `cap` bytes are written, with a NUL after the text, which is truncated if it does not fit. The last line of
 * a complete text is "# EOF". `buf` may be NULL if `cap` is 0. No label has a client's id; a service's metrics have its
 * subject. docs/metrics.md describes each metric.
 *
 * Returns the length of the text without the NUL. If it is `cap` or more the text was truncated: call again with a
 * larger buffer, and compare again, because the text may have grown. Returns a negative presence_status for an invalid
 * `buf`.
 */
PRESENCE_NODISCARD int64_t presence_metrics(char *buf, size_t cap);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NATS_PRESENCE_H */
