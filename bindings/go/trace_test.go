package presence

import (
	"context"
	"reflect"
	"testing"
)

// The headers of W3C traces pass from the request to the handler as they are, with lanes and without.
func TestTraceHeadersPassUntouched(t *testing.T) {
	s := startServer(t)
	want := map[string][]string{
		"traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
		"tracestate":  {"congo=t61rcWkgMzE,rojo=00f067aa0ba902b7;x=1"},
		"baggage":     {"user=a%20b; p=1 , k=é"},
		"Traceparent": {"another header"},
		"Connect-ID":  {"me"},
	}
	for _, lanes := range []string{"true", "false"} {
		headers := make(chan map[string][]string, 1)
		serve(t, connect(t, s, With("lanes", lanes)), "headers."+lanes,
			func(ctx context.Context, req *Request, s *Sender) error {
				headers <- req.Headers()
				return nil
			})
		var opts []RequestOption
		for name, values := range want {
			if name != "Connect-ID" {
				opts = append(opts, Header(name, values[0]))
			}
		}
		request(t, connect(t, s, With("lanes", lanes)), "headers."+lanes, "me", opts...)
		if got := receive(t, headers); !reflect.DeepEqual(got, want) {
			t.Errorf("lanes=%s: the handler got %q, want %q", lanes, got, want)
		}
	}
}

func TestTraceReportsFirstMessageAndEnd(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	sent, seen := make(chan string, 10), make(chan struct{})
	serve(t, worker, "traced", func(ctx context.Context, req *Request, s *Sender) error {
		s.OnFirstMessage(func() { sent <- "first" })
		if req.ClientID == "silent" {
			return nil
		}
		for range 3 {
			if err := s.Send([]byte("x")); err != nil {
				return err // the client has left
			}
			sent <- "message"
			receive(t, seen) // so that the next one does not arrive together with this one
		}
		if req.ClientID == "leaver" {
			<-ctx.Done()
		}
		return nil
	})
	traced := func(subject, id string) (*Stream, chan struct{}, chan error) {
		first, ended := make(chan struct{}, 10), make(chan error, 10)
		trace := StreamTrace{
			FirstMessage: func() { first <- struct{}{} },
			Ended:        func(err error) { ended <- err },
		}
		return request(t, gateway, subject, id, Trace(trace)), first, ended
	}
	stream, first, ended := traced("traced", "reader")
	receive(t, first)
	close(seen)
	must(t, receive(t, ended)) // although nothing has been read
	for _, want := range []string{"first", "message", "message", "message"} {
		if got := receive(t, sent); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if messages, err := read(t, stream); len(messages) != 3 || err != nil {
		t.Error(messages, err)
	}
	stream.Close()
	if len(first)+len(ended) > 0 {
		t.Error("the first message or the end was reported twice")
	}

	_, first, ended = traced("traced", "silent")
	must(t, receive(t, ended))
	_, _, unserved := traced("unserved", "reader")
	wantError(t, receive(t, unserved), ErrNoResponders, "unserved")
	if len(first) > 0 {
		t.Error("a first message of none was reported")
	}
	_, first, ended = traced("traced", "leaver")
	receive(t, first)
	MarkClientOffline("leaver")
	wantError(t, receive(t, ended), ErrOffline, "")

	failed := Trace(StreamTrace{Ended: func(err error) { t.Error("the end of a failed request was reported: ", err) }})
	_, err := gateway.Request(t.Context(), "wrong subject", nil, "", failed)
	wantError(t, err, ErrInvalid, "subject")
}

// A reader that has the first message and closes its stream at once does not overtake the report of that message.
func TestTraceReportsTheEndAfterTheFirstMessage(t *testing.T) {
	s := startServer(t)
	serve(t, connect(t, s), "traced", func(ctx context.Context, req *Request, s *Sender) error {
		s.Send([]byte("x"))
		<-ctx.Done()
		return nil
	})
	order, read := make(chan string, 2), make(chan struct{})
	stream := request(t, connect(t, s), "traced", "me", Trace(StreamTrace{
		FirstMessage: func() {
			<-read
			order <- "first message"
		},
		Ended: func(error) { order <- "ended" },
	}))
	if _, err := stream.Next(t.Context()); err != nil {
		t.Fatal(err)
	}
	stream.Close()
	close(read)
	for _, want := range []string{"first message", "ended"} {
		if got := receive(t, order); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
