/* The peer of offline_worker: measures when each id arrives in a callback of nats.c.
 *
 * "event": the callback reads the clock. "word": the callback sets a word for each id, and a thread polls the words and
 * yields in between, as offline_worker does.
 *
 * nats_oneway_subscribe URL MESSAGES event|word
 */
#include "bench.h"
#include <nats/nats.h>
#include <sched.h>

static size_t messages;
static uint32_t *words;
static int64_t *seen;
static bool reads_clock;

static void take_id(natsConnection *conn, natsSubscription *sub, natsMsg *msg, void *closure)
{
    (void)conn, (void)sub, (void)closure;
    int64_t now = reads_clock ? now_ns() : 0;
    size_t i = strtoull(natsMsg_GetData(msg) + strlen("client-"), NULL, 10);
    must(i < messages, "message", "its id is unknown");
    seen[i] = now;
    __atomic_store_n(&words[i], 1, __ATOMIC_RELEASE);
    natsMsg_Destroy(msg);
}

int main(int argc, char **argv)
{
    messages = number(argc, argv, 2);
    reads_clock = strcmp(argument(argc, argv, 3), "event") == 0;
    words = allocate(messages, sizeof *words);
    seen = allocate(messages, sizeof *seen);
    natsConnection *conn;
    natsSubscription *sub;
    natsStatus status = natsConnection_ConnectTo(&conn, argument(argc, argv, 1));
    must(status == NATS_OK, "natsConnection_ConnectTo", natsStatus_GetText(status));
    status = natsConnection_Subscribe(&sub, conn, "bench.oneway", take_id, NULL);
    must(status == NATS_OK, "natsConnection_Subscribe", natsStatus_GetText(status));
    natsConnection_FlushTimeout(conn, 10000);
    ready();

    for (size_t i = 0; i < messages; i++) {
        int64_t limit = now_ns() + 10000000000;
        while (__atomic_load_n(&words[i], __ATOMIC_ACQUIRE) == 0) {
            must(now_ns() < limit, "message", "none arrived");
            if (reads_clock)
                usleep(20000);
            else
                sched_yield();
        }
        if (!reads_clock)
            seen[i] = now_ns();
    }
    print_times(seen, messages);
    return 0;
}
