/* Shared by the programs that use the library. */
#ifndef OURS_H
#define OURS_H

#include "bench.h"
#include <nats_presence.h>

/* Connects with options such as "lanes=false heartbeat_ms=500", or "" for the defaults. */
static inline presence_conn *connect_to(const char *url, const char *options)
{
    presence_conn *conn;
    presence_error error = {0};
    presence_config *config = presence_config_new();
    char *text = strdup(options);
    must(config != NULL && text != NULL, "presence_config_new", "no memory");
    for (char *key = strtok(text, " "); key != NULL; key = strtok(NULL, " ")) {
        char *value = strchr(key, '=');
        must(value != NULL, key, "this option has no value");
        *value++ = '\0';
        must(presence_config_set(config, key, value) == PRESENCE_OK, key, "this option cannot be set");
    }
    must(presence_connect(url, config, &conn, &error) == PRESENCE_OK, "presence_connect", error.message);
    presence_config_free(config);
    free(text);
    return conn;
}

static inline presence_queue *new_queue(void)
{
    presence_queue *queue;
    must(presence_queue_new(&queue) == PRESENCE_OK, "presence_queue_new", "failed");
    return queue;
}

/* Requests a stream without data and options. */
static inline presence_status start_stream(presence_conn *conn, presence_queue *queue, const char *subject,
                                           const char *client, uint64_t tag, presence_stream **stream,
                                           presence_error *error)
{
    const presence_request_args args = {
        .size = sizeof args, .subject = subject, .client = client, .client_len = strlen(client), .tag = tag};
    return presence_request(conn, queue, &args, stream, error);
}

/* Requests a stream for a client of its own: `i` is in the client's id, and the stream's tag. Waits while the send
 * buffer is full. */
static inline presence_stream *request_stream(presence_conn *conn, presence_queue *queue, const char *subject, size_t i)
{
    char id[32];
    snprintf(id, sizeof id, "client-%09zu", i);
    presence_stream *stream;
    presence_error error = {0};
    int64_t limit = now_ns() + 30000000000;
    int32_t status;
    while ((status = start_stream(conn, queue, subject, id, i, &stream, &error)) == PRESENCE_FULL) {
        must(now_ns() < limit, "presence_request", error.message);
        usleep(1000);
    }
    must(status == PRESENCE_OK, "presence_request", error.message);
    return stream;
}

/* Serves a subject, up to `max_streams` streams at a time (0: the default). */
static inline void serve(presence_conn *conn, presence_queue *queue, const char *subject, size_t max_streams)
{
    presence_service *service;
    presence_error error = {0};
    int32_t status = presence_serve(conn, queue, subject, "workers", (uint32_t)max_streams, 0, &service, &error);
    must(status == PRESENCE_OK, "presence_serve", error.message);
}

static inline presence_stats stats_of(presence_conn *conn)
{
    presence_stats stats;
    must(presence_conn_stats(conn, &stats) == PRESENCE_OK, "presence_conn_stats", "failed");
    return stats;
}

/* Waits until there are events, and takes up to `max` of them. Returns their number. */
static inline int64_t wait_for_events(presence_queue *queue, presence_event *events, size_t max, int64_t timeout_ms)
{
    int64_t count = presence_queue_wait(queue, events, max, timeout_ms);
    must(count > 0, "presence_queue_wait", "no event arrived");
    return count;
}

/* Exits unless the running streams are on a lane, or on level 0, as the options demand. */
static inline void must_be_on_level(presence_conn *conn, const char *options)
{
    bool lanes = strstr(options, "lanes=false") == NULL;
    must((stats_of(conn).lanes > 0) == lanes, "streams", lanes ? "they do not use a lane" : "they use a lane");
}

#endif
