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

// EventKind is what an [Event] tells.
type EventKind int32

const (
	// ClientOnline: the client came online in this process.
	ClientOnline EventKind = C.PRESENCE_EVENT_ONLINE
	// ClientOffline: the client went offline in this process.
	ClientOffline EventKind = C.PRESENCE_EVENT_OFFLINE
	// Connected: the connection has reached nats-server again.
	Connected EventKind = C.PRESENCE_EVENT_CONNECTED
	// Disconnected: the connection to nats-server is lost. With ErrClosed it will not be made again.
	Disconnected EventKind = C.PRESENCE_EVENT_DISCONNECTED
	// Log: something that people should know.
	Log EventKind = C.PRESENCE_EVENT_LOG
	// Serving: Serve has begun, its subject is the text; unless there is no connection now, the server knows it.
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
	Status   Status // why, for Disconnected and Log; 0 where there is nothing to add
	ClientID string // for ClientOnline and ClientOffline, and a handler's error or panic
	Text     string // for people
	// Subject is that of a service whose subscription nats-server refuses or has taken back (Disconnected), or accepts again
	// (Connected). It is empty for events of the connection itself.
	Subject string
}

// Watch tells on the channel, from now on, when clients come online and go offline in this process. The channel is closed
// soon after ctx ends. At most 65,536 events wait for a slow reader; further ones are dropped, and an event of kind Log
// with ErrFull says so.
//
// Each watch holds a thread of the operating system: one for a process is meant, not one for each client.
func Watch(ctx context.Context) (<-chan Event, error) {
	q, err := newQueue()
	if err != nil {
		return nil, err
	}
	if err := failed(C.presence_watch(q.handle, 0), "watch"); err != nil {
		q.free()
		return nil, err
	}
	stop := context.AfterFunc(ctx, q.wake)
	told := make(chan Event)
	go func() {
		defer close(told)
		defer q.free()
		defer stop()
		for ctx.Err() == nil {
			events, err := q.wait()
			if err != nil {
				return
			}
			for i := range events {
				select {
				case told <- exported(&events[i]):
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return told, nil
}

func exported(e *C.presence_event) Event {
	return Event{
		Kind:     EventKind(e.kind),
		Status:   Status(e.status),
		ClientID: string(view(e.client, e.client_len)),
		Text:     string(view(e.data, e.data_len)),
		Subject:  string(view(e.subject, e.subject_len)),
	}
}

// view shows what an event points to, until the next wait; nil where that is nothing, whatever its address.
func view[T C.char | C.uint8_t](data *T, length C.size_t) []byte {
	if length == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(data)), int(length))
}

// queue is a queue of the C library and the room for what one wait gives.
type queue struct {
	handle *C.presence_queue
	events []C.presence_event
}

// batch is how many events one wait takes at most.
const batch = 1024

func newQueue() (*queue, error) {
	q := new(queue)
	if err := failed(C.presence_queue_new(&q.handle), "queue"); err != nil {
		return nil, err
	}
	room := C.calloc(batch, C.sizeof_presence_event)
	q.events = unsafe.Slice((*C.presence_event)(room), batch)
	return q, nil
}

// wait waits for events or a wake, which gives none. They are valid until the next wait. One goroutine at a time.
func (q *queue) wait() ([]C.presence_event, error) {
	n := C.presence_queue_wait(q.handle, &q.events[0], batch, -1)
	if n < 0 {
		return nil, failed(C.int32_t(n), "queue")
	}
	return q.events[:n], nil
}

func (q *queue) wake() { C.presence_queue_wake(q.handle) }

// free frees the queue. Nobody waits on it now or later.
func (q *queue) free() {
	C.presence_queue_free(q.handle)
	C.free(unsafe.Pointer(&q.events[0]))
}
