module nats-presence/benches/gomessage

go 1.26.0

require (
	github.com/nats-io/nats.go v1.55.0
	github.com/nats-presence/nats-presence/bindings/go/message v0.0.0
)

require (
	github.com/klauspost/compress v1.20.0 // indirect
	github.com/nats-io/nkeys v0.4.16 // indirect
	github.com/nats-io/nuid v1.0.1 // indirect
	github.com/nats-presence/nats-presence/bindings/go v0.1.0 // indirect
	golang.org/x/crypto v0.57.0 // indirect
	golang.org/x/sys v0.48.0 // indirect
)

replace (
	github.com/nats-presence/nats-presence/bindings/go => ../../bindings/go
	github.com/nats-presence/nats-presence/bindings/go/message => ../../bindings/go/message
)
