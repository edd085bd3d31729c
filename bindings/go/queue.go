package presence

// #include <stdlib.h>
// #include <nats_presence.h>
// #cgo noescape presence_queue_wait
// #cgo nocallback presence_queue_wait
import "C"

import (
	"context"
	"unsafe"
)

// EventKind is the kind of an [Event].
type EventKind int32

const (
	// ClientOnline: the client came online in this process.
	ClientOnline EventKind = C.PRESENCE_EVENT_ONLINE
	// ClientOffline: the client went offline in this process.
	ClientOffline EventKind = C.PRESENCE_EVENT_OFFLINE
	// Connected: the connection has reached nats-server again.
	Connected EventKind = C.PRESENCE_EVENT_CONNECTED
	// Disconnected: the connection to nats-server is lost. With ErrClosed no reconnect is attempted.
	Disconnected EventKind = C.PRESENCE_EVENT_DISCONNECTED
	// Log: a message for the operator.
	Log EventKind = C.PRESENCE_EVENT_LOG
	// Serving: a service has begun; Text is its subject. The server has the subscription, unless there is no connection
	// now.
	Serving EventKind = -1
)

// String returns the kind's name in lower case.
func (k EventKind) String() string {
	switch k {
	case ClientOnline:
		return "client online"
	case ClientOffline:
		return "client offline"
	case Connected:
		return "connected"
	case Disconnected:
		return "disconnected"
	case Serving:
		return "serving"
	}
	return "log"
}

// Event is something that happened to a client (see [Watch]) or to a connection (see [WithLog]).
type Event struct {
	Kind     EventKind
	Status   Status // the reason, for Disconnected and Log; 0 if there is none
	ClientID string // for ClientOnline and ClientOffline, and for a handler's error or panic
	Text     string // for people
	// Subject is the subject of a service whose subscription nats-server refuses or has taken back (Disconnected), or
	// accepts again (Connected). It is empty for events of the connection itself.
	Subject string
}

// Watch sends an event to the returned channel whenever a client comes online or goes offline in this process, from now
// on. The channel is closed soon after ctx ends. At most 65,536 events are kept for a slow reader; later ones are
// dropped, and an event of kind Log with ErrFull reports that.
//
// Each watch occupies a thread of the operating system: use one per process, not one per client.
func Watch(ctx context.Context) (<-chan Event, error) {
	q, err := newQueue()
	if err != nil {
		return nil, err
	}
	if err := statusError(C.presence_watch(q.handle, 0), "watch"); err != nil {
		q.free()
		return nil, err
	}
	stop := context.AfterFunc(ctx, q.wake)
	watched := make(chan Event)
	go func() {
		defer close(watched)
		defer q.free()
		defer stop()
		for ctx.Err() == nil {
			events, err := q.wait()
			if err != nil {
				return
			}
			for i := range events {
				select {
				case watched <- newEvent(&events[i]):
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return watched, nil
}

func newEvent(e *C.presence_event) Event {
	return Event{
		Kind:     EventKind(e.kind),
		Status:   Status(e.status),
		ClientID: string(view(e.client, e.client_len)),
		Text:     string(view(e.data, e.data_len)),
		Subject:  string(view(e.subject, e.subject_len)),
	}
}

// view returns the bytes that a field of an event points to, without a copy: they are valid until the next wait. It
// returns nil if length is 0, whatever the pointer.
func view[T C.char | C.uint8_t](data *T, length C.size_t) []byte {
	if length == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(data)), int(length))
}

// queue is a queue of the C library, with the memory that a wait writes events to.
type queue struct {
	handle *C.presence_queue
	events []C.presence_event
}

// maxEvents is how many events one wait returns at most.
const maxEvents = 1024

func newQueue() (*queue, error) {
	q := new(queue)
	if err := statusError(C.presence_queue_new(&q.handle), "queue"); err != nil {
		return nil, err
	}
	memory := C.calloc(maxEvents, C.sizeof_presence_event)
	q.events = unsafe.Slice((*C.presence_event)(memory), maxEvents)
	return q, nil
}

// wait waits for events, which are valid until the next wait, or for a wake, which returns none. Only one goroutine may
// wait at a time.
func (q *queue) wait() ([]C.presence_event, error) {
	n := C.presence_queue_wait(q.handle, &q.events[0], maxEvents, -1)
	if n < 0 {
		return nil, statusError(C.presence_status(n), "queue")
	}
	return q.events[:n], nil
}

func (q *queue) wake() { C.presence_queue_wake(q.handle) }

// free frees the queue. No goroutine may wait on it, now or later.
func (q *queue) free() {
	C.presence_queue_free(q.handle)
	C.free(unsafe.Pointer(&q.events[0]))
}
