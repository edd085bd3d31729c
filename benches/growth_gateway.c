/* The gateway of growth_worker: it requests STREAMS streams over LANES connections in turn, each for another client,
 * and reads them to their ends. Each of its connections is a lane.
 *
 * Measures the time from the send of each paced message until this program has it, and the rate of the others.
 *
 * growth_gateway URL LANES STREAMS MESSAGES PACED
 */
#include "ours.h"

static void must_use_a_lane_each(presence_conn **conns, size_t count)
{
    for (size_t i = 0; i < count; i++)
        must(stats_of(conns[i]).lanes == 1, "presence_conn_stats", "a connection does not use one lane");
}

int main(int argc, char **argv)
{
    size_t lanes = number(argc, argv, 2), streams = number(argc, argv, 3);
    size_t messages = number(argc, argv, 4), paced = number(argc, argv, 5);
    int64_t *latencies = allocate(paced, sizeof *latencies);
    presence_conn **conns = allocate(lanes, sizeof *conns);
    presence_event events[1024];
    presence_queue *queue = new_queue();
    for (size_t i = 0; i < lanes; i++)
        conns[i] = connect_to(argument(argc, argv, 1), "");
    for (size_t i = 0; i < streams; i++)
        request_stream(conns[i % lanes], queue, "bench.growth", i);

    int64_t first = 0, last = 0;
    size_t timed = 0, received = 0, with_first = 0;
    for (size_t ended = 0; ended < streams;) {
        int64_t count = wait_for_events(queue, events, 1024, 10000);
        int64_t now = now_ns();
        for (int64_t i = 0; i < count; i++) {
            const presence_event *event = &events[i];
            if (event->kind == PRESENCE_EVENT_DATA) {
                int64_t sent;
                must(event->data_len == 2 * sizeof sent, "message", "not the expected one");
                memcpy(&sent, event->data, sizeof sent);
                if (sent == 0) {
                    received++;
                    last = now;
                } else {
                    must(timed < paced && sent <= now, "message", "its time is wrong");
                    latencies[timed++] = now - sent;
                    if (timed == paced)
                        must_use_a_lane_each(conns, lanes);
                }
                continue;
            }
            must(event->kind == PRESENCE_EVENT_END, "stream", presence_status_text(event->status));
            presence_stream_free(event->stream);
            ended++;
        }
        if (first == 0 && received > 0) {
            first = now;
            with_first = received; /* not counted: they arrived before the clock was read */
        }
    }
    must(timed == paced && received == messages, "stream", "messages were lost");
    for (size_t i = 0; i < lanes; i++)
        presence_close(conns[i], 1000);
    qsort(latencies, paced, sizeof *latencies, compare_times);
    printf("{\"messages_per_s\": %.0f, \"p99_us\": %.1f}\n",
           (double)(received - with_first) / ((double)(last - first) / 1e9),
           (double)percentile(latencies, paced, 99) / 1e3);
    return 0;
}
