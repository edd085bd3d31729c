/* A worker that answers each request with so many messages, and tells what CPU the process used for each send.
 *
 * stream_worker URL STREAMS MESSAGES SIZE
 */
#include "bench.h"
#include <nats_presence.h>

int main(int argc, char **argv)
{
    size_t streams = number(argc, argv, 2), messages = number(argc, argv, 3), size = number(argc, argv, 4);
    char *message = allocate(1, size);
    presence_error error = {0};
    presence_conn *conn;
    presence_queue *queue;
    presence_service *service;
    presence_event events[64];
    must(presence_connect(argument(argc, argv, 1), NULL, &conn, &error) == PRESENCE_OK, "presence_connect", error.message);
    must(presence_queue_new(&queue) == PRESENCE_OK, "presence_queue_new", "failed");
    must(presence_serve(conn, queue, "bench.stream", "workers", 0, 0, &service, &error) == PRESENCE_OK, "presence_serve",
         error.message);
    ready();

    int64_t cpu = 0;
    for (size_t served = 0; served < streams;) {
        int64_t count = presence_queue_wait(queue, events, 64, 60000);
        must(count > 0, "presence_queue_wait", "no request came");
        if (served == 0)
            cpu = cpu_ns();
        for (int64_t i = 0; i < count; i++) {
            must(events[i].kind == PRESENCE_EVENT_REQUEST, "presence_queue_wait", "another event than a request");
            presence_sender *sender = events[i].sender;
            for (size_t sent = 0; sent < messages; sent++) {
                int32_t status = presence_sender_send_wait(sender, message, size, 10000);
                must(status == PRESENCE_OK, "presence_sender_send_wait", presence_status_text(status));
            }
            must(presence_sender_end(sender) == PRESENCE_OK, "presence_sender_end", "failed");
            presence_sender_free(sender);
            served++;
        }
    }
    int32_t status = presence_close(conn, 10000); /* returns when the server has all */
    must(status == PRESENCE_OK, "presence_close", presence_status_text(status));
    printf("{\"cpu_ns_per_send\": %.1f}\n", (double)(cpu_ns() - cpu) / (double)(streams * messages));
    return 0;
}
