/* What the benchmark programs share. Each prints one line of JSON when it is done; a serving one prints READY before. */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* Bytes in each of the ids of a million clients. */
#define ID_SIZE 20

/* Ends the program unless `ok`, saying what failed and why. */
static inline void must(bool ok, const char *what, const char *why)
{
    if (!ok) {
        fprintf(stderr, "%s: %s\n", what, why);
        exit(1);
    }
}

/* The program's argument number `i`. */
static inline const char *argument(int argc, char **argv, int i)
{
    must(i < argc, argv[0], "too few arguments; see benches/run");
    return argv[i];
}

static inline size_t number(int argc, char **argv, int i)
{
    return strtoull(argument(argc, argv, i), NULL, 10);
}

static inline void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    must(memory != NULL, "calloc", "no memory");
    return memory;
}

/* Nanoseconds of a clock that all processes share. */
static inline int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static inline void sleep_until(int64_t ns)
{
    struct timespec time = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) != 0) {}
}

/* Nanoseconds of CPU, user and system, of all threads of this process. */
static inline int64_t cpu_ns(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (int64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000
         + (int64_t)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000;
}

/* Bytes of this process that are in memory. */
static inline int64_t resident_bytes(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    must(file != NULL && fscanf(file, "%*d %ld", &pages) == 1, "/proc/self/statm", "cannot be read");
    fclose(file);
    return (int64_t)pages * sysconf(_SC_PAGESIZE);
}

/* Reads all ids of a file, one after the other without anything between; their number is `*count`. */
static inline char *read_ids(const char *path, size_t *count)
{
    FILE *file = fopen(path, "rb");
    must(file != NULL, path, "cannot be opened");
    fseek(file, 0, SEEK_END);
    *count = (size_t)ftell(file) / ID_SIZE;
    rewind(file);
    char *ids = allocate(*count, ID_SIZE);
    must(fread(ids, ID_SIZE, *count, file) == *count, path, "cannot be read");
    fclose(file);
    return ids;
}

/* The numbers below `count`: in order, or in one that is random and always the same. */
static inline uint32_t *order_of(size_t count, bool random)
{
    uint32_t *order = allocate(count, sizeof *order);
    uint64_t state = 88172645463325252;
    for (size_t i = 0; i < count; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        size_t j = random ? state % (i + 1) : i;
        order[i] = order[j];
        order[j] = (uint32_t)i;
    }
    return order;
}

static inline int compare_times(const void *left, const void *right)
{
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;
    return (a > b) - (a < b);
}

/* The time below which `percent` of `times` lie; they must be sorted (qsort, compare_times). */
static inline int64_t percentile(const int64_t *times, size_t count, size_t percent)
{
    return times[(count - 1) * percent / 100];
}

/* Lets whoever started this program start its partner. */
static inline void ready(void)
{
    puts("READY");
    fflush(stdout);
}

/* Prints points in time, each under its number, 0 where there is none. */
static inline void print_times(const int64_t *times, size_t count)
{
    printf("{\"times_ns\": [");
    for (size_t i = 0; i < count; i++)
        printf("%s%lld", i == 0 ? "" : ", ", (long long)times[i]);
    puts("]}");
}

#endif
