#include <nats_presence.h>

/* Forks. The child checks what it may use of the library. Returns 0, the line of the check that failed in it, or less
 * than 0: the number of the signal that ended the child, or of the error of fork. */
int fork_and_use(const char *url, presence_conn *of_parent);
