/* The peer of stream_gateway for short streams: nats.c makes requests, AT_ONCE at a time, each with REPLIES replies.
 *
 * nats_request URL REQUESTS AT_ONCE REPLIES asap|buffered
 */
#include "bench.h"
#include <nats/nats.h>
#include <pthread.h>
#include <semaphore.h>

static size_t requests, at_once, replies, requested, ended;
static int64_t *started; /* the time of each request; after its last reply, its duration */
static size_t *running;  /* the request in each slot, and the number of its replies so far */
static size_t *got;
static char inbox[64];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards all of the above: main requests, too */
static sem_t done;

static void request(natsConnection *conn, size_t slot)
{
    char reply[sizeof inbox + 24];
    snprintf(reply, sizeof reply, "%s.%zu", inbox, slot);
    running[slot] = requested++;
    got[slot] = 0;
    started[running[slot]] = now_ns();
    natsStatus status = natsConnection_PublishRequest(conn, "bench.request", reply, "", 0);
    must(status == NATS_OK, "natsConnection_PublishRequest", natsStatus_GetText(status));
}

static void take_reply(natsConnection *conn, natsSubscription *sub, natsMsg *msg, void *closure)
{
    (void)sub, (void)closure;
    size_t slot = strtoull(strrchr(natsMsg_GetSubject(msg), '.') + 1, NULL, 10);
    must(natsMsg_GetDataLength(msg) == 16, "reply", "unexpected size");
    natsMsg_Destroy(msg);
    pthread_mutex_lock(&lock);
    if (++got[slot] == replies) {
        started[running[slot]] = now_ns() - started[running[slot]];
        if (++ended == requests)
            sem_post(&done);
        if (requested < requests)
            request(conn, slot);
    }
    pthread_mutex_unlock(&lock);
}

int main(int argc, char **argv)
{
    requests = number(argc, argv, 2), at_once = number(argc, argv, 3), replies = number(argc, argv, 4);
    started = allocate(requests, sizeof *started);
    running = allocate(at_once, sizeof *running);
    got = allocate(at_once, sizeof *got);
    sem_init(&done, 0, 0);
    snprintf(inbox, sizeof inbox, "_INBOX.bench.%d", (int)getpid());
    char wildcard[sizeof inbox + 2];
    snprintf(wildcard, sizeof wildcard, "%s.*", inbox);

    natsConnection *conn;
    natsSubscription *sub;
    natsOptions *options;
    natsOptions_Create(&options);
    natsOptions_SetURL(options, argument(argc, argv, 1));
    natsOptions_SetSendAsap(options, strcmp(argument(argc, argv, 5), "asap") == 0);
    natsStatus status = natsConnection_Connect(&conn, options);
    must(status == NATS_OK, "natsConnection_Connect", natsStatus_GetText(status));
    status = natsConnection_Subscribe(&sub, conn, wildcard, take_reply, NULL);
    must(status == NATS_OK, "natsConnection_Subscribe", natsStatus_GetText(status));
    natsConnection_FlushTimeout(conn, 10000);

    int64_t start = now_ns();
    pthread_mutex_lock(&lock);
    for (size_t slot = 0; slot < at_once; slot++)
        request(conn, slot);
    pthread_mutex_unlock(&lock);
    while (sem_wait(&done) != 0) {}
    double seconds = (double)(now_ns() - start) / 1e9;
    qsort(started, requests, sizeof *started, compare_times);
    printf("{\"streams_per_s\": %.0f, \"p50_us\": %.1f, \"p99_us\": %.1f}\n", (double)requests / seconds,
           (double)percentile(started, requests, 50) / 1e3, (double)percentile(started, requests, 99) / 1e3);
    return 0;
}
