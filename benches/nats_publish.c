/* The peer of stream_worker: nats.c publishes as fast as it can, with its defaults.
 *
 * nats_publish URL MESSAGES SIZE
 */
#include "bench.h"
#include <nats/nats.h>

int main(int argc, char **argv)
{
    size_t messages = number(argc, argv, 2), size = number(argc, argv, 3);
    char *message = allocate(1, size);
    natsConnection *conn;
    natsStatus status = natsConnection_ConnectTo(&conn, argument(argc, argv, 1));
    must(status == NATS_OK, "natsConnection_ConnectTo", natsStatus_GetText(status));

    int64_t cpu = cpu_ns();
    for (size_t i = 0; i < messages; i++) {
        status = natsConnection_Publish(conn, "bench.raw", message, (int)size);
        must(status == NATS_OK, "natsConnection_Publish", natsStatus_GetText(status));
    }
    status = natsConnection_FlushTimeout(conn, 10000); /* returns when the server has all */
    must(status == NATS_OK, "natsConnection_FlushTimeout", natsStatus_GetText(status));
    printf("{\"cpu_ns_per_send\": %.1f}\n", (double)(cpu_ns() - cpu) / (double)messages);
    return 0;
}
