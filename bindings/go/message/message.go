// Package message has the names and signatures of a package of this name that streams over plain NATS, so that a
// gateway or a worker that was written for it uses nats-presence after changing one import path.
//
// The streams run on nats-presence (the package presence): a worker stops when its client leaves, when the gateway's
// process is killed, and when the reader of one stream gives up. Peers that speak the plain protocol, without this
// library, work with it. Everything else is a thin layer over nats.go.
//
// A gateway uses [New] and the Stream functions of [Pool], a worker [NewSubscriber] and
// [Subscriber.StreamQueueSubscribeHandler]. The texts of errors are those that programs compare; errors.Is finds the
// statuses of the package presence in them, such as presence.ErrOffline and presence.ErrBusy.
//
// What an operator should know is logged by the standard logger: panics of handlers, lost connections, and what
// nats-server or the library has refused.
//
// New programs should use the package presence, which reports more and needs no nats.go.
package message

import (
	"log"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// logEvent logs, by the standard logger, what an operator should know about a connection for streams.
func logEvent(event presence.Event) {
	if event.Kind == presence.Log || event.Kind == presence.Disconnected {
		log.Printf("message: %s: %s", event.Kind, event.Text)
	}
}

// MarkClientOnline marks a client online in this process, until it is marked offline. A request marks its client online
// by itself, as long as the stream runs. An invalid id is ignored; see [presence.MarkClientOnline].
func MarkClientOnline(connectID string) { presence.MarkClientOnline(connectID) }

// MarkClientOffline marks a client offline. Its streams in this process end before this returns: no send to the client
// succeeds any more. If the process has a [Pool], the client is also announced offline to all other processes, so that
// the workers stop.
func MarkClientOffline(connectID string) { presence.MarkClientOffline(connectID) }

// IsClientOnline reports whether a client is online in this process: it is marked online, or has a running stream. The
// empty id always is, an unknown one never.
func IsClientOnline(connectID string) bool { return presence.IsClientOnline(connectID) }
