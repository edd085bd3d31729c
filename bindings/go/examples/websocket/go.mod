module github.com/nats-presence/nats-presence/bindings/go/examples/websocket

go 1.24

require (
	github.com/coder/websocket v1.8.14
	github.com/nats-presence/nats-presence/bindings/go v0.1.0
)

// Used in this tree only: a replace has no effect in the modules that require this one.
replace github.com/nats-presence/nats-presence/bindings/go => ../..
