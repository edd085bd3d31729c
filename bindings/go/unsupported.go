//go:build !cgo || !((linux && (amd64 || arm64)) || presence_dynamic || presence_static)

package presence

// This constant does not compile, so that the compiler's message says what is missing.
const _ int = "nats-presence needs cgo on 64-bit Linux: set CGO_ENABLED=1 and install a C compiler, such as gcc"
