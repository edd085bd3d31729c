package message

import (
	"context"
	"errors"
	"fmt"
	"log"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// ResponseSender answers one request with the messages of a stream. What the handlers get also has the method
// GetSendCount() int64, which returns how many messages Send has sent.
type ResponseSender interface {
	// Send sends one message. If the reader is slow, it blocks until the message can be sent or the stream ends.
	//
	// It fails once the client is offline, with the text "客户端已离线: " and the client's id, and also when the gateway
	// does not want the rest of this stream, or is gone itself. errors.Is finds the reason in the error:
	// presence.ErrOffline, presence.ErrCancelled or presence.ErrPeerGone. It also fails after End and SendError, when
	// the context of the subscribe handler has ended (with the context's error), and without a connection.
	//
	// After nats.ErrMaxPayload, and after presence.ErrReserved for data that a peer without nats-presence would take for
	// the stream's end, the stream goes on.
	Send(data []byte) error
	// SendError ends the stream with an error, whose text the reader gets. It returns nil also if the client is offline.
	SendError(err error) error
	// End ends the stream. It returns nil also if the client is offline, and if the stream was ended before.
	End() error
	// IsClosed returns true after End and SendError. It does not say whether the client is online: Send does.
	IsClosed() bool
}

// CallbackStreamHandler answers one request. It runs in a goroutine of its own.
//
// If it returns nil, the stream stays open: it may have passed the sender on to another goroutine, which ends the
// stream with End. If it returns an error, the stream ends with the error's text; if it panics, with "服务器内部错误", and
// the panic's text is logged.
//
// ctx ends with the stream: when the client leaves, or the stream was ended. Its cause is then presence.ErrOffline and
// the like. It also ends with the context of the subscribe handler.
//
// requestMsg has the data, headers and reply subject of the request. Answer with sender, not with requestMsg.Respond:
// readers on nats-presence ignore what is published to the reply subject.
type CallbackStreamHandler func(ctx context.Context, requestMsg *nats.Msg, sender ResponseSender) error

// StartClientOfflineListener applies the offline announcements of other processes in this one: the clients' streams
// end. The subscribe handlers for streams do this too. Calling it again has no effect.
func (s *Subscriber) StartClientOfflineListener() error {
	conn, err := s.connection()
	if err != nil {
		return err
	}
	return conn.ListenOffline()
}

// StreamSubscribeHandler calls handler for each request to subject, until ctx ends: then it returns ctx's error.
// Streams that still run end with an error at that moment, and their Send fails. It does not wait for handlers, which
// [Subscriber.Close] does. After Close it returns the error "subscriber: closed".
//
// A request marks its client online in this process as long as the stream runs. A request without a reply subject is
// ignored. At most MaxStreamJobs streams run at once; a request beyond that is answered with "server busy".
func (s *Subscriber) StreamSubscribeHandler(ctx context.Context, subject string, handler CallbackStreamHandler) error {
	return s.StreamQueueSubscribeHandler(ctx, subject, "", handler)
}

// StreamQueueSubscribeHandler is like [Subscriber.StreamSubscribeHandler]; each request goes to one of the processes
// that serve the subject in the same queue group.
func (s *Subscriber) StreamQueueSubscribeHandler(
	ctx context.Context, subject, queue string, handler CallbackStreamHandler,
) error {
	if handler == nil {
		return errors.New("subscriber: handler is nil")
	}
	handle, err := s.serve(ctx, subject, queue, handler)
	if err != nil {
		return err
	}
	<-handle.ended
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-handle.served:
		if handle.err != nil {
			return handle.err
		}
	default:
	}
	return errSubscriberClosed
}

// StreamSubscriptionHandle is a subject that a [Subscriber] serves.
type StreamSubscriptionHandle struct {
	subscriber *Subscriber
	sub        *nats.Subscription // only the subject and the queue group, for handlers
	service    *presence.Service
	parent     context.Context // of the subscribe handler
	ctx        context.Context
	cancel     context.CancelFunc
	isStopped  atomic.Bool
	ended      chan struct{} // closed when the subject is not served any more
	served     chan struct{} // closed when Serve has returned err
	err        error
}

// serve begins to serve a subject.
func (s *Subscriber) serve(
	ctx context.Context, subject, queue string, handler CallbackStreamHandler,
) (*StreamSubscriptionHandle, error) {
	conn, err := s.connection()
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h := &StreamSubscriptionHandle{
		subscriber: s, sub: &nats.Subscription{Subject: subject, Queue: queue}, parent: ctx,
		ended: make(chan struct{}), served: make(chan struct{}),
	}
	h.ctx, h.cancel = context.WithCancel(ctx)
	h.service, err = conn.Listen(h.ctx, subject, queue,
		presence.Detached(), presence.MaxStreams(s.config.MaxStreamJobs))
	if err != nil {
		h.cancel()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, err
	}
	s.mu.Lock()
	isClosed := s.closed
	if !isClosed {
		s.served[h] = struct{}{}
	}
	s.mu.Unlock()
	if isClosed {
		h.service.Close()
		h.cancel()
		return nil, errSubscriberClosed
	}
	go func() {
		defer h.cancel()
		defer close(h.served)
		h.err = h.service.Serve(func(ctx context.Context, req *presence.Request, sender *presence.Sender) error {
			return h.answer(ctx, req, sender, handler)
		})
	}()
	context.AfterFunc(h.ctx, h.end)
	return h, nil
}

// Stop takes no more requests, and ends the streams that run with an error. Calling Stop again has no effect.
func (h *StreamSubscriptionHandle) Stop() error {
	h.cancel()
	<-h.ended
	return nil
}

// IsStopped returns true after Stop, and when the subject is not served any more for another reason.
func (h *StreamSubscriptionHandle) IsStopped() bool { return h.isStopped.Load() }

// Context returns a context that ends when the subject is not served any more.
func (h *StreamSubscriptionHandle) Context() context.Context { return h.ctx }

// end ends the service; its streams are cut.
func (h *StreamSubscriptionHandle) end() {
	if h.isStopped.Swap(true) {
		return
	}
	h.service.Close()
	h.forget()
}

// drain ends the service; its streams go on until ctx ends.
func (h *StreamSubscriptionHandle) drain(ctx context.Context) {
	if !h.isStopped.Swap(true) {
		h.service.Drain(ctx)
		h.cancel()
		h.forget()
	}
}

func (h *StreamSubscriptionHandle) forget() {
	h.subscriber.mu.Lock()
	delete(h.subscriber.served, h)
	h.subscriber.mu.Unlock()
	close(h.ended)
}

// answer calls the handler for one request, and ends the stream if the handler fails.
func (h *StreamSubscriptionHandle) answer(
	ctx context.Context, req *presence.Request, own *presence.Sender, handler CallbackStreamHandler,
) error {
	s := h.subscriber
	sender := &responseSender{own: own, handle: h, client: req.ClientID}
	if s.streams.Add(1) > int64(s.config.MaxStreamJobs) {
		sender.SendError(errServerBusy)
		return nil
	}
	context.AfterFunc(ctx, sender.release)
	s.tasks.begin()
	defer s.tasks.done()
	defer func() {
		if cause := recover(); cause != nil {
			log.Printf("message: the handler of %s panicked: %v\n%s", req.Subject, cause, debug.Stack())
			sender.SendError(errHandlerPanicked)
		}
	}()
	msg := &nats.Msg{Subject: req.Subject, Reply: req.Reply(), Header: req.Headers(), Data: req.Data, Sub: h.sub}
	if err := handler(ctx, msg, sender); err != nil {
		sender.SendError(err)
	}
	return nil
}

// responseSender is the ResponseSender that handlers get.
type responseSender struct {
	own      *presence.Sender
	handle   *StreamSubscriptionHandle
	client   string
	closed   atomic.Bool
	released sync.Once
}

func (s *responseSender) IsClosed() bool      { return s.closed.Load() }
func (s *responseSender) GetSendCount() int64 { return int64(s.own.SendCount()) }

func (s *responseSender) Send(data []byte) error {
	if s.closed.Load() {
		return errSenderClosed
	}
	err := s.own.Send(data)
	if err == nil {
		return nil
	}
	if errors.Is(err, presence.ErrTooLarge) {
		return fmt.Errorf("%w: %w", nats.ErrMaxPayload, err)
	}
	return s.failure(err)
}

func (s *responseSender) SendError(err error) error {
	if s.closed.Swap(true) {
		return errSenderClosed
	}
	s.release() // before the reader, which may request again, sees the end
	return s.endError(s.own.SendError(err))
}

func (s *responseSender) End() error {
	s.closed.Store(true)
	s.release()
	return s.endError(s.own.End())
}

// endError returns the error of ending a stream: none if its reader has left.
func (s *responseSender) endError(err error) error {
	if err == nil || s.hasReaderLeft(err) {
		return nil
	}
	return s.failure(err)
}

// hasReaderLeft returns true for the error of a stream that ended because nobody reads it.
func (s *responseSender) hasReaderLeft(err error) bool {
	return errors.Is(err, presence.ErrOffline) || errors.Is(err, presence.ErrPeerGone) ||
		errors.Is(err, presence.ErrCancelled) && s.handle.parent.Err() == nil && !s.handle.IsStopped()
}

// failure returns the error of a call that failed with err.
func (s *responseSender) failure(err error) error {
	switch {
	case s.hasReaderLeft(err):
		return &textError{offlineText + s.client, err}
	case errors.Is(err, presence.ErrCancelled) && s.handle.parent.Err() != nil:
		return s.handle.parent.Err()
	case errors.Is(err, presence.ErrClosed) && s.closed.Load():
		return errSenderClosed
	case errors.Is(err, presence.ErrCancelled), errors.Is(err, presence.ErrClosed):
		return &textError{closedText, err}
	case errors.Is(err, presence.ErrDisconnected):
		return &textError{unavailableText, err}
	}
	return err
}

// release frees the stream's place among the MaxStreamJobs.
func (s *responseSender) release() {
	s.released.Do(func() { s.handle.subscriber.streams.Add(-1) })
}
