/* Measures what it costs a worker to check whether it may still send: by the sender's status word, by its function, and
 * by the client's id.
 *
 * check_sender URL IDS CHECKS
 */
#include "ours.h"

static void wait_for_event(presence_queue *queue, int32_t kind, presence_event *event)
{
    must(presence_queue_wait(queue, event, 1, 10000) == 1 && event->kind == kind, "event", "it did not arrive");
}

/* Returns a sender that may send. This process is its worker and its gateway. */
static presence_sender *running_sender(const char *url)
{
    presence_error error = {0};
    presence_stream *stream;
    presence_event event;
    presence_conn *conn = connect_to(url, "");
    presence_queue *queue = new_queue();
    serve(conn, queue, "bench.check", 0);
    must(start_stream(conn, queue, "bench.check", "client", 0, &stream, &error) == PRESENCE_OK,
         "presence_request", error.message);
    wait_for_event(queue, PRESENCE_EVENT_REQUEST, &event);
    return event.sender;
}

static double ns_each(int64_t start, size_t count)
{
    return (double)(now_ns() - start) / (double)count;
}

int main(int argc, char **argv)
{
    size_t checks = number(argc, argv, 3), count, refused = 0;
    char *ids = read_ids(argument(argc, argv, 2), &count);
    count = count < 100000 ? count : 100000;
    uint32_t *order = order_of(count, true);
    presence_sender *sender = running_sender(argument(argc, argv, 1));
    const uint32_t *word = presence_sender_status_word(sender);

    int64_t start = now_ns();
    for (size_t i = 0; i < checks; i++)
        refused += __atomic_load_n(word, __ATOMIC_RELAXED) != 0;
    double word_ns = ns_each(start, checks);

    size_t calls = checks / 10;
    start = now_ns();
    for (size_t i = 0; i < calls; i++)
        refused += presence_sender_is_closed(sender);
    double call_ns = ns_each(start, calls);

    for (size_t i = 0; i < count; i++)
        presence_mark_online(ids + i * ID_SIZE, ID_SIZE);
    size_t lookups = checks / 100;
    start = now_ns();
    for (size_t i = 0; i < lookups; i++)
        refused += !presence_is_online(ids, ID_SIZE);
    double hot_ns = ns_each(start, lookups);
    start = now_ns();
    for (size_t i = 0, at = 0; i < lookups; i++, at = at + 1 < count ? at + 1 : 0)
        refused += !presence_is_online(ids + (size_t)order[at] * ID_SIZE, ID_SIZE);
    double many_ns = ns_each(start, lookups);

    must(refused == 0, "check", "a running sender, or a client that is online, was refused");
    presence_sender_end(sender);
    must(__atomic_load_n(word, __ATOMIC_RELAXED) != 0, "check", "a sender that has ended was not refused");
    printf("{\"word_ns\": %.3f, \"is_closed_ns\": %.3f, \"hot_ns\": %.3f, \"many_ns\": %.3f}\n", word_ns, call_ns,
           hot_ns, many_ns);
    return 0;
}
