module github.com/nats-presence/nats-presence/tests/soak/peers/go

go 1.24

require github.com/nats-presence/nats-presence/bindings/go v0.0.0

replace github.com/nats-presence/nats-presence/bindings/go => ../../../../bindings/go
