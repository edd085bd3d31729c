/* A worker whose gateways die, one after the other. It measures when each of its senders is stopped.
 *
 * It serves one stream at a time, sends a message after each pause, and prints READY again when the sender has stopped.
 *
 * peer_gone_worker URL OPTIONS STREAMS PAUSE_US
 */
#include "ours.h"

/* Sends a message after each pause until the sender is stopped. Returns the time of the STOPPED event. */
static int64_t send_until_stopped(presence_queue *queue, presence_sender *sender, size_t pause_us)
{
    presence_event event;
    int64_t pause_ns = (int64_t)pause_us * 1000, next = now_ns(), limit = next + 60000000000;
    for (;;) {
        int64_t left_ns = next - now_ns();
        if (left_ns <= 0) {
            int32_t status = presence_sender_send(sender, "0123456789abcdef", 16);
            must(status == PRESENCE_OK || presence_sender_is_closed(sender), "presence_sender_send",
                 presence_status_text(status));
            next += pause_ns;
            continue;
        }
        if (presence_queue_wait(queue, &event, 1, (left_ns + 999999) / 1000000) == 0) {
            must(now_ns() < limit, "sender", "it was not stopped");
            continue;
        }
        int64_t now = now_ns();
        must(event.kind == PRESENCE_EVENT_STOPPED && event.sender == sender, "event", "expected STOPPED");
        must(event.status == PRESENCE_PEER_GONE, "STOPPED", presence_status_text(event.status));
        return now;
    }
}

int main(int argc, char **argv)
{
    const char *options = argument(argc, argv, 2);
    size_t streams = number(argc, argv, 3), pause_us = number(argc, argv, 4);
    int64_t *stopped = allocate(streams, sizeof *stopped);
    presence_conn *conn = connect_to(argument(argc, argv, 1), options);
    presence_queue *queue = new_queue();
    presence_event event;
    serve(conn, queue, "bench.peer_gone", 0);
    ready();
    for (size_t i = 0; i < streams; i++) {
        must(presence_queue_wait(queue, &event, 1, 30000) == 1 && event.kind == PRESENCE_EVENT_REQUEST, "request",
             "none arrived");
        presence_sender *sender = event.sender;
        must_be_on_level(conn, options);
        stopped[i] = send_until_stopped(queue, sender, pause_us);
        presence_sender_free(sender);
        ready();
    }
    presence_close(conn, 1000);
    print_times(stopped, streams);
    return 0;
}
