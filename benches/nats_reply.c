/* The peer of stream_worker for short streams: nats.c answers each request with REPLIES messages of 16 bytes.
 *
 * nats_reply URL REQUESTS REPLIES asap|buffered
 */
#include "bench.h"
#include <nats/nats.h>
#include <semaphore.h>

static size_t requests, replies, answered;
static sem_t done;

static void answer(natsConnection *conn, natsSubscription *sub, natsMsg *msg, void *closure)
{
    (void)sub, (void)closure;
    for (size_t i = 0; i < replies; i++) {
        natsStatus status = natsConnection_Publish(conn, natsMsg_GetReply(msg), "0123456789abcdef", 16);
        must(status == NATS_OK, "natsConnection_Publish", natsStatus_GetText(status));
    }
    natsMsg_Destroy(msg);
    if (++answered == requests)
        sem_post(&done);
}

int main(int argc, char **argv)
{
    requests = number(argc, argv, 2), replies = number(argc, argv, 3);
    sem_init(&done, 0, 0);
    natsConnection *conn;
    natsSubscription *sub;
    natsOptions *options;
    natsOptions_Create(&options);
    natsOptions_SetURL(options, argument(argc, argv, 1));
    natsOptions_SetSendAsap(options, strcmp(argument(argc, argv, 4), "asap") == 0);
    natsStatus status = natsConnection_Connect(&conn, options);
    must(status == NATS_OK, "natsConnection_Connect", natsStatus_GetText(status));
    status = natsConnection_QueueSubscribe(&sub, conn, "bench.request", "workers", answer, NULL);
    must(status == NATS_OK, "natsConnection_QueueSubscribe", natsStatus_GetText(status));
    natsConnection_FlushTimeout(conn, 10000);
    ready();
    while (sem_wait(&done) != 0) {}
    natsConnection_FlushTimeout(conn, 10000);
    puts("{}");
    return 0;
}
