module github.com/nats-presence/nats-presence/demo/web

go 1.24

require (
	github.com/coder/websocket v1.8.15
	github.com/nats-io/nats.go v1.48.0
	github.com/nats-presence/nats-presence/bindings/go v0.1.0
	github.com/nats-presence/nats-presence/demo v0.0.0
)

require (
	github.com/klauspost/compress v1.18.0 // indirect
	github.com/nats-io/nkeys v0.4.11 // indirect
	github.com/nats-io/nuid v1.0.1 // indirect
	golang.org/x/crypto v0.37.0 // indirect
	golang.org/x/sys v0.32.0 // indirect
)

replace (
	github.com/nats-presence/nats-presence/bindings/go => ../../bindings/go
	github.com/nats-presence/nats-presence/demo => ..
)
