//go:build !presence_dynamic && !presence_static

package presence

// #cgo CFLAGS: -I${SRCDIR}
import "C"
