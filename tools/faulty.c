/* Has the faults that sanitizers and valgrind must find: a write into freed memory or, with an argument, a leak or a
 * race. Code of the library does each, to show that the library is instrumented. */
#include <nats_presence.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static presence_error shared;

static void *fail_to_connect(void *error) {
  presence_conn *conn;
  return presence_connect("", NULL, &conn, (presence_error *)error) == PRESENCE_OK ? error : NULL;
}

int main(int argc, char **argv) {
  if (argc > 1 && argv && strcmp(argv[1], "race") == 0) {
    pthread_t other;
    if (pthread_create(&other, NULL, fail_to_connect, &shared) != 0) return 1;
    return fail_to_connect(&shared) || pthread_join(other, NULL) != 0;
  }
  /* Several: a pointer to the last one may remain on the stack. */
  for (int i = 0; argc > 1 && i < 10; i++) {
    if (!presence_config_new()) return 1;
  }
  if (argc > 1) return 0;
  presence_error *volatile error = (presence_error *)malloc(sizeof *error); /* volatile: otherwise the compiler warns */
  free(error);
  return fail_to_connect(error) != NULL;
}
