/* A gateway that reads one stream until it is killed. It prints READY after the first messages.
 *
 * peer_gone_gateway URL OPTIONS
 */
#include "ours.h"

int main(int argc, char **argv)
{
    presence_conn *conn = connect_to(argument(argc, argv, 1), argument(argc, argv, 2));
    presence_queue *queue = new_queue();
    presence_stream *stream;
    presence_error error = {0};
    presence_event event;
    int32_t status = start_stream(conn, queue, "bench.peer_gone", "client", 0, &stream, &error);
    must(status == PRESENCE_OK, "presence_request", error.message);
    for (size_t received = 0;; received++) {
        must(presence_queue_wait(queue, &event, 1, 10000) == 1, "presence_queue_wait", "no event arrived");
        must(event.kind == PRESENCE_EVENT_DATA, "stream", presence_status_text(event.status));
        if (received == 3)
            ready();
    }
}
