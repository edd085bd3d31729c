#include <nats_presence.h>

/* Forks. The child checks which functions of the library it can use. Returns 0 if all checks passed, the line of the check
 * that failed, or a negative number: the signal that ended the child, or the errno of fork. */
int fork_and_use(const char *url, presence_conn *of_parent);
