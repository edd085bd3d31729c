/* Measures the time to mark many clients online and offline, and the memory they need. No connection is open.
 *
 * mark IDS ordered|random
 */
#include "bench.h"
#include <nats_presence.h>

int main(int argc, char **argv)
{
    size_t count, failed = 0;
    char *ids = read_ids(argument(argc, argv, 1), &count);
    uint32_t *order = order_of(count, strcmp(argument(argc, argv, 2), "random") == 0);

    int64_t before = resident_bytes(), start = now_ns();
    for (size_t i = 0; i < count; i++)
        failed += presence_mark_online(ids + (size_t)order[i] * ID_SIZE, ID_SIZE) != PRESENCE_OK;
    int64_t online = now_ns() - start, bytes = resident_bytes() - before;
    must(presence_online_count() == count, "presence_online_count", "not all clients are online");

    start = now_ns();
    for (size_t i = 0; i < count; i++)
        failed += presence_mark_offline(ids + (size_t)order[i] * ID_SIZE, ID_SIZE) != PRESENCE_OK;
    int64_t offline = now_ns() - start;
    must(presence_online_count() == 0, "presence_online_count", "not all clients are offline");
    must(failed == 0, "mark", "a call failed");

    printf("{\"online_ns\": %.1f, \"offline_ns\": %.1f, \"bytes\": %.1f}\n", (double)online / (double)count,
           (double)offline / (double)count, (double)bytes / (double)count);
    return 0;
}
