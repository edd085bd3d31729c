package otelpresence_test

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"testing"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	otelpresence "github.com/nats-presence/nats-presence/bindings/go/otel"
	"github.com/nats-presence/nats-presence/bindings/go/presencetest"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// spans receives each span that has ended.
type spans chan sdk.ReadOnlySpan

func (s spans) OnStart(context.Context, sdk.ReadWriteSpan) {}
func (s spans) OnEnd(span sdk.ReadOnlySpan)                { s <- span }
func (s spans) Shutdown(context.Context) error             { return nil }
func (s spans) ForceFlush(context.Context) error           { return nil }

// next returns the next span of a kind; spans of other kinds are put back.
func (s spans) next(t *testing.T, kind trace.SpanKind) sdk.ReadOnlySpan {
	t.Helper()
	expired := time.After(presencetest.Timeout)
	for {
		select {
		case span := <-s:
			if span.SpanKind() == kind {
				return span
			}
			s <- span
			time.Sleep(time.Millisecond)
		case <-expired:
			t.Fatal("timed out: no span of kind ", kind)
		}
	}
}

// setup is a tracer with its spans, a worker and a gateway.
type setup struct {
	t      *testing.T
	url    string
	spans  spans
	tracer *otelpresence.Tracer
	worker *presencetest.Worker
	conn   *presence.Conn
}

func start(t *testing.T, handler presence.Handler, opts ...presence.ConnectOption) *setup {
	t.Helper()
	s := &setup{t: t, spans: make(spans, 100)}
	s.tracer = otelpresence.New(
		otelpresence.WithTracerProvider(sdk.NewTracerProvider(sdk.WithSpanProcessor(s.spans))),
		otelpresence.WithPropagator(propagation.NewCompositeTextMapPropagator(
			propagation.TraceContext{}, propagation.Baggage{})))
	server := presencetest.StartServer(t)
	s.url = server.URL
	s.worker = presencetest.StartWorker(t, server.URL, "count", s.tracer.Handler("count", handler))
	s.conn = presencetest.Connect(t, server.URL, opts...)
	return s
}

func (s *setup) request(ctx context.Context, subject string) *presence.Stream {
	s.t.Helper()
	stream, err := s.tracer.Request(ctx, s.conn, subject, nil, "me")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { stream.Close() })
	return stream
}

// want is what a span must have.
type want struct {
	events []string // and the reason of the stop
	code   string   // rpc.response.status_code
	fails  string   // error.type
}

func (s *setup) check(span sdk.ReadOnlySpan, want want) {
	s.t.Helper()
	var events []string
	for _, e := range span.Events() {
		name := e.Name
		for _, a := range e.Attributes {
			name += ": " + a.Value.AsString()
		}
		events = append(events, name)
	}
	attributes := make(map[string]string)
	for _, a := range span.Attributes() {
		attributes[string(a.Key)] = a.Value.AsString()
	}
	all := map[string]string{"rpc.system.name": "nats_presence", "rpc.method": span.Name()}
	if want.code != "" {
		all["rpc.response.status_code"] = want.code
	}
	status := codes.Unset
	if want.fails != "" {
		all["error.type"], status = want.fails, codes.Error
	}
	if !reflect.DeepEqual(events, want.events) || !reflect.DeepEqual(attributes, all) || span.Status().Code != status {
		s.t.Errorf("%s span: events %q, attributes %q, status %+v; want %+v",
			span.SpanKind(), events, attributes, span.Status(), want)
	}
}

const accepted, first = "accepted", "first message"

// one sends one message, and waits until the stream is stopped.
func one(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	s.Send([]byte("one"))
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestSpansOfACompleteStream(t *testing.T) {
	for _, lanes := range []string{"true", "false"} {
		inner := make(chan trace.SpanContext, 1)
		s := start(t, func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			inner <- trace.SpanContextFromContext(ctx)
			s.Send([]byte("one"))
			return s.Send([]byte("two"))
		}, presence.With("lanes", lanes))
		root := trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled,
		})
		stream := s.request(trace.ContextWithSpanContext(t.Context(), root), "count")
		client := s.spans.next(t, trace.SpanKindClient) // although nothing has been read
		s.check(client, want{[]string{first}, "OK", ""})
		server := s.spans.next(t, trace.SpanKindServer)
		s.check(server, want{[]string{accepted, first}, "OK", ""})
		if client.Name() != "count" || server.Name() != "count" || client.Parent().SpanID() != root.SpanID() ||
			!server.Parent().Equal(client.SpanContext().WithRemote(true)) ||
			server.SpanContext().TraceID() != root.TraceID() || !(<-inner).Equal(server.SpanContext()) {
			t.Errorf("lanes=%s: client %+v of %+v, server %+v of %+v",
				lanes, client.SpanContext(), client.Parent(), server.SpanContext(), server.Parent())
		}
		messages := 0
		for _, err := range stream.Messages() {
			if err != nil {
				t.Fatal(err)
			}
			messages++
		}
		if messages != 2 {
			t.Error(messages, " messages")
		}
	}
}

func TestSpansSayWhyAStreamWasStopped(t *testing.T) {
	s := start(t, one)
	for status, stop := range map[presence.Status]func(*presence.Stream){
		presence.ErrOffline:   func(*presence.Stream) { presence.MarkClientOffline("me") },
		presence.ErrCancelled: func(stream *presence.Stream) { stream.Close() },
	} {
		stream := s.request(t.Context(), "count")
		if _, err := stream.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
		stop(stream)
		code := map[presence.Status]string{presence.ErrOffline: "OFFLINE", presence.ErrCancelled: "CANCELLED"}[status]
		reason := "stopped: " + status.Error()
		s.check(s.spans.next(t, trace.SpanKindClient), want{[]string{first, reason}, code, ""})
		s.check(s.spans.next(t, trace.SpanKindServer), want{[]string{accepted, first, reason}, code, ""})
	}
}

func TestSpansOfFailures(t *testing.T) {
	for name, c := range map[string]struct {
		handler        presence.Handler
		client, server want
	}{
		"error": {
			func(context.Context, *presence.Request, *presence.Sender) error {
				return errors.New("password=hunter2")
			},
			want{nil, "REMOTE", "REMOTE"}, want{[]string{accepted}, "", "*errors.errorString"},
		},
		"panic": {
			func(context.Context, *presence.Request, *presence.Sender) error { panic("password=hunter2") },
			want{nil, "REMOTE", "REMOTE"}, want{[]string{accepted}, "", "panic"},
		},
		"sent error": {
			func(_ context.Context, _ *presence.Request, s *presence.Sender) error {
				return s.SendError(errors.New("no such model"))
			},
			want{nil, "REMOTE", "REMOTE"}, want{[]string{accepted}, "OK", ""},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, c.handler)
			s.request(t.Context(), "count")
			for kind, want := range map[trace.SpanKind]want{
				trace.SpanKindClient: c.client, trace.SpanKindServer: c.server,
			} {
				s.check(s.spans.next(t, kind), want)
			}
		})
	}
	s := start(t, one)
	s.request(t.Context(), "unserved")
	s.check(s.spans.next(t, trace.SpanKindClient), want{nil, "NO_RESPONDERS", "NO_RESPONDERS"})
	if _, err := s.tracer.Request(t.Context(), s.conn, "wrong subject", nil, "me"); err == nil {
		t.Error("a wrong subject was accepted")
	}
	s.check(s.spans.next(t, trace.SpanKindClient), want{nil, "INVALID", "INVALID"})
}

func TestSpanOfADetachedStreamEndsWithTheStream(t *testing.T) {
	detached := make(chan *presence.Sender, 1)
	s := start(t, func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
		s.Detach()
		detached <- s
		return nil
	})
	s.request(t.Context(), "count")
	sender := <-detached
	sender.Send([]byte("one"))
	sender.End()
	s.check(s.spans.next(t, trace.SpanKindServer), want{[]string{accepted, first}, "OK", ""})
}

func TestRequestsOfAClientHaveSpans(t *testing.T) {
	s := start(t, one)
	client, err := presence.NewClient("me")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.tracer.ClientRequest(t.Context(), client, s.conn, "count", nil); err != nil {
		t.Fatal(err)
	}
	s.worker.WaitStarted("me")
	client.Close()
	if code := s.spans.next(t, trace.SpanKindServer).Status().Code; code != codes.Unset {
		t.Error(code)
	}
	s.spans.next(t, trace.SpanKindClient)
	_, err = s.tracer.ClientRequest(t.Context(), client, s.conn, "count", nil)
	if !errors.Is(err, presence.ErrOffline) {
		t.Error(err)
	}
	s.check(s.spans.next(t, trace.SpanKindClient), want{nil, "OFFLINE", ""})
}

func TestSubjectWithWildcardsIsTheMethod(t *testing.T) {
	s := start(t, one)
	presencetest.StartWorker(t, s.url, "chat.*", s.tracer.Handler("chat.*", func(
		context.Context, *presence.Request, *presence.Sender) error {
		return nil
	}))
	s.request(t.Context(), "chat.7")
	span := s.spans.next(t, trace.SpanKindServer)
	original := attribute.String("rpc.method_original", "chat.7")
	if span.Name() != "chat.*" || !slices.Contains(span.Attributes(), original) {
		t.Error(span.Name(), span.Attributes())
	}
}

// A program in another language may write the header's name with capitals.
func TestHeaderNamesAreComparedWithoutCase(t *testing.T) {
	s := start(t, one)
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	stream, err := s.conn.Request(t.Context(), "count", nil, "me", presence.Header("Traceparent", parent))
	if err != nil {
		t.Fatal(err)
	}
	s.worker.WaitStarted("me")
	stream.Close()
	if id := s.spans.next(t, trace.SpanKindServer).Parent().SpanID().String(); id != "b7ad6b7169203331" {
		t.Error(id)
	}
}
