/* A gateway with many idle streams. Measures the memory of each, and the time to open them all; then cancels them all,
 * and prints when it started to.
 *
 * idle_gateway URL STREAMS
 */
#include "ours.h"

enum { BATCH = 64, REST_MS = 1000 };

int main(int argc, char **argv)
{
    size_t count = number(argc, argv, 2);
    presence_stream **streams = allocate(count, sizeof *streams);
    memset(streams, 0xff, count * sizeof *streams); /* so that the array is resident before the measurement */
    presence_event events[BATCH];
    presence_conn *conn = connect_to(argument(argc, argv, 1), "");
    presence_queue *queue = new_queue();

    int64_t before = resident_bytes(), start = now_ns();
    for (size_t i = 0; i < count; i++)
        streams[i] = request_stream(conn, queue, "bench.idle", i);
    must(presence_queue_wait(queue, events, 1, 60000) == 1, "presence_queue_wait", "no event arrived");
    double open_ms = (double)(now_ns() - start) / 1e6;
    must(events[0].kind == PRESENCE_EVENT_DATA && events[0].stream == streams[count - 1], "event", "no message");
    must(presence_queue_wait(queue, events, 1, REST_MS) == 0, "event", "the streams are not idle");
    must(stats_of(conn).streams == count, "presence_conn_stats", "not all streams run");
    int64_t bytes = resident_bytes() - before;

    int64_t cancel = now_ns();
    for (size_t i = 0; i < count; i++)
        must(presence_stream_cancel(streams[i]) == PRESENCE_OK, "presence_stream_cancel", "failed");
    for (size_t ended = 0; ended < count;) {
        int64_t got = wait_for_events(queue, events, BATCH, 10000);
        for (int64_t i = 0; i < got; i++, ended++) {
            must(events[i].kind == PRESENCE_EVENT_ERROR && events[i].status == PRESENCE_CANCELLED, "stream",
                 "expected CANCELLED");
            presence_stream_free(events[i].stream);
        }
    }
    must(stats_of(conn).streams == 0, "presence_conn_stats", "streams remain");
    must(presence_close(conn, 10000) == PRESENCE_OK, "presence_close", "failed");
    printf("{\"gateway_bytes\": %.1f, \"open_ms\": %.1f, \"cancel_ns\": %lld}\n", (double)bytes / (double)count,
           open_ms, (long long)cancel);
    return 0;
}
