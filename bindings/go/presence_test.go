package presence

import (
	"context"
	"errors"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

// watch watches until the test ends.
func watch(t *testing.T) <-chan Event {
	t.Helper()
	events, err := Watch(t.Context())
	must(t, err)
	return events
}

// expect reads the events of one client until they are as wanted.
func expect(t *testing.T, events <-chan Event, id string, kinds ...EventKind) {
	t.Helper()
	for _, want := range kinds {
		event := receive(t, events)
		for event.ClientID != id {
			event = receive(t, events)
		}
		if event.Kind != want {
			t.Fatalf("%s: %v, want %v", id, event.Kind, want)
		}
	}
}

func online(t *testing.T, id string, want bool) {
	t.Helper()
	if IsClientOnline(id) != want {
		t.Fatalf("IsClientOnline(%q) is %v", id, !want)
	}
}

func TestMarks(t *testing.T) {
	const id = "marks-客户"
	before := OnlineCount()
	online(t, id, false)
	must(t, MarkClientOnline(id))
	must(t, MarkClientOnline(id))
	online(t, id, true)
	if OnlineCount() != before+1 {
		t.Fatalf("count %d, want %d", OnlineCount(), before+1)
	}
	must(t, MarkClientOffline(id))
	must(t, MarkClientOffline(id))
	online(t, id, false)
	if OnlineCount() != before {
		t.Fatalf("count %d, want %d", OnlineCount(), before)
	}
}

func TestEmptyIDIsNobody(t *testing.T) {
	before := OnlineCount()
	must(t, MarkClientOnline(""))
	online(t, "", true)
	must(t, MarkClientOffline(""))
	online(t, "", true)
	s, err := OpenSession("")
	must(t, err)
	must(t, s.Close())
	if OnlineCount() != before {
		t.Fatalf("count %d, want %d", OnlineCount(), before)
	}
}

// badIDs are those that no call takes.
var badIDs = map[string]string{
	"too long":  strings.Repeat("x", 1025),
	"not UTF-8": "a\xffb",
	"control":   "a\nb",
	"C1":        "a\u0085b",
	"NUL":       "a\x00b",
}

func TestBadIDs(t *testing.T) {
	before := OnlineCount()
	for name, id := range badIDs {
		t.Run(name, func(t *testing.T) {
			session, err := OpenSession(id)
			if session != nil {
				t.Error("a session for a bad id")
			}
			for _, err := range []error{MarkClientOnline(id), MarkClientOffline(id), err} {
				wantError(t, err, ErrInvalid, "client id")
			}
			online(t, id, false)
		})
	}
	if OnlineCount() != before {
		t.Fatalf("count %d, want %d", OnlineCount(), before)
	}
	longest := strings.Repeat("x", 1024)
	must(t, MarkClientOnline(longest))
	online(t, longest, true)
	must(t, MarkClientOffline(longest))
}

// wantError checks an error's status and that its message names what was wrong.
func wantError(t *testing.T, err error, status Status, named string) {
	t.Helper()
	if !errors.Is(err, status) {
		t.Fatalf("error %v, want %v", err, status)
	}
	if !strings.Contains(err.Error(), named) {
		t.Fatalf("error %q does not name %q", err, named)
	}
	var own *Error
	if !errors.As(err, &own) || own.Status != status {
		t.Fatalf("error %#v holds no *Error with %v", err, status)
	}
}

func TestErrors(t *testing.T) {
	for status := ErrInternal; status <= ErrInvalid; status++ {
		err := error(&Error{Status: status})
		if text := status.Error(); text == "" || !strings.Contains(err.Error(), text) {
			t.Errorf("status %d: %q, error %q", status, text, err)
		}
		for other := ErrInternal; other <= ErrInvalid; other++ {
			if errors.Is(err, other) != (status == other) {
				t.Errorf("errors.Is(%v, %v) is wrong", status, other)
			}
		}
	}
	if Version() == "" {
		t.Error("no version")
	}
}

func TestSessions(t *testing.T) {
	const id = "sessions"
	first, err := OpenSession(id)
	must(t, err)
	second, err := OpenSession(id)
	must(t, err)
	must(t, first.Close())
	must(t, first.Close())
	online(t, id, true) // the second Close of the first was not one of the second
	must(t, second.Close())
	online(t, id, false)

	third, err := OpenSession(id)
	must(t, err)
	must(t, MarkClientOffline(id))
	online(t, id, false)
	must(t, MarkClientOnline(id))
	must(t, third.Close())
	online(t, id, true) // a new life, to which the old session does not belong
	must(t, MarkClientOffline(id))
}

// No finalizer ends a client's streams.
func TestForgottenSessionStays(t *testing.T) {
	const id = "forgotten"
	_, err := OpenSession(id)
	must(t, err)
	for range 3 {
		collected := make(chan bool, 1)
		runtime.AddCleanup(new([64]byte), func(c chan bool) { c <- true }, collected)
		eventually(t, "what is forgotten is collected", func() bool {
			runtime.GC()
			return len(collected) > 0
		})
	}
	online(t, id, true)
	must(t, MarkClientOffline(id))
	online(t, id, false)
}

func TestSessionGrace(t *testing.T) {
	s := startServer(t)
	connect(t, s, With("session_grace_ms", "100"))
	t.Cleanup(func() { connect(t, s, With("session_grace_ms", "0")) })
	events := watch(t)
	const stays, leaves = "grace-stays", "grace-leaves"
	for _, id := range []string{stays, leaves} {
		session, err := OpenSession(id)
		must(t, err)
		must(t, session.Close())
		online(t, id, true)
	}
	again, err := OpenSession(stays)
	must(t, err)
	expect(t, events, leaves, ClientOnline, ClientOffline)
	online(t, stays, true) // its grace began earlier, and would be over too
	must(t, again.Close())
	expect(t, events, stays, ClientOffline)
}

func TestWatch(t *testing.T) {
	ctx, stop := context.WithCancel(context.Background())
	events, err := Watch(ctx)
	must(t, err)
	const id = "watched"
	for range 3 {
		must(t, MarkClientOnline(id))
		must(t, MarkClientOnline(id))
		must(t, MarkClientOffline(id))
		must(t, MarkClientOffline(id))
	}
	expect(t, events, id, ClientOnline, ClientOffline, ClientOnline, ClientOffline, ClientOnline, ClientOffline)
	must(t, MarkClientOnline(id)) // waits unread while the watch ends
	stop()
	eventually(t, "the channel is closed", func() bool {
		select {
		case _, open := <-events:
			return !open
		default:
			return false
		}
	})
	must(t, MarkClientOffline(id))
}

// Stacks move and memory is collected while events come whose fields are partly empty.
func TestWatchWhileMemoryMoves(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(1))
	junk := make([][]byte, 100)
	id := "moves-" + strings.Repeat("x", 50)
	for n, end := 0, time.Now().Add(2*time.Second); time.Now().Before(end); {
		ctx, stop := context.WithCancel(t.Context())
		events, err := Watch(ctx)
		must(t, err)
		for range 50 {
			must(t, MarkClientOnline(id))
			must(t, MarkClientOffline(id))
			expect(t, events, id, ClientOnline, ClientOffline)
			n++
			junk[n%len(junk)] = make([]byte, 4096)
		}
		stop()
	}
}
