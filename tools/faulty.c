/* Has the faults that sanitizers and valgrind must find: a write into freed memory or, with an argument, a leak.
 * Code of the library does both, to show that the library is instrumented. */
#include <nats_presence.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  (void)argv;
  /* Several: a pointer to the last one may remain on the stack. */
  for (int i = 0; argc > 1 && i < 10; i++) {
    if (!presence_config_new()) return 1;
  }
  if (argc > 1) return 0;
  presence_conn *conn;
  presence_error *volatile error = (presence_error *)malloc(sizeof *error); /* volatile: otherwise the compiler warns */
  free(error);
  return presence_connect("", NULL, &conn, error) == PRESENCE_OK;
}
