module nats-presence/benches/syncmap

go 1.24
