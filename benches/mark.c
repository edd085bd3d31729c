/* Measures the time to mark many clients online and offline, and the memory they need. No connection is open.
 *
 * mark IDS ordered|random|many: one call for each id, or one for 10,000 ids.
 */
#include "bench.h"
#include <nats_presence.h>

/* The ids of one call of presence_mark_many. */
#define MANY 10000

/* Marks all of `ids`. Returns how many calls failed. */
static size_t mark(bool online, const char *ids, const uint32_t *order, size_t count, bool many)
{
    static size_t lens[MANY];
    size_t failed = 0;
    for (size_t i = 0; i < MANY; i++)
        lens[i] = ID_SIZE;
    for (size_t i = 0; many && i < count; i += MANY)
        failed += presence_mark_many(online, ids + i * ID_SIZE, lens, count - i < MANY ? count - i : MANY, NULL)
               != PRESENCE_OK;
    for (size_t i = 0; !many && i < count; i++) {
        const char *id = ids + (size_t)order[i] * ID_SIZE;
        failed += (online ? presence_mark_online(id, ID_SIZE) : presence_mark_offline(id, ID_SIZE)) != PRESENCE_OK;
    }
    return failed;
}

int main(int argc, char **argv)
{
    size_t count;
    char *ids = read_ids(argument(argc, argv, 1), &count);
    const char *how = argument(argc, argv, 2);
    bool many = strcmp(how, "many") == 0;
    uint32_t *order = order_of(count, strcmp(how, "random") == 0);

    int64_t before = resident_bytes(), start = now_ns();
    size_t failed = mark(true, ids, order, count, many);
    int64_t online = now_ns() - start, bytes = resident_bytes() - before;
    must(presence_online_count() == count, "presence_online_count", "not all clients are online");

    start = now_ns();
    failed += mark(false, ids, order, count, many);
    int64_t offline = now_ns() - start;
    must(presence_online_count() == 0, "presence_online_count", "not all clients are offline");
    must(failed == 0, "mark", "a call failed");

    printf("{\"online_ns\": %.1f, \"offline_ns\": %.1f, \"bytes\": %.1f}\n", (double)online / (double)count,
           (double)offline / (double)count, (double)bytes / (double)count);
    return 0;
}
