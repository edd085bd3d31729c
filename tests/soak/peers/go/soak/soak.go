// Package soak is shared by both peers in Go: soak.h in Go.
package soak

// #include <malloc.h>
import "C"

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	presence "github.com/nats-presence/nats-presence/bindings/go"
)

const (
	// Head is the number of bytes that hold the stream's key and the message's number.
	Head    = 16
	largest = 1 << 16
	shifts  = 4096
)

var table = func() []byte {
	table := make([]byte, 0, largest+shifts)
	for i := uint64(0); len(table) < largest+shifts; i++ {
		table = binary.LittleEndian.AppendUint64(table, Scramble(i))
	}
	return table
}()

// Scramble makes the numbers 0, 1, … random.
func Scramble(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb
	return x ^ (x >> 31)
}

// AppendContent appends message number of the stream with this key.
func AppendContent(to []byte, key, number uint64, size int) []byte {
	to = binary.LittleEndian.AppendUint64(to, key)
	to = binary.LittleEndian.AppendUint64(to, number)
	at := (key + number) % shifts
	return append(to, table[at:at+uint64(size-Head)]...)
}

// IsContent reports whether a message is this one.
func IsContent(message []byte, key, number uint64, size int) bool {
	at := (key + number) % shifts
	return len(message) == size && binary.LittleEndian.Uint64(message) == key &&
		binary.LittleEndian.Uint64(message[8:]) == number && bytes.Equal(message[Head:], table[at:at+uint64(size-Head)])
}

// Connect makes two connections with the options "KEY=VALUE,…": with lanes, and on level 0; the second leaves
// announcements to the first.
func Connect(url, options string) (conns [2]*presence.Conn) {
	var opts []presence.ConnectOption
	for option := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		opts = append(opts, presence.With(key, value))
	}
	for i := range conns {
		conn, err := presence.Connect(url, opts...)
		Check(err)
		conns[i] = conn
		opts = append(opts, presence.With("lanes", "false"), presence.With("announce", "never"))
	}
	return conns
}

// EmitStats prints statistics, with the bytes of C's heap in use, as an event of this name.
func EmitStats(event string, conns [2]*presence.Conn, more map[string]any) {
	sum := map[string]any{}
	for key, value := range more {
		sum[key] = value
	}
	var connected, connects, streams, senders, lanes, waiting uint64
	for _, conn := range conns {
		s := conn.Stats()
		if s.Connected {
			connected++
		}
		connects += s.Connects
		streams += s.Streams
		senders += s.Senders
		lanes += s.Lanes
		waiting += s.BytesWaiting
	}
	heap := C.mallinfo2()
	sum["heap"] = heap.uordblks + heap.hblkhd
	sum["event"], sum["online"], sum["connected"], sum["connects"] = event, presence.OnlineCount(), connected, connects
	sum["streams"], sum["senders"], sum["lanes"], sum["waiting"] = streams, senders, lanes, waiting
	Emit(sum)
}

// Emit prints one event.
func Emit(event map[string]any) {
	line, err := json.Marshal(event)
	Check(err)
	os.Stdout.Write(append(line, '\n')) // one write: lines of several goroutines do not mix
}

// Run prints statistics each half second, and calls f with each line of the standard input, until that ends.
func Run(conns [2]*presence.Conn, more func() map[string]any, f func(line string)) {
	Emit(map[string]any{"event": "ready"})
	lines := make(chan string)
	go func() {
		for scanner := bufio.NewScanner(os.Stdin); scanner.Scan(); {
			lines <- scanner.Text()
		}
		close(lines)
	}()
	for tick := time.Tick(500 * time.Millisecond); ; {
		select {
		case line, ok := <-lines:
			if !ok {
				return
			}
			f(line)
		case <-tick:
			EmitStats("stats", conns, more())
		}
	}
}

// Go runs f in a goroutine that wait waits for.
func Go(wait *sync.WaitGroup, f func()) {
	wait.Add(1)
	go func() {
		defer wait.Done()
		f()
	}()
}

// GiveBack returns unused memory to the system: Go's, and C's.
func GiveBack() {
	debug.FreeOSMemory()
	C.malloc_trim(0)
}

// Status is the status in an error; 0 if there is none.
func Status(err error) presence.Status {
	var failed *presence.Error
	if errors.As(err, &failed) {
		return failed.Status
	}
	return 0
}

// Check ends the program if there is an error.
func Check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
