/* A worker that sends a message after each pause, and prints the times.
 *
 * paced_worker URL OPTIONS MESSAGES PAUSE_US
 */
#include "ours.h"

int main(int argc, char **argv)
{
    const char *options = argument(argc, argv, 2);
    size_t messages = number(argc, argv, 3), pause_us = number(argc, argv, 4);
    int64_t *sent = allocate(messages, sizeof *sent);
    presence_conn *conn = connect_to(argument(argc, argv, 1), options);
    presence_queue *queue = new_queue();
    presence_event event;
    serve(conn, queue, "bench.paced", 0);
    ready();
    must(presence_queue_wait(queue, &event, 1, 10000) == 1 && event.kind == PRESENCE_EVENT_REQUEST, "request",
         "none arrived");

    must_be_on_level(conn, options);
    int64_t next = now_ns() + 100000000;
    for (size_t i = 0; i < messages; i++, next += (int64_t)pause_us * 1000) {
        char message[32];
        int length = snprintf(message, sizeof message, "number-%06zu", i);
        sleep_until(next);
        sent[i] = now_ns();
        int32_t status = presence_sender_send(event.sender, message, (size_t)length);
        must(status == PRESENCE_OK, "presence_sender_send", presence_status_text(status));
    }
    must(presence_sender_end(event.sender) == PRESENCE_OK, "presence_sender_end", "failed");
    presence_sender_free(event.sender);
    must(presence_close(conn, 10000) == PRESENCE_OK, "presence_close", "failed");
    print_times(sent, messages);
    return 0;
}
