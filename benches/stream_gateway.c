/* A gateway that requests streams, AT_ONCE at a time and each for another client, and reads them to their ends.
 *
 * stream_gateway URL OPTIONS STREAMS AT_ONCE MESSAGES
 */
#include "ours.h"

static presence_conn *conn;
static presence_queue *queue;
static int64_t *started; /* the time of each request; after the end of the stream, its duration */
static size_t requested;

static void request(void)
{
    char id[32];
    snprintf(id, sizeof id, "client-%09zu", requested);
    presence_stream *stream;
    presence_error error = {0};
    started[requested] = now_ns();
    int32_t status =
        start_stream(conn, queue, "bench.stream", id, requested, &stream, &error);
    must(status == PRESENCE_OK, "presence_request", error.message);
    requested++;
}

int main(int argc, char **argv)
{
    const char *options = argument(argc, argv, 2);
    size_t streams = number(argc, argv, 3), at_once = number(argc, argv, 4), messages = number(argc, argv, 5);
    started = allocate(streams, sizeof *started);
    presence_event events[1024];
    conn = connect_to(argument(argc, argv, 1), options);
    queue = new_queue();

    int64_t start = now_ns(), first = 0, last = 0;
    size_t received = 0, with_first = 0, ended = 0;
    while (requested < at_once)
        request();
    while (ended < streams) {
        int64_t count = wait_for_events(queue, events, 1024, 10000);
        int64_t now = now_ns();
        for (int64_t i = 0; i < count; i++) {
            const presence_event *event = &events[i];
            if (event->kind == PRESENCE_EVENT_DATA) {
                received++;
                last = now;
                continue;
            }
            must(event->kind == PRESENCE_EVENT_END, "stream", presence_status_text(event->status));
            started[event->tag] = now_ns() - started[event->tag];
            presence_stream_free(event->stream);
            ended++;
            if (requested < streams)
                request();
        }
        if (first == 0 && received > 0) {
            must_be_on_level(conn, options);
            first = now;
            with_first = received; /* not counted: they arrived before the clock was read */
        }
    }
    double seconds = (double)(now_ns() - start) / 1e9;
    must(received == streams * messages, "stream", "messages were lost");
    presence_close(conn, 1000);
    qsort(started, streams, sizeof *started, compare_times);
    printf("{\"messages_per_s\": %.0f, \"streams_per_s\": %.0f, \"p50_us\": %.1f, \"p99_us\": %.1f}\n",
           (double)(received - with_first) / ((double)(last - first) / 1e9), (double)streams / seconds,
           (double)percentile(started, streams, 50) / 1e3, (double)percentile(started, streams, 99) / 1e3);
    return 0;
}
