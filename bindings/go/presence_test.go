package presence

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

// watch returns the events of a watch that ends with the test.
func watch(t *testing.T) <-chan Event {
	t.Helper()
	events, err := Watch(t.Context())
	must(t, err)
	return events
}

// expectEvents checks that the next events of one client are of these kinds.
func expectEvents(t *testing.T, events <-chan Event, id string, kinds ...EventKind) {
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

func checkOnline(t *testing.T, id string, want bool) {
	t.Helper()
	if IsClientOnline(id) != want {
		t.Fatalf("IsClientOnline(%q) is %v", id, !want)
	}
}

func TestMarkingTwiceIsMarkingOnce(t *testing.T) {
	const id = "marks-客户"
	before := OnlineCount()
	checkOnline(t, id, false)
	must(t, MarkClientOnline(id))
	must(t, MarkClientOnline(id))
	checkOnline(t, id, true)
	if OnlineCount() != before+1 {
		t.Fatalf("count %d, want %d", OnlineCount(), before+1)
	}
	must(t, MarkClientOffline(id))
	must(t, MarkClientOffline(id))
	checkOnline(t, id, false)
	if OnlineCount() != before {
		t.Fatalf("count %d, want %d", OnlineCount(), before)
	}
}

func TestEmptyIDIsAlwaysOnlineAndNotCounted(t *testing.T) {
	before := OnlineCount()
	must(t, MarkClientOnline(""))
	checkOnline(t, "", true)
	must(t, MarkClientOffline(""))
	checkOnline(t, "", true)
	s, err := OpenSession("")
	must(t, err)
	must(t, s.Close())
	if OnlineCount() != before {
		t.Fatalf("count %d, want %d", OnlineCount(), before)
	}
}

// invalidIDs are refused by all calls.
var invalidIDs = map[string]string{
	"too long":  strings.Repeat("x", 1025),
	"not UTF-8": "a\xffb",
	"control":   "a\nb",
	"C1":        "a\u0085b",
	"NUL":       "a\x00b",
}

func TestManyClientsAreMarkedInOneCall(t *testing.T) {
	before := OnlineCount()
	ids := []string{"", "many-Ünï", strings.Repeat("x", 1024), "many-Ünï"}
	for i := range 1000 {
		ids = append(ids, fmt.Sprintf("many-%d", i))
	}
	must(t, MarkClientsOnline(ids))
	must(t, MarkClientsOnline(nil))
	if OnlineCount() != before+1002 {
		t.Fatalf("count %d, want %d", OnlineCount(), before+1002)
	}
	for _, mark := range []func([]string) error{MarkClientsOnline, MarkClientsOffline} {
		wantError(t, mark([]string{"many-new", "many-1", "many\n", "many-2"}), ErrInvalid, "id 2: ")
		checkOnline(t, "many-new", false)
		checkOnline(t, "many-1", true)
	}
	must(t, MarkClientsOffline(ids[1:]))
	for _, id := range ids[1:] {
		checkOnline(t, id, false)
	}
	if OnlineCount() != before {
		t.Fatalf("count %d, want %d", OnlineCount(), before)
	}
}

func TestInvalidIDsAreRefused(t *testing.T) {
	before := OnlineCount()
	for name, id := range invalidIDs {
		t.Run(name, func(t *testing.T) {
			session, err := OpenSession(id)
			if session != nil {
				t.Error("an invalid id has a session")
			}
			for _, err := range []error{MarkClientOnline(id), MarkClientOffline(id), err} {
				wantError(t, err, ErrInvalid, "client id")
			}
			checkOnline(t, id, false)
		})
	}
	if OnlineCount() != before {
		t.Fatalf("count %d, want %d", OnlineCount(), before)
	}
	longest := strings.Repeat("x", 1024)
	must(t, MarkClientOnline(longest))
	checkOnline(t, longest, true)
	must(t, MarkClientOffline(longest))
}

// wantError checks the status of an error, and that its message contains named.
func wantError(t *testing.T, err error, status Status, named string) {
	t.Helper()
	if !errors.Is(err, status) {
		t.Fatalf("error %v, want %v", err, status)
	}
	if !strings.Contains(err.Error(), named) {
		t.Fatalf("error %q does not contain %q", err, named)
	}
	var own *Error
	if !errors.As(err, &own) || own.Status != status {
		t.Fatalf("error %#v contains no *Error with %v", err, status)
	}
}

func TestEachStatusHasATextAndMatchesOnlyItself(t *testing.T) {
	for status := ErrInternal; status <= ErrInvalid; status++ {
		err := error(&Error{Status: status})
		if text := status.Error(); text == "" || !strings.Contains(err.Error(), text) {
			t.Errorf("status %d: %q, error %q", status, text, err)
		}
		for other := ErrInternal; other <= ErrInvalid; other++ {
			if errors.Is(err, other) != (status == other) {
				t.Errorf("errors.Is(%v, %v) returns the wrong result", status, other)
			}
		}
	}
	if Version() == "" {
		t.Error("Version returns an empty string")
	}
}

func TestClientIsOnlineUntilItsLastSessionCloses(t *testing.T) {
	const id = "sessions"
	first, err := OpenSession(id)
	must(t, err)
	second, err := OpenSession(id)
	must(t, err)
	must(t, first.Close())
	must(t, first.Close())
	checkOnline(t, id, true) // closing the first session twice did not close the second
	must(t, second.Close())
	checkOnline(t, id, false)

	third, err := OpenSession(id)
	must(t, err)
	must(t, MarkClientOffline(id))
	checkOnline(t, id, false)
	must(t, MarkClientOnline(id))
	must(t, third.Close())
	checkOnline(t, id, true) // the old session does not belong to the new mark
	must(t, MarkClientOffline(id))
}

func TestUnreachableSessionIsNotClosed(t *testing.T) {
	const id = "unreachable"
	_, err := OpenSession(id)
	must(t, err)
	for range 3 {
		collected := make(chan bool, 1)
		runtime.AddCleanup(new([64]byte), func(c chan bool) { c <- true }, collected)
		eventually(t, "the garbage collector has run", func() bool {
			runtime.GC()
			return len(collected) > 0
		})
	}
	checkOnline(t, id, true)
	must(t, MarkClientOffline(id))
	checkOnline(t, id, false)
}

func TestNewSessionWithinTheGraceKeepsTheClientOnline(t *testing.T) {
	s := startServer(t)
	connect(t, s, With("session_grace_ms", "100"))
	t.Cleanup(func() { connect(t, s, With("session_grace_ms", "0")) })
	events := watch(t)
	const stays, leaves = "grace-stays", "grace-leaves"
	for _, id := range []string{stays, leaves} {
		session, err := OpenSession(id)
		must(t, err)
		must(t, session.Close())
		checkOnline(t, id, true)
	}
	again, err := OpenSession(stays)
	must(t, err)
	expectEvents(t, events, leaves, ClientOnline, ClientOffline)
	checkOnline(t, stays, true) // its grace began before the other client's
	must(t, again.Close())
	expectEvents(t, events, stays, ClientOffline)
}

func TestWatchReportsEachChangeOnce(t *testing.T) {
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
	expectEvents(t, events, id, ClientOnline, ClientOffline, ClientOnline, ClientOffline, ClientOnline, ClientOffline)
	must(t, MarkClientOnline(id)) // its event is unread while the watch ends
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

// Stacks move and memory is collected while events arrive that have empty fields.
func TestWatchDuringGarbageCollection(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(1))
	junk := make([][]byte, 100)
	id := "moves-" + strings.Repeat("x", 50)
	for n, end := 0, time.Now().Add(time.Second); time.Now().Before(end); {
		ctx, stop := context.WithCancel(t.Context())
		events, err := Watch(ctx)
		must(t, err)
		for range 50 {
			must(t, MarkClientOnline(id))
			must(t, MarkClientOffline(id))
			expectEvents(t, events, id, ClientOnline, ClientOffline)
			n++
			junk[n%len(junk)] = make([]byte, 4096)
		}
		stop()
	}
}
