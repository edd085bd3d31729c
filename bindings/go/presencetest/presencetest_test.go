package presencetest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/presencetest"
)

func untilStopped(ctx context.Context, req *presence.Request, s *presence.Sender) error {
	<-ctx.Done()
	return nil
}

func TestWorkerReportsWhatHappensToStreams(t *testing.T) {
	server := presencetest.StartServer(t)
	finish := make(chan struct{})
	worker := presencetest.StartWorker(t, server.URL, "count",
		func(ctx context.Context, req *presence.Request, s *presence.Sender) error {
			select {
			case <-finish:
			case <-ctx.Done():
			}
			return nil
		})
	conn := presencetest.Connect(t, server.URL)
	for _, id := range []string{"leaves", "cancels", "finishes"} {
		stream, err := conn.Request(t.Context(), "count", nil, id)
		if err != nil {
			t.Fatal(err)
		}
		if started := worker.WaitStarted(""); started != id {
			t.Error("started: ", started)
		}
		switch id {
		case "leaves":
			presence.MarkClientOffline(id)
			if why := worker.WaitStopped(id); !errors.Is(why, presence.ErrOffline) {
				t.Error(why)
			}
		case "cancels":
			stream.Close()
			if why := worker.WaitStopped(""); !errors.Is(why, presence.ErrCancelled) {
				t.Error(why)
			}
		case "finishes":
			finish <- struct{}{}
			if ended := worker.WaitEnded(""); ended != id {
				t.Error("ended: ", ended)
			}
		}
	}
	worker.WaitIdle()
}

func TestServerIsKilledOnce(t *testing.T) {
	server := presencetest.StartServer(t)
	worker := presencetest.StartWorker(t, server.URL, "count", untilStopped)
	server.Kill()
	server.Kill()
	if _, err := presence.Connect(server.URL); !errors.Is(err, presence.ErrDisconnected) {
		t.Error("a killed server accepts a connection: ", err)
	}
	if n := worker.Running(); n != 0 {
		t.Error(n, " streams run")
	}
}

// fatal records a failure instead of failing the test.
type fatal struct {
	testing.TB
	failed chan string
}

func (f *fatal) Fatal(args ...any) {
	f.failed <- args[0].(string)
	panic(f)
}

func TestMissingServerSaysWhatToDo(t *testing.T) {
	t.Setenv("NATS_SERVER_BIN", os.DevNull)
	f := &fatal{t, make(chan string, 1)}
	defer func() {
		recover()
		if text := <-f.failed; text != "nats-server cannot be started; install it, or set NATS_SERVER_BIN to its path: " {
			t.Error(text)
		}
	}()
	presencetest.StartServer(f)
	t.Error("a server was started")
}

func (f *fatal) Fatalf(format string, args ...any) {
	f.failed <- fmt.Sprintf(format, args...)
	panic(f)
}

func TestWaitThatTimesOutSaysWhatHappenedInstead(t *testing.T) {
	server := presencetest.StartServer(t)
	f := &fatal{t, make(chan string, 1)}
	worker := presencetest.StartWorker(f, server.URL, "count",
		func(context.Context, *presence.Request, *presence.Sender) error { return nil })
	stream, err := presencetest.Connect(t, server.URL).Request(t.Context(), "count", nil, "me")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Next(t.Context()); err != io.EOF {
		t.Fatal(err)
	}
	worker.WaitIdle()
	defer func(timeout time.Duration) { presencetest.Timeout = timeout }(presencetest.Timeout)
	presencetest.Timeout = time.Millisecond
	defer func() {
		recover()
		want := `timed out after 1ms; this did not become true: a stream of client "me" on "count" was stopped ` +
			`(0 streams run; not waited for: [{me <nil>}] started, [{me <nil>}] ended)`
		if text := <-f.failed; text != want {
			t.Error(text)
		}
	}()
	worker.WaitStopped("me")
	t.Error("the stream was stopped")
}
