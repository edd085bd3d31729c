/* A worker with many idle streams. Measures the memory of each, and the time at which the last one was cancelled.
 *
 * It sends one message on the last stream. A lane keeps the order, so all streams run when the message arrives.
 *
 * idle_worker URL STREAMS
 */
#include "ours.h"

enum { BATCH = 64, REST_MS = 1000 };

static presence_queue *queue;

/* Takes `count` events of a kind. Stores the senders of requests. */
static void take_events(int32_t kind, size_t count, presence_sender **senders)
{
    presence_event events[BATCH];
    for (size_t taken = 0; taken < count;) {
        int64_t got = wait_for_events(queue, events, BATCH, 30000);
        for (int64_t i = 0; i < got; i++) {
            must(events[i].kind == kind, "event", presence_status_text(events[i].status));
            if (kind == PRESENCE_EVENT_REQUEST)
                senders[taken] = events[i].sender;
            else
                must(events[i].status == PRESENCE_CANCELLED, "STOPPED", presence_status_text(events[i].status));
            taken++;
        }
    }
}

int main(int argc, char **argv)
{
    size_t streams = number(argc, argv, 2);
    presence_sender **senders = allocate(streams, sizeof *senders);
    memset(senders, 0xff, streams * sizeof *senders); /* so that the array is resident before the measurement */
    presence_conn *conn = connect_to(argument(argc, argv, 1), "");
    queue = new_queue();
    serve(conn, queue, "bench.idle", streams);
    int64_t before = resident_bytes();
    ready();

    take_events(PRESENCE_EVENT_REQUEST, streams, senders);
    must_be_on_level(conn, "");
    must(stats_of(conn).senders == streams, "presence_conn_stats", "not all senders run");
    must(presence_sender_send(senders[streams - 1], "all", 3) == PRESENCE_OK, "presence_sender_send", "failed");
    presence_event event;
    must(presence_queue_wait(queue, &event, 1, REST_MS / 2) == 0, "event", "the streams were not left idle");
    int64_t bytes = resident_bytes() - before;

    take_events(PRESENCE_EVENT_STOPPED, streams, senders);
    int64_t cancelled = now_ns();
    for (size_t i = 0; i < streams; i++)
        presence_sender_free(senders[i]);
    must(stats_of(conn).senders == 0, "presence_conn_stats", "senders remain");
    presence_close(conn, 10000);
    printf("{\"worker_bytes\": %.1f, \"cancelled_ns\": %lld}\n", (double)bytes / (double)streams, (long long)cancelled);
    return 0;
}
