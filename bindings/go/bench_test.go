package presence

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"syscall"
	"testing"
	"time"
)

func init() {
	// Streams as many messages of as many bytes as are asked for, and says what CPU a message took.
	roles["source"] = func(conn *Conn, _ *bufio.Scanner) error {
		return conn.Serve(context.Background(), "source", "workers", func(ctx context.Context, req *Request, s *Sender) error {
			n, size := binary.LittleEndian.Uint64(req.Data), binary.LittleEndian.Uint64(req.Data[8:])
			message := make([]byte, size)
			before := cpu()
			for range n {
				if err := s.Send(message); err != nil {
					return err
				}
			}
			fmt.Printf("sent in %d\n", (cpu()-before).Nanoseconds()/int64(n))
			return nil
		})
	}
}

// cpu is what CPU time this process has used.
func cpu() time.Duration {
	var used syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// One stream from one process to another: what a message takes until it is read, and at each end.
func BenchmarkStream(b *testing.B) {
	for _, size := range []uint64{16, 128, 1024} {
		b.Run(fmt.Sprint(size, "B"), func(b *testing.B) {
			s := startServer(b)
			source := startRole(b, s, "source")
			conn, err := Connect(s.url)
			must(b, err)
			defer conn.Close(context.Background())
			request := binary.LittleEndian.AppendUint64(nil, uint64(b.N))
			stream, err := conn.Request(b.Context(), "source", binary.LittleEndian.AppendUint64(request, size), "reader",
				With("retries", "1000"), With("retry_delay_ms", "10"))
			must(b, err)
			var before runtime.MemStats
			runtime.ReadMemStats(&before)
			used, read := cpu(), 0
			for message, err := range stream.Messages() {
				if err != nil {
					b.Fatal(err)
				}
				if read == 0 {
					b.ResetTimer()
				}
				if read++; len(message) != int(size) {
					b.Fatal(len(message))
				}
			}
			b.StopTimer()
			if read != b.N {
				b.Fatal(read)
			}
			b.ReportMetric(float64((cpu()-used).Nanoseconds())/float64(b.N), "ns-CPU/read")
			var sent float64
			fmt.Sscan(source.says(b, "sent in (.*)"), &sent)
			b.ReportMetric(sent, "ns-CPU/send")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
		})
	}
}
