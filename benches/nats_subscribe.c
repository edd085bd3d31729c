/* The peer of stream_gateway: nats.c counts messages in a callback.
 *
 * nats_subscribe URL MESSAGES SUBJECT
 */
#include "bench.h"
#include <nats/nats.h>
#include <semaphore.h>

static size_t messages, received;
static int64_t first, last;
static sem_t done;

static void count_message(natsConnection *conn, natsSubscription *sub, natsMsg *msg, void *closure)
{
    (void)conn, (void)sub, (void)closure;
    natsMsg_Destroy(msg);
    received++;
    if (received == 1)
        first = now_ns();
    if (received == messages) {
        last = now_ns();
        sem_post(&done);
    }
}

int main(int argc, char **argv)
{
    messages = number(argc, argv, 2);
    sem_init(&done, 0, 0);
    natsConnection *conn;
    natsSubscription *sub;
    natsStatus status = natsConnection_ConnectTo(&conn, argument(argc, argv, 1));
    must(status == NATS_OK, "natsConnection_ConnectTo", natsStatus_GetText(status));
    status = natsConnection_Subscribe(&sub, conn, argument(argc, argv, 3), count_message, NULL);
    must(status == NATS_OK, "natsConnection_Subscribe", natsStatus_GetText(status));
    natsSubscription_SetPendingLimits(sub, -1, -1); /* so that a slow reader loses no messages */
    natsConnection_FlushTimeout(conn, 10000);
    ready();

    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += 60;
    must(sem_timedwait(&done, &limit) == 0, "nats.c", "messages were lost");
    printf("{\"messages_per_s\": %.0f}\n", (double)(messages - 1) / ((double)(last - first) / 1e9));
    return 0;
}
