// Package library contains the static library of nats-presence for one platform.
package library

// #cgo LDFLAGS: ${SRCDIR}/libnats_presence.a -lpthread -lm -ldl
import "C"
