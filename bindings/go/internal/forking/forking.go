// Package forking forks a Go process from C, for the tests.
package forking

// #cgo !presence_static pkg-config: nats-presence
// #cgo presence_static pkg-config: nats-presence-static
// #include "forking.h"
import "C"

import (
	"fmt"
	"unsafe"
)

// Fork forks this process, which has the open presence_conn conn. The child calls the C library only, checks the
// results, and exits. Fork returns an error if a check failed in the child.
func Fork(url string, conn unsafe.Pointer) error {
	text := append([]byte(url), 0)
	failed := C.fork_and_use((*C.char)(unsafe.Pointer(&text[0])), (*C.presence_conn)(conn))
	if failed != 0 {
		return fmt.Errorf("the check in line %d of forking.c failed (negative: a signal or an errno)", failed)
	}
	return nil
}
