//go:build presence_static

package presence

// #cgo pkg-config: nats-presence-static
import "C"
