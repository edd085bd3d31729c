package presence

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// numberedMessage returns a message of size bytes that contains its number i.
func numberedMessage(i, size int) []byte {
	return binary.LittleEndian.AppendUint64(make([]byte, size-8), uint64(i))
}

func number(message []byte) int { return int(binary.LittleEndian.Uint64(message[len(message)-8:])) }

// unreadBytes returns how many bytes wait for a stream's reader.
func (s *Stream) unreadBytes() (bytes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, run := range append(s.runs, s.run) {
		bytes += len(run)
	}
	return bytes
}

// A reader that does not read blocks its own worker when the window is full, and no other worker.
func TestSlowReaderBlocksOnlyItsWorker(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	const window, size, total = 100_000, 100, 20_000
	filled, check, blocked, sentOne := make(chan int), make(chan bool), make(chan error), make(chan bool)
	serve(t, worker, "slow", func(ctx context.Context, req *Request, s *Sender) error {
		i := 0
		if req.ClientID == "slow" {
			for {
				err := s.TrySend(numberedMessage(i, size))
				if errors.Is(err, ErrFull) {
					break
				}
				must(t, err)
				i++
			}
			filled <- i
			receive(t, check)
			blocked <- s.TrySend(numberedMessage(i, size))
			must(t, s.Send(numberedMessage(i, size)))
			close(sentOne)
			i++
		}
		for ; i < total; i++ {
			if err := s.Send(numberedMessage(i, size)); err != nil {
				return err
			}
		}
		return nil
	})
	slow := request(t, gateway, "slow", "slow", With("stream_buffer_bytes", strconv.Itoa(window)))
	sent := receive(t, filled)
	if most := window / (size + messageOverhead); sent > most || sent < most/2 {
		t.Errorf("%d messages were sent before the first was read; the window holds %d", sent, most)
	}
	readNumbers := func(stream *Stream, from, to int) {
		for i := from; i < to; i++ {
			message, err := stream.Next(t.Context())
			must(t, err)
			if len(message) != size || number(message) != i {
				t.Fatalf("got message %d, want %d", number(message), i)
			}
		}
	}
	quick := request(t, gateway, "slow", "quick", With("stream_buffer_bytes", strconv.Itoa(window)))
	readNumbers(quick, 0, total)
	// All messages have left the C library's queue by now.
	eventually(t, "all messages have arrived", func() bool { return slow.unreadBytes() == sent*(prefix+size) })
	check <- true
	if err := receive(t, blocked); !errors.Is(err, ErrFull) {
		t.Error("a message was sent although the window is full: ", err)
	}
	readNumbers(slow, 0, sent*7/8) // without a further message
	receive(t, sentOne)
	readNumbers(slow, sent*7/8, total)
	got, err := read(t, slow)
	must(t, err)
	if len(got) != 0 || gateway.Stats().Lanes != 1 || worker.Stats().Lanes != 1 {
		t.Error(len(got), gateway.Stats(), worker.Stats())
	}
}

// Any number of messages passes through any window, also messages without bytes.
func TestCreditIsReturnedForAllMessageSizes(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	sizes := func(i int) int { return []int{0, 0, 0, 1, 16, 300, 5000}[i%7] }
	const total = 1400
	serve(t, worker, "sizes", func(ctx context.Context, req *Request, s *Sender) error {
		for i := range total {
			size := 0
			if req.ClientID != "empty" {
				size = sizes(i)
			}
			if err := s.Send(make([]byte, size)); err != nil {
				return err
			}
		}
		return nil
	})
	for _, id := range []string{"empty", "mixed"} {
		for _, window := range []string{"1", "100", "1000", "20000"} {
			t.Run(id+window, func(t *testing.T) {
				got, err := read(t, request(t, gateway, "sizes", id, With("stream_buffer_bytes", window)))
				must(t, err)
				for i, message := range got {
					if id == "mixed" && len(message) != sizes(i) || id == "empty" && message != "" {
						t.Fatal(i, len(message))
					}
				}
				if len(got) != total {
					t.Error(len(got))
				}
			})
		}
	}
}

// The reader may change and keep messages that arrived together.
func TestReaderOwnsItsMessages(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	const total = 3000
	serve(t, worker, "own", func(ctx context.Context, req *Request, s *Sender) error {
		message := make([]byte, 16)
		for i := range total {
			binary.LittleEndian.PutUint64(message[8:], uint64(i))
			if err := s.Send(message); err != nil {
				return err
			}
		}
		return nil
	})
	var kept [][]byte
	for message, err := range request(t, gateway, "own", "owner").Messages() {
		must(t, err)
		kept = append(kept, append(message, 0xff, 0xff, 0xff, 0xff, 0xff))
		clear(message[:8])
	}
	if len(kept) != total {
		t.Fatal(len(kept))
	}
	for i, message := range kept {
		if number(message[:16]) != i {
			t.Fatal(i, message)
		}
	}
}

// Cancelling one stream stops only that stream's sender. Nothing is announced.
func TestCancelOnLaneStopsOnlyThatStream(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	offline := rawClient(t, s).subscribe("client.offline")
	type end struct{ cause, send error }
	ends := make(chan end, 1)
	goOn := make(chan struct{})
	serve(t, worker, "cancel", func(ctx context.Context, req *Request, s *Sender) error {
		must(t, s.Send([]byte("first")))
		if string(req.Data) == "stays" {
			receive(t, goOn)
			return s.Send([]byte("last"))
		}
		cause := waitForEnd(t, ctx)
		ends <- end{cause, s.Send([]byte("late"))}
		return s.Err()
	})
	request := func(ctx context.Context, data string, opts ...RequestOption) *Stream {
		stream, err := gateway.Request(ctx, "cancel", []byte(data), "client", opts...)
		must(t, err)
		message, err := stream.Next(t.Context())
		must(t, err)
		if string(message) != "first" {
			t.Errorf("%q", message)
		}
		return stream
	}
	stays := request(t.Context(), "stays")
	cause := errors.New("the browser is gone")
	for name, cancel := range map[string]func(*Stream, context.CancelCauseFunc){
		"context": func(_ *Stream, stop context.CancelCauseFunc) { stop(cause) },
		"Close":   func(stream *Stream, _ context.CancelCauseFunc) { stream.Close() },
		"timeout": func(*Stream, context.CancelCauseFunc) {},
	} {
		ctx, stop := context.WithCancelCause(t.Context())
		var opts []RequestOption
		want := ErrCancelled
		if name == "timeout" {
			opts, want = []RequestOption{With("timeout_ms", "300")}, ErrTimeout
		}
		stream := request(ctx, "goes", opts...)
		cancel(stream, stop)
		e := receive(t, ends)
		wantError(t, e.cause, ErrCancelled, `"client"`)
		wantError(t, e.send, ErrCancelled, `"client"`)
		_, err := read(t, stream)
		wantError(t, err, want, "")
		if errors.Is(err, cause) != (name == "context") {
			t.Errorf("%s: %v", name, err)
		}
		stop(nil)
	}
	checkOnline(t, "client", true)
	close(goOn)
	got, err := read(t, stays)
	if err != nil || fmt.Sprint(got) != "[last]" {
		t.Error(got, err)
	}
	eventually(t, "the client is offline", func() bool { return !IsClientOnline("client") })
	if len(offline) > 0 || gateway.Stats().OfflineOut != 0 {
		t.Errorf("announced: %q", (<-offline).data)
	}

	// Marking the client offline stops the stream with another status.
	stream := request(t.Context(), "goes")
	must(t, MarkClientOffline("client"))
	wantError(t, receive(t, ends).cause, ErrOffline, `"client"`)
	_, err = read(t, stream)
	wantError(t, err, ErrOffline, "")
}

// Goroutines whose sends are blocked use no threads, return when their context ends, and all wake up when they can
// send.
func TestBlockedSendsUseNoThreads(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	const streams, waiters, size = 50, 8, 1000
	senders := make(chan *Sender, streams)
	serve(t, worker, "wait", func(ctx context.Context, req *Request, s *Sender) error {
		s.Detach()
		senders <- s
		return nil
	})
	ctx, stop := context.WithCancelCause(t.Context())
	stopped := errors.New("enough")
	var unlimited, limited sync.WaitGroup
	var refused atomic.Int32
	var reading [streams]*Stream
	var sending [streams]*Sender
	var sent [streams]int
	for i := range streams {
		reading[i] = request(t, gateway, "wait", "waiter", With("stream_buffer_bytes", "50000"))
		sender := receive(t, senders)
		sending[i] = sender
		sent[i] = fillBuffer(t, sender, make([]byte, size)) + waiters
		for range waiters {
			unlimited.Add(1)
			limited.Add(1)
			go func() {
				defer unlimited.Done()
				if err := sender.SendContext(t.Context(), make([]byte, size)); err != nil {
					t.Error(err)
				}
			}()
			go func() {
				defer limited.Done()
				if err := sender.SendContext(ctx, make([]byte, size)); err == stopped {
					refused.Add(1)
				} else {
					t.Error(err)
				}
			}()
		}
	}
	stop(stopped)
	limited.Wait()
	if threads, _ := filepath.Glob("/proc/self/task/*"); len(threads) > 60 {
		t.Errorf("%d threads for %d goroutines whose sends are blocked", len(threads), streams*waiters)
	}
	if refused.Load() != streams*waiters {
		t.Error(refused.Load())
	}
	if err := sending[0].SendContext(ctx, nil); err != stopped {
		t.Error(err)
	}
	var all sync.WaitGroup
	for i, stream := range reading {
		all.Add(1)
		go func() {
			defer all.Done()
			if got, err := read(t, stream); err != nil || len(got) != sent[i] {
				t.Error(len(got), sent[i], err)
			}
		}()
	}
	unlimited.Wait()
	for i, sender := range sending {
		if sender.SendCount() != uint64(sent[i]) {
			t.Error(sender.SendCount(), sent[i])
		}
		must(t, sender.End())
	}
	all.Wait()

	// The end of a stream wakes the goroutines whose sends are blocked.
	stream := request(t, gateway, "wait", "waiter", With("stream_buffer_bytes", "50000"))
	sender := receive(t, senders)
	fillBuffer(t, sender, make([]byte, size))
	_, err := stream.Next(t.Context()) // now the gateway knows the stream's lane
	must(t, err)
	results := make(chan error)
	for range waiters {
		go func() { results <- sender.Send(make([]byte, size)) }()
	}
	stream.Close()
	for range waiters {
		wantError(t, receive(t, results), ErrCancelled, "waiter")
	}
}

// Many goroutines send, some with short timeouts, to a reader with a small window.
func TestNoWakeupOfABlockedSendIsLost(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	const each, waiters = 400, 6
	serve(t, worker, "wake", func(ctx context.Context, req *Request, s *Sender) error {
		var all sync.WaitGroup
		for i := range waiters {
			all.Add(1)
			go func() {
				defer all.Done()
				for range each {
					for {
						limited, stop := context.WithTimeout(ctx, time.Duration(i)*100*time.Microsecond)
						if i == 0 {
							limited = ctx
						}
						err := s.SendContext(limited, make([]byte, 200))
						stop()
						if err == nil {
							break
						} else if err != context.DeadlineExceeded {
							t.Error(err)
							return
						}
					}
				}
			}()
		}
		all.Wait()
		return nil
	})
	var all sync.WaitGroup
	for range 4 {
		all.Add(1)
		go func() {
			defer all.Done()
			stream, err := gateway.Request(t.Context(), "wake", nil, "reader", With("stream_buffer_bytes", "3000"))
			if err != nil {
				t.Error(err)
				return
			}
			if got, err := read(t, stream); len(got) != each*waiters || err != nil {
				t.Error(len(got), err)
			}
		}()
	}
	all.Wait()
}

func TestConcurrentReadersGetEachMessageOnce(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	const total, readers = 20_000, 5
	serve(t, worker, "shared", func(ctx context.Context, req *Request, s *Sender) error {
		for i := range total {
			if err := s.Send(numberedMessage(i, 16)); err != nil {
				return err
			}
		}
		return nil
	})
	stream := request(t, gateway, "shared", "sharer", With("stream_buffer_bytes", "20000"))
	var seen [total]atomic.Int32
	var all sync.WaitGroup
	for range readers {
		all.Add(1)
		go func() {
			defer all.Done()
			last := -1
			for message, err := range stream.Messages() {
				if err != nil {
					// The goroutine that reads the end first closes the stream; the others get the same end.
					t.Error(err)
					return
				}
				if i := number(message); i <= last {
					t.Error(i, " after ", last)
				} else {
					last = i
				}
				seen[number(message)].Add(1)
			}
		}()
	}
	all.Wait()
	for i := range seen {
		if seen[i].Load() != 1 {
			t.Fatalf("message %d was read %d times", i, seen[i].Load())
		}
	}
}

func TestConcurrentReadCloseMarkAndEnd(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	serve(t, worker, "races", func(ctx context.Context, req *Request, s *Sender) error {
		for i := 0; ; i++ {
			if err := s.Send(numberedMessage(i, 100)); err != nil {
				return err
			}
			if string(req.Data) == "ends" && i == 500 {
				return nil
			}
		}
	})
	var all sync.WaitGroup
	for round := range 120 {
		all.Add(1)
		go func() {
			defer all.Done()
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			id := fmt.Sprint("racer ", round)
			data := map[bool]string{true: "ends"}[round%4 == 0]
			stream, err := gateway.Request(ctx, "races", []byte(data), id, With("stream_buffer_bytes", "10000"))
			if err != nil {
				t.Error(err)
				return
			}
			for next := range 20 * round {
				message, err := stream.Next(ctx)
				if err != nil {
					break
				}
				if number(message) != next {
					t.Error(round, next, number(message))
				}
			}
			var ends sync.WaitGroup
			for _, end := range []func(){
				func() { stream.Close() }, stop, func() { MarkClientOffline(id) }, func() { stream.Next(t.Context()) },
			} {
				ends.Add(1)
				go func() {
					defer ends.Done()
					end()
				}()
			}
			ends.Wait()
			if _, err := stream.Next(t.Context()); err == nil {
				t.Error("a message was read after Close")
			}
		}()
	}
	all.Wait()
	eventually(t, "no stream or sender is left", func() bool { return worker.sendersLeft()+gateway.streamsLeft() == 0 })
}

// Streams on lanes go on after a lost connection, and sends are accepted meanwhile.
func TestStreamsOnLanesSurviveAReconnect(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	step, sent := make(chan int), make(chan error)
	serve(t, worker, "outlive", func(ctx context.Context, req *Request, s *Sender) error {
		for i := range 3 {
			receive(t, step)
			sent <- s.Send(numberedMessage(i, 8))
		}
		return nil
	})
	stream := request(t, gateway, "outlive", "survivor")
	step <- 0
	must(t, receive(t, sent))
	_, err := stream.Next(t.Context())
	must(t, err)
	s.kill()
	worker.events.wait(t, Disconnected, "")
	gateway.events.wait(t, Disconnected, "")
	step <- 1
	must(t, receive(t, sent))
	startServer(t, "-p", s.port)
	step <- 2
	must(t, receive(t, sent))
	got, err := read(t, stream)
	if err != nil || len(got) != 2 || number([]byte(got[0])) != 1 || number([]byte(got[1])) != 2 {
		t.Errorf("%q %v", got, err)
	}
}

func TestNoLanesAtEitherEndKeepsLevel0(t *testing.T) {
	s := startServer(t)
	on, off := connect(t, s), connect(t, s, With("lanes", "false"))
	serve(t, on, "on", echo)
	serve(t, off, "off", echo)
	for _, pair := range []struct {
		from    *client
		subject string
		lanes   uint64
	}{{off, "on", 0}, {on, "off", 0}, {off, "off", 0}, {on, "on", 1}} {
		got, err := read(t, request(t, pair.from, pair.subject, "pair"))
		if len(got) != 3 || err != nil || off.Stats().Lanes != 0 || min(on.Stats().Lanes, 1) != pair.lanes {
			t.Error(pair.subject, got, err, on.Stats().Lanes, off.Stats().Lanes)
		}
	}
	for _, bad := range []ConnectOption{With("lanes", "maybe"), With("heartbeat_ms", "0"), With("peer_grace_ms", "-1")} {
		if _, err := Connect(s.url, bad); !errors.Is(err, ErrInvalid) {
			t.Error(err)
		}
	}
}

func TestStreamsAndSendersAfterBothConnectionsClosed(t *testing.T) {
	s := startServer(t)
	worker, gateway := connect(t, s), connect(t, s)
	senders := make(chan *Sender, 1)
	serve(t, worker, "after", func(ctx context.Context, req *Request, s *Sender) error {
		s.Detach()
		senders <- s
		return s.Send([]byte("first"))
	})
	stream := request(t, gateway, "after", "late")
	sender := receive(t, senders)
	_, err := stream.Next(t.Context())
	must(t, err)
	must(t, closeConn(worker.Conn))
	_, err = read(t, stream)
	wantError(t, err, ErrRemote, "")
	must(t, closeConn(gateway.Conn))
	eventually(t, "no stream or sender is left", func() bool { return worker.sendersLeft()+gateway.streamsLeft() == 0 })
	for range 2 {
		wantError(t, sender.Send(nil), ErrClosed, "late")
		wantError(t, sender.SendContext(t.Context(), []byte("x")), ErrClosed, "late")
		wantError(t, sender.TrySend([]byte("x")), ErrClosed, "late")
		wantError(t, sender.SendError(nil), ErrClosed, "late")
		wantError(t, sender.Err(), ErrClosed, "late")
		if !sender.IsClosed() || sender.SendCount() != 1 {
			t.Error(sender.IsClosed(), sender.SendCount())
		}
		_, err = stream.Next(t.Context())
		wantError(t, err, ErrRemote, "")
		must(t, stream.Close())
	}
}
