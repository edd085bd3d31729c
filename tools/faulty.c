/* Does wrong what sanitizers and valgrind must find: writes into freed memory, or, with an argument, loses memory. It is
 * the library that does both: its own code is watched. */
#include <nats_presence.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  (void)argv;
  /* Some, as the last one's address may still be in sight. */
  for (int i = 0; argc > 1 && i < 10; i++) {
    if (!presence_config_new()) return 1;
  }
  if (argc > 1) return 0;
  presence_conn *conn;
  presence_error *volatile error = (presence_error *)malloc(sizeof *error); /* volatile: the compiler would warn */
  free(error);
  return presence_connect("", NULL, &conn, error) == PRESENCE_OK;
}
