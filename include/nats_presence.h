/*
 * nats-presence: stop work for clients who have left.
 *
 * Generated from src/ffi by cbindgen; do not edit. Link with `pkg-config --cflags --libs nats-presence`.
 *
 * Rules for all of it
 *   - Every function may be called from any thread at any time, unless its comment says otherwise. None calls back.
 *   - None may be called in a signal handler, where it could wait for the very thread that it interrupts; a status word may
 *     be read there. Take signals in a thread of their own (sigwait) or by signalfd.
 *   - Functions that return int32_t return PRESENCE_OK (0) or a negative presence_status. NULL for a handle is
 *     PRESENCE_INVALID; freeing NULL does nothing. A call that fails has changed nothing, except that presence_close closes
 *     the connection whatever it returns.
 *   - A presence_error, where one is taken, may be NULL. It is filled when the call fails, and left alone otherwise.
 *   - Handles are opaque and each is ended by exactly one call to its _free or _close. Except for presence_sender and
 *     presence_config, whose use after free is undefined (a debug build of the library refuses it), a handle that has
 *     ended is recognised: PRESENCE_CLOSED.
 *   - Text is UTF-8. It is given by pointer and length where a length parameter follows, and NUL-terminated elsewhere.
 *     What is passed in is copied before the call returns.
 *   - A client's id is 1 to 1024 bytes of UTF-8 without control characters. The empty id is "no client": always online.
 *   - Subjects have at most 2048 bytes, inbox prefixes and groups 1024.
 *   - A pointer that is not aligned for what it points to is PRESENCE_INVALID (a presence_error then stays as it is).
 *   - Times are milliseconds. A negative timeout waits without limit, 0 does not wait.
 *   - A thread must not be ended within a call: no pthread_cancel, no longjmp or C++ exception out of a signal handler.
 *   - presence_connect needs 64 KiB of its thread's stack, all others 16.
 *   - Where memory is exhausted the process is aborted, by Rust's allocator.
 *   - In a child after fork(), inherited handles answer PRESENCE_FORKED, and freeing them does nothing (a presence_config
 *     is only memory, and goes on).
 */


#ifndef NATS_PRESENCE_H
#define NATS_PRESENCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The number of the ABI, which is the number in the library's SONAME. */
#define PRESENCE_ABI 0


/**
 * Bytes in a presence_error's message, its NUL included.
 */
#define PRESENCE_ERROR_MESSAGE 508

/**
 * How a call ended, or why a stream did. The numbers are fixed for ever.
 */
enum presence_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Done.
   */
  PRESENCE_OK = 0,
  /**
   * An argument is wrong: NULL, not UTF-8, empty, too long, or with a character that may not be there.
   */
  PRESENCE_INVALID = -1,
  /**
   * The client is offline: it was marked so in this process, its last session here was closed, or another process announced
   * or reported it.
   */
  PRESENCE_OFFLINE = -2,
  /**
   * The sender, stream, service, connection or queue has ended already.
   */
  PRESENCE_CLOSED = -3,
  /**
   * The stream was cancelled by its reader. A worker sees it, too, where the client left before the stream had begun.
   */
  PRESENCE_CANCELLED = -4,
  /**
   * No room. A sender has it again at PRESENCE_EVENT_WRITABLE; a stream whose reader was too slow ends with it.
   */
  PRESENCE_FULL = -5,
  /**
   * The message is larger than presence_sender_max_message, or the request larger than nats-server's max_payload.
   */
  PRESENCE_TOO_LARGE = -6,
  /**
   * The stream is on level 0 of the wire, and the other end would take the payload for something else: it begins with
   * "__STREAM_END__" or "__STREAM_ERROR__", or has the form of a JetStream acknowledgement. On a lane any payload is sent.
   */
  PRESENCE_RESERVED = -7,
  /**
   * There is no connection to nats-server now, or it was lost while the stream ran.
   */
  PRESENCE_DISCONNECTED = -8,
  /**
   * The process at the other end is gone.
   */
  PRESENCE_PEER_GONE = -9,
  /**
   * Nobody serves the subject.
   */
  PRESENCE_NO_RESPONDERS = -10,
  /**
   * In use: a queue has one waiter at a time. As the status of a PRESENCE_EVENT_ERROR: the worker runs as many streams as it
   * may, and refused this one.
   */
  PRESENCE_BUSY = -11,
  /**
   * The time given was over.
   */
  PRESENCE_TIMEOUT = -12,
  /**
   * The worker ended the stream with an error; the event's data is its text.
   */
  PRESENCE_REMOTE = -13,
  /**
   * The handle belongs to the parent of this forked process, or the parent had connected before the fork.
   */
  PRESENCE_FORKED = -14,
  /**
   * A defect of this library. It remains usable.
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
 * What an event tells.
 */
enum presence_event_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * A request arrived at a service: `sender` belongs to the receiver from now on, who frees it; `client` is the
   * request's client (empty: anonymous), `subject` the one it came on, `data` its payload.
   */
  PRESENCE_EVENT_REQUEST = 1,
  /**
   * A message of a stream: `stream`, `data`.
   */
  PRESENCE_EVENT_DATA = 2,
  /**
   * The worker ended the stream. Nothing follows for it.
   */
  PRESENCE_EVENT_END = 3,
  /**
   * The stream ended otherwise: `status` is why, `data` a text for people. Nothing follows for it.
   */
  PRESENCE_EVENT_ERROR = 4,
  /**
   * A sender may send no more: `sender`, `client`, and `status` is why. It still has to be freed. Comes once, behind its
   * REQUEST; not where the sender was ended here.
   */
  PRESENCE_EVENT_STOPPED = 5,
  /**
   * A sender that was refused with PRESENCE_FULL may try again: `sender`.
   */
  PRESENCE_EVENT_WRITABLE = 6,
  /**
   * A client came online in this process: `client`. Only on queues given to presence_watch.
   */
  PRESENCE_EVENT_ONLINE = 7,
  /**
   * A client went offline in this process: `client`. Only on queues given to presence_watch.
   */
  PRESENCE_EVENT_OFFLINE = 8,
  /**
   * The connection has reached nats-server: `data` is its address, as host:port. Only on queues given to presence_conn_watch, as the next.
   *
   * With a `subject`, on a service's queue and with its `tag`: nats-server has the service's subscription again.
   */
  PRESENCE_EVENT_CONNECTED = 9,
  /**
   * The connection to nats-server is lost: `data` is why. Until it was made again, streams and senders end with
   * PRESENCE_DISCONNECTED. With `status` PRESENCE_CLOSED it will not be made again.
   *
   * With a `subject`, on a service's queue and with its `tag`: nats-server refuses the service's subscription or has
   * taken it back, and no requests come; `data` is why. See presence_serve.
   */
  PRESENCE_EVENT_DISCONNECTED = 10,
  /**
   * Something that people should know: `data` is a text; `status` and `tag` say what it is about.
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
 * A set of options. Not for use by several threads at once. Made by presence_config_new.
 */
typedef struct presence_config presence_config;

/**
 * A connection to nats-server, kept up until presence_close. Made by presence_connect.
 */
typedef struct presence_conn presence_conn;

/**
 * Where events arrive. Any number of services, streams and watches may share one. Made by presence_queue_new.
 */
typedef struct presence_queue presence_queue;

/**
 * The worker's end of one stream. It comes with PRESENCE_EVENT_REQUEST, and is freed by presence_sender_free.
 *
 * It may be used from any thread, before and after the next wait. Whatever ends it, it stays ended.
 */
typedef struct presence_sender presence_sender;

/**
 * A subject that this process serves. Made by presence_serve.
 */
typedef struct presence_service presence_service;

/**
 * One of several connections of the same client (two tabs of a browser). Made by presence_session_open.
 */
typedef struct presence_session presence_session;

/**
 * A stream that this process requested. Made by presence_request.
 */
typedef struct presence_stream presence_stream;

/**
 * What was wrong: filled by a call that fails.
 */
typedef struct presence_error {
  /**
   * A presence_status; the same as the call returned.
   */
  int32_t status;
  /**
   * Which value was wrong and what would be right, for people: UTF-8, NUL-terminated, cut where it is too long.
   */
  char message[PRESENCE_ERROR_MESSAGE];
} presence_error;

/**
 * What a connection has done since presence_connect, and what it has in hand.
 */
typedef struct presence_stats {
  /**
   * 1 while there is a connection to nats-server, else 0.
   */
  uint64_t connected;
  /**
   * How often a connection to nats-server was made; above 1: it was lost in between.
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
   * Requests that came to the services here.
   */
  uint64_t requests;
  /**
   * Requests answered with "server busy".
   */
  uint64_t requests_busy;
  /**
   * Requests not answered or refused: no reply subject, one that must not be answered to, a wrong Connect-ID.
   */
  uint64_t requests_ignored;
  /**
   * Messages given to the NATS client, of all kinds.
   */
  uint64_t messages_out;
  /**
   * Messages that came in, of all kinds.
   */
  uint64_t messages_in;
  /**
   * Messages that came in for no running stream, or that nobody should have sent.
   */
  uint64_t messages_ignored;
  /**
   * Offline announcements sent.
   */
  uint64_t offline_out;
  /**
   * Offline announcements of other processes that came in.
   */
  uint64_t offline_in;
  /**
   * Bytes that wait to be given to the NATS client; on lanes, to be acknowledged.
   */
  uint64_t bytes_waiting;
  /**
   * Lanes: other processes with this library that streams run, or ran, to or from.
   */
  uint64_t lanes;
  /**
   * 0.
   */
  uint64_t reserved[6];
} presence_stats;

/**
 * Something that happened. Which fields are set depends on `kind`; the others are 0 or NULL. What is set is not NULL, even
 * where its length is 0.
 *
 * `client`, `subject` and `data` (none of them NUL-terminated), and `sender` and `stream` as names of handles already
 * freed, are valid until the next wait on the same queue, or until the queue is freed.
 */
typedef struct presence_event {
  /**
   * A presence_event_kind. More may come: ignore what you do not know.
   */
  int32_t kind;
  /**
   * A presence_status.
   */
  int32_t status;
  /**
   * The caller's number, from presence_serve, presence_request, presence_watch or presence_conn_watch.
   */
  uint64_t tag;
  /**
   * REQUEST: belongs to the receiver from now on. STOPPED, WRITABLE: which.
   */
  struct presence_sender *sender;
  /**
   * DATA, END, ERROR: which.
   */
  struct presence_stream *stream;
  /**
   * REQUEST, STOPPED, WRITABLE, ONLINE, OFFLINE: the client's id; empty for an anonymous one.
   */
  const char *client;
  /**
   * Bytes in `client`.
   */
  size_t client_len;
  /**
   * REQUEST: the subject it came on. CONNECTED, DISCONNECTED: the service's subject; NULL where the connection is meant.
   */
  const char *subject;
  /**
   * Bytes in `subject`.
   */
  size_t subject_len;
  /**
   * REQUEST, DATA: the payload. ERROR, DISCONNECTED, LOG: a text.
   */
  const uint8_t *data;
  /**
   * Bytes in `data`.
   */
  size_t data_len;
  /**
   * 0.
   */
  uint64_t reserved[2];
} presence_event;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * What a status means, in a few English words. Never NULL; static, not to be freed.
 */
const char *presence_status_text(int32_t status);

/**
 * The library's version, "major.minor.patch". Static, not to be freed.
 */
const char *presence_version(void);

/**
 * Makes an empty set of options: every one has its default. NULL only should the library itself fail.
 */
struct presence_config *presence_config_new(void);

/**
 * Sets one option. Files are read when they are used. An unknown key or a wrong value is PRESENCE_INVALID, changes
 * nothing, and presence_config_error tells what was wrong.
 *
 * For presence_connect
 *   - name: the connection's name in the server's monitoring. Default "nats-presence".
 *   - user, password · token · nkey_seed · creds_file: how to authenticate; also possible in the URL.
 *   - tls_required, tls_first: true or false (default). tls_ca_file, tls_cert_file, tls_key_file: PEM files. Each but
 *     tls_required implies that.
 *   - connect_timeout_ms: for each address of each server, and for serve and listen to reach it. Default 5000.
 *   - retry_on_initial_connect: true: presence_connect returns at once and goes on trying. Default false.
 *   - reconnect_min_ms, reconnect_max_ms: the delay before a reconnect doubles between them, each time with a random
 *     half of it as jitter. Defaults 50 and 4000. The first attempt is made at once, unless the connection was
 *     lost as soon as it was made.
 *   - max_reconnects: failed attempts in a row before giving up for good. Default 0: never.
 *   - ping_interval_ms: how often the server is probed; it is lost after two unanswered. Default 20000.
 *   - inbox_prefix: of the subjects that answers come to. Default "_INBOX".
 *   - offline_subject: where clients are announced offline. Default "client.offline". The same in all processes.
 *   - announce: which mark_client_offline is announced to other processes. always (default): each; streams: only of
 *     clients with running streams that were requested here and are not on a lane; never. Also whether the ends of level-0
 *     streams and of sessions with such streams are announced: always and streams: yes; never: no.
 *   - lanes: true (default): where the other end runs this library too, streams are batched, flow-controlled and resumed
 *     after a reconnect; false: all streams of the connection are on level 0 of the wire.
 *   - heartbeat_ms: how often a silent process at the other end of a lane is probed while streams run; after three
 *     intervals without a sign of life it is gone. Default 5000.
 *   - peer_grace_ms: how long a process at the other end of a lane may be away when nats-server says that it is not
 *     there (it was killed, or it reconnects) before it is gone. 0: not at all. Default 1000 for a process on the same
 *     nats-server, 3000 for others, because servers take a little over a second to make a broken link between them again.
 *   - send_buffer_bytes: how much may wait to be sent, and on each lane, to be acknowledged; beyond, sends are
 *     PRESENCE_FULL. Default 4194304.
 *   - receive_buffer_bytes: how much may wait unread on the connection. On lanes: when the windows of its streams
 *     (stream_buffer_bytes) add up to it, further streams have windows of 8192 bytes. On level 0: when so much waits, a
 *     stream that has more than a 64th of it waiting ends with PRESENCE_FULL. Default 67108864.
 *   - session_grace_ms: for all sessions of the process (the last connect that sets it wins). Default 0.
 *   - worker_threads: of the process's runtime, 1 to 64 (the first connect decides). Default 1.
 *
 * For presence_request
 *   - timeout_ms: from request to end; beyond, the stream ends with PRESENCE_TIMEOUT. Default 0: none.
 *   - retries, retry_delay_ms: how often, and how much later, to ask again while nobody serves the subject or the
 *     worker is busy, and no message has come. Defaults 0 and 100.
 *   - stream_buffer_bytes: what may wait in the queue for one stream, with 64 for each message. On a lane the worker is
 *     held back in time; it is 4194304 at most, and 262144 by default. So many slow readers keep as many times
 *     that in memory, and one stream carries at most so much in a round trip. On level 0, where nothing holds the
 *     worker back, the stream ends with PRESENCE_FULL; default 67108864.
 *   - manual_credit: true: a message waits, for stream_buffer_bytes, until presence_stream_consumed tells that it was
 *     used; false (default): until it has left the queue.
 *   - only_online: true: a request for a client that is offline in this process fails with PRESENCE_OFFLINE. For clients
 *     that are marked online or have a session: a request that is late then does not bring them back. Default false.
 *   - header.NAME: a header for the worker, as in header.X-Model. Connect-ID, Nats-… and Presence-… are not yours.
 *
 * # Safety
 * `config` is NULL or was made by presence_config_new; `key` and `value` are NULL (PRESENCE_INVALID) or NUL-terminated.
 */
int32_t presence_config_set(struct presence_config *config,
                            const char *key,
                            const char *value);

/**
 * Tells what the last failed presence_config_set on this set of options found wrong.
 *
 * Returns its status, which is PRESENCE_OK when none failed; then `error` is left alone.
 *
 * # Safety
 * `config` is NULL (PRESENCE_INVALID) or was made by presence_config_new; `error` is NULL or writable.
 */
int32_t presence_config_error(const struct presence_config *config, struct presence_error *error);

/**
 * Frees a set of options. What was made with it does not need it any longer.
 *
 * # Safety
 * `config` is NULL or was made by presence_config_new and not freed yet.
 */
void presence_config_free(struct presence_config *config);

/**
 * Connects to nats-server, waiting until it is reached or cannot be.
 *
 * `url` is one URL or several with commas between, as in "nats://a:4222,tls://b:4222"; user and password, or a token,
 * may stand in it. Servers, and the addresses of a server's name, are tried in random order, those that failed in the
 * last minute after the others; the next one when the one before has not answered for 250 ms. The others of a cluster,
 * as the server that took us names them, are tried as well; the certificate of one that is named by its address may be
 * for the host name in the URL. The connection is made anew whenever it is lost.
 * Errors: PRESENCE_INVALID (URL, options), PRESENCE_DISCONNECTED (cannot be reached, or refuses us), PRESENCE_TIMEOUT,
 * PRESENCE_FULL (the system gives no thread or file descriptor), PRESENCE_FORKED.
 *
 * # Safety
 * `url` is NULL (PRESENCE_INVALID) or NUL-terminated; `config` is NULL (defaults) or was made by presence_config_new;
 * `out` is NULL (PRESENCE_INVALID) or writable; `error` is NULL or writable.
 */
int32_t presence_connect(const char *url,
                         const struct presence_config *config,
                         struct presence_conn **out,
                         struct presence_error *error);

/**
 * Applies the offline announcements of other processes in this one. presence_serve does it too; a second call is fine.
 *
 * Waits until the server has the subscription. Without a connection now it returns at once, and it is done later. Where
 * nats-server refuses it: PRESENCE_DISCONNECTED (permissions) or PRESENCE_FULL (max_subscriptions); it is tried again.
 */
int32_t presence_listen_offline(struct presence_conn *conn);

/**
 * Has the queue tell from now on, with `tag`, when this connection is made and lost, and what else people should know
 * of it (PRESENCE_EVENT_CONNECTED, DISCONNECTED, LOG). What nats-server complained of before anybody watched comes first, up to 16
 * events. A second call for the same queue changes its tag.
 */
int32_t presence_conn_watch(struct presence_conn *conn,
                            struct presence_queue *queue,
                            uint64_t tag);

/**
 * Closes a connection and frees it. Services stop; senders and streams that still run end with PRESENCE_CLOSED, and the
 * other ends are told; then it waits, at most `drain_ms` (negative: without limit), until the server has all that was
 * sent before. It does not wait for a connection: without one now, or when it is lost meanwhile, PRESENCE_DISCONNECTED
 * comes at once.
 *
 * PRESENCE_OK: the server has it all. PRESENCE_TIMEOUT, PRESENCE_DISCONNECTED: it may not; the connection is closed all
 * the same. PRESENCE_CLOSED: it was closed already. The handles of its services, senders and streams remain to be freed.
 */
int32_t presence_close(struct presence_conn *conn,
                       int64_t drain_ms);

/**
 * Reads what a connection has done so far.
 *
 * # Safety
 * `out` is NULL (PRESENCE_INVALID) or writable.
 */
int32_t presence_conn_stats(const struct presence_conn *conn, struct presence_stats *out);

/**
 * Requests a stream for a client. Its messages are PRESENCE_EVENT_DATA, with `tag`, on `queue`, and then exactly one
 * PRESENCE_EVENT_END or PRESENCE_EVENT_ERROR. Does not wait for the worker.
 *
 * The client, whom the request makes known to the worker, is online here as long as the stream runs; with id_len 0 the
 * stream belongs to no client, and cannot be stopped at the worker. A mark_client_offline ends it with PRESENCE_OFFLINE.
 * Errors: PRESENCE_INVALID, PRESENCE_TOO_LARGE, PRESENCE_FULL (too much waits to be sent), PRESENCE_DISCONNECTED;
 * PRESENCE_OFFLINE with the option only_online.
 * Later errors are the status of the stream's PRESENCE_EVENT_ERROR: PRESENCE_NO_RESPONDERS where no worker serves the
 * subject, PRESENCE_BUSY where the worker had no capacity, PRESENCE_OFFLINE where this process or the worker's has learned
 * that the client is offline, PRESENCE_REMOTE with the worker's text.
 *
 * # Safety
 * `subject` is NULL (PRESENCE_INVALID) or NUL-terminated; `data` is readable for `len` bytes and `client_id` for
 * `id_len`; `config` is NULL (defaults) or was made by presence_config_new; `out` is NULL (PRESENCE_INVALID) or writable;
 * `error` is NULL or writable.
 */
int32_t presence_request(struct presence_conn *conn,
                         struct presence_queue *queue,
                         const char *subject,
                         const void *data,
                         size_t len,
                         const char *client_id,
                         size_t id_len,
                         const struct presence_config *config,
                         uint64_t tag,
                         struct presence_stream **out,
                         struct presence_error *error);

/**
 * For streams requested with the option manual_credit: `bytes` of its messages that left the queue were used up, and the
 * worker may send as many more. Without that option, what leaves the queue counts as used, and this has no effect.
 *
 * It may be told for many messages at once; the 64 that each counts in addition are reckoned here. 0 is for messages
 * without bytes. More than there was is the same as all. PRESENCE_CLOSED when the stream has ended.
 */
int32_t presence_stream_consumed(struct presence_stream *stream,
                                 size_t bytes);

/**
 * Cancels a stream that runs: it ends with PRESENCE_EVENT_ERROR and PRESENCE_CANCELLED, and its worker is notified.
 *
 * On a lane this stops the stream's sender, with PRESENCE_CANCELLED, and nothing else. A worker on level 0 of the wire can
 * be stopped only by an announcement that the client is offline, which also stops the client's streams at other
 * gateways. It is made unless another stream, a session or a mark keeps the client online here; then the worker goes on.
 * Before the worker's first answer it is not known which it is: the announcement, if there is one, follows that answer, or
 * 5 seconds without one. Returns PRESENCE_CLOSED when the stream has ended already.
 */
int32_t presence_stream_cancel(struct presence_stream *stream);

/**
 * Frees a stream; one that runs is cancelled. No wait that begins after this gives an event of it.
 */
void presence_stream_free(struct presence_stream *stream);

/**
 * Marks a client online in this process, until mark_client_offline or an announcement says otherwise.
 *
 * Marking it twice is the same as once. The empty id has no effect and is PRESENCE_OK. Nothing is announced to other
 * processes: a request tells the worker who its client is.
 *
 * # Safety
 * `client_id` is NULL (PRESENCE_INVALID) or NUL-terminated.
 */
int32_t mark_client_online(const char *client_id);

/**
 * Marks a client offline: its senders and streams in this process stop before this returns, its sessions are over, and
 * every open connection announces it to the other processes (unless its `announce` says otherwise).
 *
 * Marking an unknown client offline announces it all the same, for other processes may know it. The empty id has no
 * effect and is PRESENCE_OK. Announcing never blocks; without a connection to the server it waits for the next one.
 *
 * # Safety
 * `client_id` is NULL (PRESENCE_INVALID) or NUL-terminated.
 */
int32_t mark_client_offline(const char *client_id);

/**
 * Whether a client is online in this process: it is marked so, has an open session, or has a running stream here.
 *
 * The empty id is always online; NULL, an invalid id and an unknown one are not.
 *
 * # Safety
 * `client_id` is NULL or NUL-terminated.
 */
bool is_client_online(const char *client_id);

/**
 * mark_client_online for an id of `len` bytes that needs no NUL.
 *
 * # Safety
 * `id` is readable for `len` bytes.
 */
int32_t presence_mark_online(const char *id, size_t len);

/**
 * mark_client_offline for an id of `len` bytes that needs no NUL.
 *
 * # Safety
 * `id` is readable for `len` bytes.
 */
int32_t presence_mark_offline(const char *id, size_t len);

/**
 * is_client_online for an id of `len` bytes that needs no NUL.
 *
 * # Safety
 * `id` is readable for `len` bytes.
 */
bool presence_is_online(const char *id, size_t len);

/**
 * How many clients are online in this process.
 */
uint64_t presence_online_count(void);

/**
 * Opens a session of a client: one of its connections to this process. The client is online here as long as one of its
 * sessions is open. The caller owns the session and must call presence_session_close.
 *
 * A client may have sessions in several gateway processes, and each knows its own only. The empty id gives a session
 * without effect.
 *
 * # Safety
 * `id` is readable for `len` bytes; `out` is NULL (PRESENCE_INVALID) or writable.
 */
int32_t presence_session_open(const char *id, size_t len, struct presence_session **out);

/**
 * Closes a session and frees it. With a client's last one in this process, after `session_grace_ms` (see
 * presence_config_set; default 0: at once) without a new one, the streams that this process requested for the client end
 * with PRESENCE_OFFLINE, unless it is also marked online. Streams that other processes requested go on, since the client
 * may be connected to those; mark_client_offline ends them as well.
 *
 * **A worker on level 0 can be stopped only by announcing the client offline to all processes.** So if one of the streams
 * that end here is on level 0, the client's streams at all other gateways end, too. Where clients have connections to several
 * gateways, have all workers use this library, with lanes.
 */
void presence_session_close(struct presence_session *session);

/**
 * Makes a queue.
 *
 * # Safety
 * `out` is NULL (PRESENCE_INVALID) or writable.
 */
int32_t presence_queue_new(struct presence_queue **out);

/**
 * A file descriptor that is readable (poll, epoll, kqueue, asyncio, libuv) as long as events wait in the queue.
 *
 * It belongs to the queue: do not read, write or close it. A negative presence_status when there is none to be had.
 */
int presence_queue_fd(const struct presence_queue *queue);

/**
 * Waits for events, and takes up to `max` of them into `events`. What an earlier wait gave becomes invalid now.
 *
 * Returns how many were taken; 0 when `timeout_ms` passed or presence_queue_wake was called; or PRESENCE_INVALID,
 * PRESENCE_BUSY (another thread is waiting), PRESENCE_CLOSED (the queue was freed), PRESENCE_FORKED.
 *
 * # Safety
 * `events` is writable for `max` elements. While another thread still reads what an earlier wait gave, do not wait.
 */
int64_t presence_queue_wait(struct presence_queue *queue,
                            struct presence_event *events,
                            size_t max,
                            int64_t timeout_ms);

/**
 * Makes the thread that waits on the queue return, or the next one that would.
 */
void presence_queue_wake(struct presence_queue *queue);

/**
 * Frees a queue with all that waits in it. A thread waiting on it gets PRESENCE_CLOSED, and has left when this returns. What
 * its last wait gave is valid no longer: no thread may be at its events.
 *
 * Services and streams that use it go on without telling anybody; requests that arrive are answered with an error.
 */
void presence_queue_free(struct presence_queue *queue);

/**
 * Has the queue tell from now on, with `tag`, when clients come online and go offline in this process.
 *
 * A queue watches once; a second call changes its tag. At most 65,536 such events wait; then they are dropped, and a
 * PRESENCE_EVENT_LOG with PRESENCE_FULL says so.
 */
int32_t presence_watch(struct presence_queue *queue, uint64_t tag);

/**
 * Serves a subject: each request for it is a PRESENCE_EVENT_REQUEST, with `tag`, on `queue`.
 *
 * Requests are spread over all processes that serve the subject in the same `group`; NULL or "" is no group: each of
 * them gets every request. The subject may have wildcards. At most `max_streams` streams (0: 10,000) run at once; a
 * request beyond is answered with "server busy". It waits until the server has the subscription; without a connection
 * now it returns at once, and it is done later. Offline announcements are listened to from now on.
 *
 * Where nats-server refuses the subscription, this fails with the server's words: PRESENCE_DISCONNECTED (permissions) or
 * PRESENCE_FULL (max_subscriptions). Where it refuses later, or takes the subscription back when its configuration
 * changes, PRESENCE_EVENT_DISCONNECTED with `tag` comes on `queue`, once; it is tried again with the delays of a
 * reconnect, and PRESENCE_EVENT_CONNECTED with `tag` comes when the server has the subscription again. Streams that run
 * are not touched.
 *
 * # Safety
 * `subject` is NULL (PRESENCE_INVALID) or NUL-terminated, `group` is NULL or NUL-terminated; `out` is NULL
 * (PRESENCE_INVALID) or writable; `error` is NULL or writable.
 */
int32_t presence_serve(struct presence_conn *conn,
                       struct presence_queue *queue,
                       const char *subject,
                       const char *group,
                       uint32_t max_streams,
                       uint64_t tag,
                       struct presence_service **out,
                       struct presence_error *error);

/**
 * Takes no more requests. Streams that run go on. A second call is PRESENCE_CLOSED.
 */
int32_t presence_service_stop(struct presence_service *service);

/**
 * Stops a service and frees it. Its senders live on.
 */
void presence_service_free(struct presence_service *service);

/**
 * Sends one message of the stream. Never blocks: PRESENCE_FULL when there is no room now.
 *
 * Once the client is offline this is PRESENCE_OFFLINE, for ever. Others: PRESENCE_TOO_LARGE (more than
 * presence_sender_max_message) and, on level 0, PRESENCE_RESERVED, after which the stream goes on; PRESENCE_CLOSED; on a
 * lane PRESENCE_CANCELLED and PRESENCE_PEER_GONE, on level 0 PRESENCE_DISCONNECTED. After PRESENCE_FULL a
 * PRESENCE_EVENT_WRITABLE comes when the sender can try again: once the reader has taken some messages, or half of
 * send_buffer_bytes is free.
 *
 * # Safety
 * `sender` is NULL (PRESENCE_INVALID) or not freed yet; `data` is readable for `len` bytes.
 */
int32_t presence_sender_send(struct presence_sender *sender,
                             const void *data,
                             size_t len);

/**
 * Sends several messages of the stream, up to the first that is refused. Never blocks.
 *
 * `data` has them one behind the other, `lens` the length of each. Returns how many were sent: fewer than `count` when one
 * was refused after others were sent (the next call tells why); when the first is refused, what presence_sender_send
 * would return for it. 0 for `count` 0.
 *
 * # Safety
 * `sender` is NULL (PRESENCE_INVALID) or not freed yet; `lens` is readable for `count` elements and `data` for their sum.
 */
int64_t presence_sender_send_many(struct presence_sender *sender,
                                  const void *data,
                                  const size_t *lens,
                                  size_t count);

/**
 * As presence_sender_send, but where that would be PRESENCE_FULL it waits for room, at most `timeout_ms`.
 *
 * PRESENCE_TIMEOUT when there was none in that time; the sender's end, by whomever, ends the wait too.
 *
 * # Safety
 * As presence_sender_send; it is not freed while this waits.
 */
int32_t presence_sender_send_wait(struct presence_sender *sender, const void *data, size_t len, int64_t timeout_ms);

/**
 * Ends the stream with an error, whose text the reader gets. NULL with `len` 0 is no text. Any bytes are taken; what
 * nats-server does not take in one message is cut off, and on a lane, where there is no room for more, all but 256 bytes.
 *
 * PRESENCE_CLOSED when it has ended already; why it was stopped, when it was.
 *
 * # Safety
 * `sender` is NULL (PRESENCE_INVALID) or not freed yet; `message` is readable for `len` bytes.
 */
int32_t presence_sender_error(struct presence_sender *sender,
                              const char *message,
                              size_t len);

/**
 * Ends the stream. Once more is fine, and after presence_sender_error: PRESENCE_OK. Why it was stopped, when it was.
 *
 * # Safety
 * `sender` is NULL (PRESENCE_INVALID) or not freed yet.
 */
int32_t presence_sender_end(struct presence_sender *sender);

/**
 * Whether the sender may send no more, for whatever reason. true for NULL.
 *
 * # Safety
 * `sender` is NULL or not freed yet.
 */
bool presence_sender_is_closed(const struct presence_sender *sender);

/**
 * Returns how large a message may be, in bytes: the max_payload of the present nats-server, less 64. It is the same on
 * lanes and on level 0. 0 for NULL.
 *
 * # Safety
 * `sender` is NULL or not freed yet.
 */
size_t presence_sender_max_message(const struct presence_sender *sender);

/**
 * How many messages were sent (accepted) so far. 0 for NULL.
 *
 * # Safety
 * `sender` is NULL or not freed yet.
 */
uint64_t presence_sender_send_count(const struct presence_sender *sender);

/**
 * The sender's status word: 0 while it may send; then, for ever, the presence_status that says why not, as uint32_t.
 *
 * Reading it is the cheapest way to ask: an aligned 32-bit load, relaxed and atomic, from any thread, until the sender
 * is freed. NULL for NULL.
 *
 * # Safety
 * `sender` is NULL or not freed yet.
 */
const uint32_t *presence_sender_status_word(const struct presence_sender *sender);

/**
 * Reads a header of the request, by its name as it was sent. `*value` (not NUL-terminated) is NULL when there is none, and valid
 * until the sender is freed. Of several with the name it is the first.
 *
 * # Safety
 * `sender` is NULL (PRESENCE_INVALID) or not freed yet; `name` is NULL (PRESENCE_INVALID) or NUL-terminated; `value` and
 * `len` are NULL (PRESENCE_INVALID) or writable.
 */
int32_t presence_sender_header(const struct presence_sender *sender,
                               const char *name,
                               const char **value,
                               size_t *len);

/**
 * Frees a sender. A stream that was not ended is ended with an error, which the reader gets. Its status word is gone.
 *
 * # Safety
 * `sender` is NULL or not freed yet, and no other thread uses it or its status word any longer.
 */
void presence_sender_free(struct presence_sender *sender);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NATS_PRESENCE_H */
