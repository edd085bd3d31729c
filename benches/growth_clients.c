/* How the cost of a mark and of a check grows with the number of clients: COUNT ids in random order, again and again,
 * about CALLS calls of each function. No connection is open.
 *
 * In the first round the map grows; it is not measured (see mark.c). In the last one each call is timed, for the 99th
 * percentile, which includes the time to read the clock.
 *
 * growth_clients IDS COUNT CALLS
 */
#include "bench.h"
#include <nats_presence.h>

enum { ONLINE, CHECK, OFFLINE, FUNCTIONS };

static const char *const names[FUNCTIONS] = {"online", "check", "offline"};
static char *ids;
static uint32_t *order;
static size_t count, failed;

static bool call(int function, size_t i)
{
    const char *id = ids + (size_t)order[i] * ID_SIZE;
    switch (function) {
    case ONLINE:
        return presence_mark_online(id, ID_SIZE) == PRESENCE_OK;
    case CHECK:
        return presence_is_online(id, ID_SIZE);
    default:
        return presence_mark_offline(id, ID_SIZE) == PRESENCE_OK;
    }
}

/* Calls a function for each id. Returns how many nanoseconds that took. */
static int64_t call_for_all(int function)
{
    int64_t start = now_ns();
    for (size_t i = 0; i < count; i++)
        failed += !call(function, i);
    int64_t end = now_ns();
    must(presence_online_count() == (function == OFFLINE ? 0 : count), "presence_online_count", names[function]);
    return end - start;
}

/* As call_for_all. Returns the 99th percentile of the nanoseconds of a call. */
static int64_t p99_of_call(int function, int64_t *times)
{
    for (size_t i = 0; i < count; i++) {
        int64_t start = now_ns();
        failed += !call(function, i);
        times[i] = now_ns() - start;
    }
    qsort(times, count, sizeof *times, compare_times);
    return percentile(times, count, 99);
}

int main(int argc, char **argv)
{
    size_t known;
    ids = read_ids(argument(argc, argv, 1), &known);
    count = number(argc, argv, 2);
    must(count > 0 && count <= known, "COUNT", "there are not so many ids");
    order = order_of(count, true);
    int64_t *times = allocate(count, sizeof *times), sum[FUNCTIONS] = {0}, p99[FUNCTIONS];
    size_t calls = number(argc, argv, 3), rounds = calls > count ? calls / count : 1;

    for (size_t round = 0; round <= rounds; round++) {
        for (int function = 0; function < FUNCTIONS; function++) {
            int64_t time = call_for_all(function);
            sum[function] += round == 0 ? 0 : time;
        }
    }
    for (int function = 0; function < FUNCTIONS; function++)
        p99[function] = p99_of_call(function, times);
    must(failed == 0, "mark or check", "a call failed");

    for (int function = 0; function < FUNCTIONS; function++)
        printf("%s\"%s_ns\": %.1f, \"%s_p99_ns\": %lld", function == 0 ? "{" : ", ", names[function],
               (double)sum[function] / (double)(rounds * count), names[function], (long long)p99[function]);
    puts("}");
    return 0;
}
