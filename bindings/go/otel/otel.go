// Package otelpresence records the streams of package presence as spans of OpenTelemetry: one of kind CLIENT at the
// gateway, which lasts from the request to the stream's end, and one of kind SERVER at the worker, which is its child.
//
//	tracer := otelpresence.New()
//	stream, err := tracer.Request(ctx, conn, "count", nil, id)      // in place of conn.Request
//	conn.Serve(ctx, "count", "workers", tracer.Handler("count", handler))   // in place of handler
//
// The context travels in the headers of the request, such as W3C's traceparent; install a propagator with
// otel.SetTextMapPropagator(propagation.TraceContext{}). Spans have no client ids, payloads or texts of workers.
//
// The span events are "accepted" (the handler begins), "first message" and "stopped", whose attribute reason says why a
// stream did not run to its end: the client left, the gateway cancelled it, or the process at the other end is gone. A
// client that left is no error; all other ends but the worker's own are. docs/tracing.md has all attributes.
//
// A text that a handler sends with [presence.Sender.SendError] makes the CLIENT span an error; to make the SERVER span
// one, too, call trace.SpanFromContext(ctx).SetStatus in the handler.
package otelpresence

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.39.0"
	"go.opentelemetry.io/otel/trace"
)

const scope = "github.com/nats-presence/nats-presence/bindings/go/otel"

// Tracer makes the spans of streams.
type Tracer struct {
	provider   trace.TracerProvider
	propagator propagation.TextMapPropagator
	tracer     trace.Tracer
}

// Option is an option of [New].
type Option func(*Tracer)

// WithTracerProvider sets the provider. Default: otel.GetTracerProvider().
func WithTracerProvider(p trace.TracerProvider) Option { return func(t *Tracer) { t.provider = p } }

// WithPropagator sets what writes the context into headers, and reads it. Default: otel.GetTextMapPropagator().
func WithPropagator(p propagation.TextMapPropagator) Option {
	return func(t *Tracer) { t.propagator = p }
}

// New makes a Tracer.
func New(opts ...Option) *Tracer {
	t := &Tracer{provider: otel.GetTracerProvider(), propagator: otel.GetTextMapPropagator()}
	for _, option := range opts {
		option(t)
	}
	t.tracer = t.provider.Tracer(scope,
		trace.WithInstrumentationVersion(presence.Version()), trace.WithSchemaURL(semconv.SchemaURL))
	return t
}

// Request is [presence.Conn.Request] with a span, which ends when the stream does, even if nobody reads it.
func (t *Tracer) Request(
	ctx context.Context, conn *presence.Conn, subject string, data []byte, clientID string,
	opts ...presence.RequestOption,
) (*presence.Stream, error) {
	return t.request(ctx, subject, opts, func(opts []presence.RequestOption) (*presence.Stream, error) {
		return conn.Request(ctx, subject, data, clientID, opts...)
	})
}

// ClientRequest is [presence.Client.Request] with a span, which ends when the stream does, even if nobody reads it.
func (t *Tracer) ClientRequest(
	ctx context.Context, client *presence.Client, conn *presence.Conn, subject string, data []byte,
	opts ...presence.RequestOption,
) (*presence.Stream, error) {
	return t.request(ctx, subject, opts, func(opts []presence.RequestOption) (*presence.Stream, error) {
		return client.Request(ctx, conn, subject, data, opts...)
	})
}

func (t *Tracer) request(
	ctx context.Context, subject string, opts []presence.RequestOption,
	request func([]presence.RequestOption) (*presence.Stream, error),
) (*presence.Stream, error) {
	ctx, span := t.start(ctx, subject, trace.SpanKindClient)
	headers := propagation.MapCarrier{}
	t.propagator.Inject(ctx, headers)
	all := opts[:len(opts):len(opts)]
	for name, value := range headers {
		all = append(all, presence.Header(name, value))
	}
	all = append(all, presence.Trace(presence.StreamTrace{
		FirstMessage: func() { span.AddEvent("first message") },
		Ended: func(err error) {
			addStopped(span, statusOf(err), time.Now())
			end(span, err)
		},
	}))
	stream, err := request(all)
	if err != nil {
		end(span, err) // has no effect if the stream has ended already
	}
	return stream, err
}

// Handler returns a handler that calls handler with the context of a span, whose name is the subject as it is served,
// wildcards included. The span ends when the handler has returned and the stream has ended.
func (t *Tracer) Handler(subject string, handler presence.Handler) presence.Handler {
	return func(ctx context.Context, req *presence.Request, s *presence.Sender) (err error) {
		parent := t.propagator.Extract(ctx, carrier(req.Headers()))
		spanCtx, span := t.start(parent, subject, trace.SpanKindServer)
		if req.Subject != subject {
			span.SetAttributes(semconv.RPCMethodOriginal(req.Subject))
		}
		span.AddEvent("accepted")
		s.OnFirstMessage(func() { span.AddEvent("first message") })
		// The span needs the ends of both, in any order: why the stream was stopped, and what the handler returned.
		var stopped, failure error
		var at time.Time
		var ended atomic.Int32
		endOne := func() {
			if ended.Add(1) < 2 {
				return
			}
			addStopped(span, statusOf(stopped), at) // not before: the handler may still add the first message
			if stopped != nil {
				failure = stopped // what the handler returned only follows from that
			}
			end(span, failure)
		}
		context.AfterFunc(ctx, func() {
			stopped, at = context.Cause(ctx), time.Now()
			if statusOf(stopped) == 0 { // the stream has ended, or its service
				stopped = nil
				if err := s.Err(); errors.Is(err, presence.ErrCancelled) {
					stopped = err
				}
			}
			endOne()
		})
		defer endOne()
		failure = errPanic
		err = handler(spanCtx, req, s)
		failure = err
		return err
	}
}

var errPanic = errors.New("the handler panicked")

func (t *Tracer) start(ctx context.Context, subject string, kind trace.SpanKind) (context.Context, trace.Span) {
	return t.tracer.Start(ctx, subject, trace.WithSpanKind(kind), trace.WithAttributes(
		semconv.RPCSystemNameKey.String("nats_presence"),
		semconv.RPCMethod(subject),
	))
}

// addStopped adds the event of a stream that was stopped, if it was.
func addStopped(span trace.Span, status presence.Status, at time.Time) {
	switch status {
	case presence.ErrOffline, presence.ErrCancelled, presence.ErrPeerGone, presence.ErrClosed, presence.ErrDisconnected:
		span.AddEvent("stopped", trace.WithTimestamp(at), trace.WithAttributes(attribute.String("reason", status.Error())))
	}
}

// end ends the span of a stream that ended with err. It leaves out the text of the error, which may be a worker's.
func end(span trace.Span, err error) {
	defer span.End()
	status := statusOf(err)
	name, isKnown := statusNames[status]
	switch {
	case err == nil:
		span.SetAttributes(semconv.RPCResponseStatusCode("OK"))
	case err == errPanic:
		setError(span, "panic", err.Error())
	case !isKnown:
		setError(span, fmt.Sprintf("%T", err), "the handler failed")
	default:
		span.SetAttributes(semconv.RPCResponseStatusCode(name))
		if status != presence.ErrOffline && status != presence.ErrCancelled {
			setError(span, name, status.Error())
		}
	}
}

func setError(span trace.Span, kind, text string) {
	span.SetAttributes(semconv.ErrorTypeKey.String(kind))
	span.SetStatus(codes.Error, text)
}

// statusOf returns the status of an error of package presence, and otherwise 0.
func statusOf(err error) (status presence.Status) {
	errors.As(err, &status)
	return status
}

// statusNames are the names in nats_presence.h, without PRESENCE_.
var statusNames = map[presence.Status]string{
	presence.ErrInvalid:      "INVALID",
	presence.ErrOffline:      "OFFLINE",
	presence.ErrClosed:       "CLOSED",
	presence.ErrCancelled:    "CANCELLED",
	presence.ErrFull:         "FULL",
	presence.ErrTooLarge:     "TOO_LARGE",
	presence.ErrReserved:     "RESERVED",
	presence.ErrDisconnected: "DISCONNECTED",
	presence.ErrPeerGone:     "PEER_GONE",
	presence.ErrNoResponders: "NO_RESPONDERS",
	presence.ErrBusy:         "BUSY",
	presence.ErrTimeout:      "TIMEOUT",
	presence.ErrRemote:       "REMOTE",
	presence.ErrForked:       "FORKED",
	presence.ErrInternal:     "INTERNAL",
}

// carrier reads headers. Names are compared without case, because programs in other languages may change it.
type carrier map[string][]string

func (c carrier) Get(name string) string {
	if values := c[name]; len(values) > 0 {
		return values[0]
	}
	for other, values := range c {
		if strings.EqualFold(name, other) {
			return values[0]
		}
	}
	return ""
}

func (c carrier) Keys() (names []string) {
	for name := range c {
		names = append(names, name)
	}
	return names
}

// Set is not used: the headers of a request that has arrived do not change.
func (c carrier) Set(string, string) {}
