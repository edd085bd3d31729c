// Package tell prints what happens, for the demo's driver: one JSON object a line, with the time.
package tell

// #include <time.h>
// static long long now(void) {
//   struct timespec t;
//   clock_gettime(CLOCK_MONOTONIC, &t);
//   return t.tv_sec * 1000000000LL + t.tv_nsec;
// }
import "C"

import (
	"encoding/json"
	"os"
	"sync"
)

// Fields is what there is to tell of an event.
type Fields map[string]any

var (
	mu  sync.Mutex
	out = json.NewEncoder(os.Stdout)
)

// Now is the machine's monotonic clock in nanoseconds, the same in all its processes.
func Now() int64 { return int64(C.now()) }

// Event tells that something happened just now, unless the fields say when ("at").
func Event(kind string, fields Fields) {
	fields["event"] = kind
	if fields["at"] == nil {
		fields["at"] = Now()
	}
	mu.Lock()
	defer mu.Unlock()
	out.Encode(fields)
}
