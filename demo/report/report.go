// Package report prints events for the demo's driver, one JSON object per line, with the time.
package report

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

// Fields are the properties of an event.
type Fields map[string]any

var (
	mu  sync.Mutex
	out = json.NewEncoder(os.Stdout)
)

// Now returns the time in nanoseconds of the machine's monotonic clock, which all processes share.
func Now() int64 { return int64(C.now()) }

// Event prints an event of this moment, or of the time in the field "at".
func Event(kind string, fields Fields) {
	fields["event"] = kind
	if fields["at"] == nil {
		fields["at"] = Now()
	}
	mu.Lock()
	defer mu.Unlock()
	out.Encode(fields)
}
