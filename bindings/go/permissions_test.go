package presence

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// Serve fails at once if nats-server refuses the subscription. If a permission is revoked later, an event reports it
// with the service's subject, and the service goes on when the permission is back.
func TestRefusedSubscriptionIsReported(t *testing.T) {
	file := filepath.Join(t.TempDir(), "server.conf")
	allow := func(subjects string) {
		must(t, os.WriteFile(file, fmt.Appendf(nil, `authorization { users: [
			{ user: u, password: p, permissions: { publish: ">", subscribe: [%s] } }] }`, subjects), 0o600))
	}
	const always = `"_INBOX.>", "client.offline"`
	allow(always + `, "work"`)
	s := startServer(t, "-c", file)
	options := []ConnectOption{With("user", "u"), With("password", "p"), With("reconnect_max_ms", "100")}
	c := connect(t, s, options...)
	done := func(ctx context.Context, req *Request, s *Sender) error { return s.Send([]byte("done")) }
	wantError(t, c.Serve(context.Background(), "other", "", done), ErrDisconnected, "Permissions Violation")
	serve(t, c, "work", done)
	for _, change := range []struct {
		subjects string
		kind     EventKind
	}{{always, Disconnected}, {always + `, "work"`, Connected}} {
		allow(change.subjects)
		must(t, s.command.Process.Signal(syscall.SIGHUP))
		c.events.waitForSubject(t, change.kind, "work")
	}
	if got, err := read(t, request(t, c, "work", "ann", With("retries", "100"))); len(got) != 1 || err != nil {
		t.Error(got, err)
	}
}

// waitForSubject waits for an event of a kind about a service's subject.
func (e *events) waitForSubject(t testing.TB, kind EventKind, subject string) {
	t.Helper()
	for {
		e.mu.Lock()
		found := slices.ContainsFunc(e.all, func(event Event) bool { return event.Kind == kind && event.Subject == subject })
		e.mu.Unlock()
		if found {
			return
		}
		receive(t, e.changed)
	}
}
