/* As much of a NATS client as the worker needs for comparison: it subscribes, gets requests, and publishes answers. */
#include <stdbool.h>
#include <stddef.h>

/* Connects to "nats://host:port" and subscribes. Prints an error and exits if it cannot. */
void plain_connect(const char *url, const char *const *subjects, int subject_count, const char *group);

/* The descriptor to poll for requests; -1 while the connection is lost. */
int plain_fd(void);

/* Reads what has come, and calls `handle` for each request. Connects again if the connection was lost. */
void plain_read(void (*handle)(const char *reply, const char *data, size_t length));

/* Publishes a message. Without a connection it is lost. */
void plain_publish(const char *subject, const char *data);
