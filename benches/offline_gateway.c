/* A gateway whose clients leave one after the other. Prints when it marked each of them offline.
 *
 * offline_gateway URL CLIENTS PAUSE_US
 */
#include "ours.h"

/* Takes one event within `timeout_ms`, and frees the stream if that ends it. Returns false if there was no event. */
static bool take_event(presence_queue *queue, int32_t kind, int64_t timeout_ms)
{
    presence_event event;
    if (presence_queue_wait(queue, &event, 1, timeout_ms) != 1)
        return false;
    must(event.kind == kind, "event", presence_status_text(event.status));
    if (kind == PRESENCE_EVENT_ERROR)
        presence_stream_free(event.stream);
    return true;
}

int main(int argc, char **argv)
{
    size_t clients = number(argc, argv, 2), pause_us = number(argc, argv, 3);
    int64_t *marked = allocate(clients, sizeof *marked);
    char (*ids)[32] = allocate(clients, sizeof *ids);
    presence_error error = {0};
    presence_stream *stream;
    presence_conn *conn = connect_to(argument(argc, argv, 1), "");
    presence_queue *queue = new_queue();

    for (size_t i = 0; i < clients; i++) {
        snprintf(ids[i], sizeof ids[i], "client-%06zu", i);
        int32_t status =
            start_stream(conn, queue, "bench.offline", ids[i], i, &stream, &error);
        must(status == PRESENCE_OK, "presence_request", error.message);
        must(take_event(queue, PRESENCE_EVENT_DATA, 10000), "stream", "the worker sent nothing");
    }

    int64_t next = now_ns() + 100000000;
    for (size_t i = 0; i < clients; i++, next += (int64_t)pause_us * 1000) {
        sleep_until(next);
        marked[i] = now_ns();
        must(presence_mark_offline(ids[i], strlen(ids[i])) == PRESENCE_OK, "presence_mark_offline", "failed");
        must(take_event(queue, PRESENCE_EVENT_ERROR, 0), "stream", "no event that ends it");
    }
    must(presence_close(conn, 10000) == PRESENCE_OK, "presence_close", "failed");
    print_times(marked, clients);
    return 0;
}
