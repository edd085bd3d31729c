/* The peer of offline_gateway: nats.c publishes ids one after the other, without buffering, and prints the times.
 *
 * nats_oneway_publish URL MESSAGES PAUSE_US asap|flush
 */
#include "bench.h"
#include <nats/nats.h>

int main(int argc, char **argv)
{
    size_t messages = number(argc, argv, 2), pause_us = number(argc, argv, 3);
    bool asap = strcmp(argument(argc, argv, 4), "asap") == 0;
    int64_t *sent = allocate(messages, sizeof *sent);
    natsConnection *conn;
    natsOptions *options;
    natsOptions_Create(&options);
    natsOptions_SetURL(options, argument(argc, argv, 1));
    natsOptions_SetSendAsap(options, asap);
    natsStatus status = natsConnection_Connect(&conn, options);
    must(status == NATS_OK, "natsConnection_Connect", natsStatus_GetText(status));

    int64_t next = now_ns() + 100000000;
    for (size_t i = 0; i < messages; i++, next += (int64_t)pause_us * 1000) {
        char id[32];
        int length = snprintf(id, sizeof id, "client-%06zu", i);
        sleep_until(next);
        sent[i] = now_ns();
        status = natsConnection_Publish(conn, "bench.oneway", id, length);
        must(status == NATS_OK, "natsConnection_Publish", natsStatus_GetText(status));
        if (!asap)
            natsConnection_Flush(conn);
    }
    natsConnection_FlushTimeout(conn, 10000);
    print_times(sent, messages);
    return 0;
}
