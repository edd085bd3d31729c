/* Shared by the benchmark programs. Each prints a line of JSON at its end. A program that serves prints READY first. */
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

/* The size in bytes of a client id. */
#define ID_SIZE 20

/* Exits unless `ok`, and prints what failed and why. */
static inline void must(bool ok, const char *what, const char *why)
{
    if (!ok) {
        fprintf(stderr, "%s: %s\n", what, why);
        exit(1);
    }
}

/* Returns argument number `i` of the program. */
static inline const char *argument(int argc, char **argv, int i)
{
    must(i < argc, argv[0], "too few arguments: see benches/run");
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

/* Returns the nanoseconds of a clock that all processes share. */
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

/* Returns the CPU time of this process, of all threads, user and system, in nanoseconds. */
static inline int64_t cpu_ns(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (int64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000
         + (int64_t)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000;
}

/* Returns the resident memory of this process in bytes. */
static inline int64_t resident_bytes(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    must(file != NULL && fscanf(file, "%*d %ld", &pages) == 1, "/proc/self/statm", "cannot be read");
    fclose(file);
    return (int64_t)pages * sysconf(_SC_PAGESIZE);
}

/* Reads a file of ids without separators. Stores their number in `*count`. */
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

/* Returns the numbers below `count` in ascending order, or in a random order that is always the same. */
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

/* Returns a percentile of `times`, which must be sorted (qsort, compare_times). */
static inline int64_t percentile(const int64_t *times, size_t count, size_t percent)
{
    return times[(count - 1) * percent / 100];
}

/* Tells benches/run to start the program at the other end. */
static inline void ready(void)
{
    puts("READY");
    fflush(stdout);
}

/* Prints times as JSON, by their index; 0 where there is none. */
static inline void print_times(const int64_t *times, size_t count)
{
    printf("{\"times_ns\": [");
    for (size_t i = 0; i < count; i++)
        printf("%s%lld", i == 0 ? "" : ", ", (long long)times[i]);
    puts("]}");
}

#endif
