/* A worker that answers each request with MESSAGES messages. Measures the CPU time of the process per send.
 *
 * It starts when AT_ONCE requests have arrived, and sends one message to each of their streams in turn.
 *
 * stream_worker URL OPTIONS STREAMS AT_ONCE MESSAGES SIZE
 */
#include "ours.h"

enum { BATCH = 64 };

static presence_queue *queue;
static presence_sender **senders;

/* Takes requests until there are at least `at_once`. Returns their number. */
static size_t take_requests(size_t at_once)
{
    size_t taken = 0;
    presence_event events[BATCH];
    while (taken < at_once) {
        int64_t count = wait_for_events(queue, events, BATCH, 60000);
        for (int64_t i = 0; i < count; i++) {
            must(events[i].kind == PRESENCE_EVENT_REQUEST, "presence_queue_wait", "expected a request");
            senders[taken++] = events[i].sender;
        }
    }
    return taken;
}

static void send_all(size_t streams, size_t messages, const char *message, size_t size)
{
    for (size_t sent = 1; sent <= messages; sent++) {
        for (size_t i = 0; i < streams; i++) {
            int32_t status = presence_sender_send_wait(senders[i], message, size, 10000);
            must(status == PRESENCE_OK, "presence_sender_send_wait", presence_status_text(status));
            if (sent == messages) {
                must(presence_sender_end(senders[i]) == PRESENCE_OK, "presence_sender_end", "failed");
                presence_sender_free(senders[i]);
            }
        }
    }
}

int main(int argc, char **argv)
{
    const char *options = argument(argc, argv, 2);
    size_t streams = number(argc, argv, 3), at_once = number(argc, argv, 4);
    size_t messages = number(argc, argv, 5), size = number(argc, argv, 6);
    char *message = allocate(1, size);
    senders = allocate(at_once + BATCH, sizeof *senders);
    presence_conn *conn = connect_to(argument(argc, argv, 1), options);
    queue = new_queue();
    serve(conn, queue, "bench.stream", 0);
    ready();

    int64_t cpu = 0;
    for (size_t served = 0; served < streams;) {
        size_t taken = take_requests(at_once);
        if (served == 0) {
            must_be_on_level(conn, options);
            cpu = cpu_ns();
        }
        send_all(taken, messages, message, size);
        served += taken;
    }
    int32_t status = presence_close(conn, 10000); /* returns when nats-server has everything */
    must(status == PRESENCE_OK, "presence_close", presence_status_text(status));
    printf("{\"cpu_ns_per_send\": %.1f}\n", (double)(cpu_ns() - cpu) / (double)(streams * messages));
    return 0;
}
