/* A gateway with one stream. Prints when it took each of its messages from the queue.
 *
 * paced_gateway URL OPTIONS MESSAGES
 */
#include "ours.h"

int main(int argc, char **argv)
{
    const char *options = argument(argc, argv, 2);
    size_t messages = number(argc, argv, 3);
    int64_t *seen = allocate(messages, sizeof *seen);
    presence_conn *conn = connect_to(argument(argc, argv, 1), options);
    presence_queue *queue = new_queue();
    presence_stream *stream;
    presence_error error = {0};
    presence_event event;
    int32_t status = start_stream(conn, queue, "bench.paced", "client", 0, &stream, &error);
    must(status == PRESENCE_OK, "presence_request", error.message);

    for (size_t i = 0; i <= messages; i++) {
        must(presence_queue_wait(queue, &event, 1, 10000) == 1, "presence_queue_wait", "no event arrived");
        int64_t now = now_ns();
        if (i == messages)
            break;
        must(event.kind == PRESENCE_EVENT_DATA, "stream", presence_status_text(event.status));
        char text[32] = {0};
        memcpy(text, event.data, event.data_len < sizeof text ? event.data_len : 0);
        must(strncmp(text, "number-", 7) == 0 && strtoull(text + 7, NULL, 10) == i, "message", "not the expected one");
        seen[i] = now;
        if (i == 0)
            must_be_on_level(conn, options);
    }
    must(event.kind == PRESENCE_EVENT_END, "stream", "it did not end");
    presence_stream_free(stream);
    presence_close(conn, 1000);
    print_times(seen, messages);
    return 0;
}
