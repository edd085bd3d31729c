/* A worker with a running sender for each client. Measures when each sender's status word shows that its client left.
 *
 * "event": the program sleeps on its queue, and reads the clock at each STOPPED event. The word was set just before, so
 * this is an upper bound for the time until the word is set, for a program that has nothing else to do.
 * "word": a thread polls the words, and yields in between. This is what a busy worker observes, but the thread takes
 * one core away from the other programs.
 *
 * offline_worker URL CLIENTS event|word
 */
#include "ours.h"
#include <sched.h>

static presence_queue *queue;
static presence_sender **senders;
static int64_t *seen;
static size_t clients;

static size_t client_number(const presence_event *event)
{
    char id[32] = {0};
    must(event->client_len < sizeof id, "client", "its id is too long");
    memcpy(id, event->client, event->client_len);
    size_t i = strtoull(id + strlen("client-"), NULL, 10);
    must(i < clients, "client", "its id is unknown");
    return i;
}

static void accept_all(void)
{
    presence_event event;
    for (size_t accepted = 0; accepted < clients; accepted++) {
        must(presence_queue_wait(queue, &event, 1, 10000) == 1 && event.kind == PRESENCE_EVENT_REQUEST, "request",
             "none arrived");
        senders[client_number(&event)] = event.sender;
        must(presence_sender_send(event.sender, "hello", 5) == PRESENCE_OK, "presence_sender_send", "failed");
    }
}

static void watch_events(void)
{
    presence_event event;
    for (size_t stopped = 0; stopped < clients; stopped++) {
        must(presence_queue_wait(queue, &event, 1, 10000) == 1 && event.kind == PRESENCE_EVENT_STOPPED, "STOPPED",
             "none arrived");
        int64_t now = now_ns();
        must(event.status == PRESENCE_OFFLINE, "STOPPED", presence_status_text(event.status));
        seen[client_number(&event)] = now;
    }
}

static void watch_words(void)
{
    for (size_t i = 0; i < clients; i++) {
        const uint32_t *word = presence_sender_status_word(senders[i]);
        int64_t limit = now_ns() + 10000000000;
        while (__atomic_load_n(word, __ATOMIC_RELAXED) == 0) {
            must(now_ns() < limit, "status word", "it did not change");
            sched_yield();
        }
        seen[i] = now_ns();
    }
}

int main(int argc, char **argv)
{
    clients = number(argc, argv, 2);
    senders = allocate(clients, sizeof(presence_sender *));
    seen = allocate(clients, sizeof *seen);
    presence_conn *conn = connect_to(argument(argc, argv, 1), "");
    queue = new_queue();
    serve(conn, queue, "bench.offline", 0);
    ready();
    accept_all();
    if (strcmp(argument(argc, argv, 3), "event") == 0)
        watch_events();
    else
        watch_words();
    for (size_t i = 0; i < clients; i++)
        presence_sender_free(senders[i]);
    presence_close(conn, 1000);
    print_times(seen, clients);
    return 0;
}
