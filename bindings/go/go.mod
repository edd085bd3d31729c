module github.com/nats-presence/nats-presence/bindings/go

go 1.24
