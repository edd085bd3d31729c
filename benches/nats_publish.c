/* The peer of stream_worker: nats.c publishes as fast as it can, with default options, to the subjects in turn.
 *
 * nats_publish URL MESSAGES SIZE SUBJECTS
 */
#include "bench.h"
#include <nats/nats.h>

int main(int argc, char **argv)
{
    size_t messages = number(argc, argv, 2), size = number(argc, argv, 3);
    size_t subjects = number(argc, argv, 4);
    char *message = allocate(1, size), (*subject)[32] = allocate(subjects, sizeof *subject);
    for (size_t i = 0; i < subjects; i++)
        snprintf(subject[i], sizeof subject[i], "bench.raw.%zu", i);
    natsConnection *conn;
    natsStatus status = natsConnection_ConnectTo(&conn, argument(argc, argv, 1));
    must(status == NATS_OK, "natsConnection_ConnectTo", natsStatus_GetText(status));

    int64_t cpu = cpu_ns();
    for (size_t i = 0, at = 0; i < messages; i++, at = at + 1 < subjects ? at + 1 : 0) {
        status = natsConnection_Publish(conn, subject[at], message, (int)size);
        must(status == NATS_OK, "natsConnection_Publish", natsStatus_GetText(status));
    }
    status = natsConnection_FlushTimeout(conn, 10000); /* returns when nats-server has everything */
    must(status == NATS_OK, "natsConnection_FlushTimeout", natsStatus_GetText(status));
    printf("{\"cpu_ns_per_send\": %.1f}\n", (double)(cpu_ns() - cpu) / (double)messages);
    return 0;
}
