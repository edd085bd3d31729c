/* A worker for many streams, lanes or threads: how the cost of a message grows with their number.
 *
 * Each thread has its share of the streams, and sends a message to each of them in turn. First the threads send PACED
 * messages, RATE a second in all, each with the time of its send; then MESSAGES as fast as they can. Measures the CPU
 * time of the process per message of the second kind.
 *
 * growth_worker URL LANES STREAMS THREADS MESSAGES PACED RATE
 */
#include "ours.h"
#include <pthread.h>

enum { BURST_MS = 1 };

static size_t streams, threads, messages, paced, rate;
static presence_sender **senders;
static pthread_barrier_t all;
static int64_t begin, cpu;

static void send_to(size_t stream, int64_t stamp)
{
    const int64_t message[2] = {stamp, 0};
    int32_t status = presence_sender_send_wait(senders[stream], message, sizeof message, 10000);
    must(status == PRESENCE_OK, "presence_sender_send_wait", presence_status_text(status));
}

/* Thread `first` has the streams first, first + threads ... */
static size_t next_stream(size_t stream, size_t first)
{
    return stream + threads < streams ? stream + threads : first;
}

/* Sends this thread's share in bursts. Only one thread at a time sends a burst. */
static void send_paced(size_t first)
{
    size_t burst = rate * BURST_MS / 1000, share = paced / threads;
    int64_t at = begin + (int64_t)first * BURST_MS * 1000000;
    for (size_t sent = 0, stream = first; sent < share; at += (int64_t)threads * BURST_MS * 1000000) {
        sleep_until(at);
        for (size_t end = sent + burst; sent < end && sent < share; sent++, stream = next_stream(stream, first))
            send_to(stream, now_ns());
    }
}

static void *send_share(void *closure)
{
    size_t first = (size_t)(uintptr_t)closure;
    send_paced(first);
    if (pthread_barrier_wait(&all) == PTHREAD_BARRIER_SERIAL_THREAD)
        cpu = cpu_ns();
    pthread_barrier_wait(&all);
    for (size_t sent = 0, stream = first; sent < messages / threads; sent++, stream = next_stream(stream, first))
        send_to(stream, 0);
    for (size_t stream = first; stream < streams; stream += threads) {
        must(presence_sender_end(senders[stream]) == PRESENCE_OK, "presence_sender_end", "failed");
        presence_sender_free(senders[stream]);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    size_t lanes = number(argc, argv, 2);
    streams = number(argc, argv, 3), threads = number(argc, argv, 4);
    messages = number(argc, argv, 5), paced = number(argc, argv, 6), rate = number(argc, argv, 7);
    must(threads > 0 && threads <= streams && streams % threads == 0, "THREADS", "STREAMS must be a multiple");
    must(rate * BURST_MS >= 1000, "RATE", "too low for bursts");
    must(messages % threads == 0 && paced % threads == 0, "THREADS", "MESSAGES and PACED must be multiples");
    senders = allocate(streams, sizeof *senders);
    pthread_t *running = allocate(threads, sizeof *running);
    presence_conn *conn = connect_to(argument(argc, argv, 1), "");
    presence_queue *queue = new_queue();
    serve(conn, queue, "bench.growth", streams);
    ready();

    presence_event event;
    for (size_t i = 0; i < streams; i++) {
        must(presence_queue_wait(queue, &event, 1, 60000) == 1 && event.kind == PRESENCE_EVENT_REQUEST, "request",
             "none arrived");
        senders[i] = event.sender;
    }
    must(stats_of(conn).lanes == lanes, "presence_conn_stats", "not the expected number of lanes");

    pthread_barrier_init(&all, NULL, (unsigned)threads);
    begin = now_ns() + 100000000;
    for (size_t i = 0; i < threads; i++)
        must(pthread_create(&running[i], NULL, send_share, (void *)(uintptr_t)i) == 0, "pthread_create", "failed");
    for (size_t i = 0; i < threads; i++)
        pthread_join(running[i], NULL);
    int32_t status = presence_close(conn, 10000); /* returns when nats-server has everything */
    must(status == PRESENCE_OK, "presence_close", presence_status_text(status));
    printf("{\"cpu_ns_per_send\": %.1f}\n", (double)(cpu_ns() - cpu) / (double)messages);
    return 0;
}
