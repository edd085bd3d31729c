package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
	"github.com/nats-presence/nats-presence/bindings/go/presencetest"
)

// start starts a worker that runs a script of the shell, and requests a stream.
func start(t *testing.T, script, input string) (*presencetest.Worker, *presence.Stream) {
	t.Helper()
	nats := presencetest.StartServer(t)
	worker := presencetest.StartWorker(t, nats.URL, "lines", program{"sh", "-c", script}.handle)
	stream, err := presencetest.Connect(t, nats.URL).Request(t.Context(), "lines", []byte(input), "me")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stream.Close() })
	return worker, stream
}

func next(t *testing.T, stream *presence.Stream) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), presencetest.Timeout)
	defer cancel()
	message, err := stream.Next(ctx)
	return string(message), err
}

func TestLinesAreMessages(t *testing.T) {
	_, stream := start(t, "cat; printf end", "a\nb\r\n\n")
	for _, want := range []string{"a\n", "b\r\n", "\n", "end"} {
		if line, err := next(t, stream); err != nil || line != want {
			t.Fatalf("got %q and error %v, want %q", line, err, want)
		}
	}
	if line, err := next(t, stream); err == nil || err.Error() != "EOF" {
		t.Error(line, err)
	}
}

func TestLongLineIsSeveralMessages(t *testing.T) {
	text := bytes.Repeat([]byte("x"), 500_000)
	_, stream := start(t, "cat", string(text))
	size := 0
	for message, err := range stream.Messages() {
		if err != nil {
			t.Fatal(err)
		}
		size += len(message)
	}
	if size != len(text) {
		t.Error(size)
	}
}

func TestLeavingKillsTheProgramAndItsChildren(t *testing.T) {
	worker, stream := start(t, "sleep 1000 & echo $! $$; trap '' TERM INT; wait", "")
	line, err := next(t, stream)
	if err != nil {
		t.Fatal(err)
	}
	presence.MarkClientOffline("me")
	if why := worker.WaitStopped("me"); !errors.Is(why, presence.ErrOffline) {
		t.Error(why)
	}
	for _, field := range strings.Fields(line) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(presencetest.Timeout); runs(pid); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("process %d still runs", pid)
			}
		}
	}
}

// runs reports whether a process runs: it exists, and is no zombie that waits for its parent.
func runs(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func TestFailureOfTheProgramIsAnError(t *testing.T) {
	_, stream := start(t, "echo one; exit 3", "")
	if line, err := next(t, stream); err != nil || line != "one\n" {
		t.Error(line, err)
	}
	_, err := next(t, stream)
	if !errors.Is(err, presence.ErrRemote) || !strings.HasSuffix(err.Error(), "the program failed: exit status 3") {
		t.Error(err)
	}
}
