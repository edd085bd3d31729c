package message

import (
	"bytes"
	"context"
	"encoding/json"
	"regexp"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// askMicro requests what NATS's service protocol has for a verb, and decodes it as nats.go's package micro has it: each
// field must be known there.
func askMicro(t *testing.T, conn *nats.Conn, verb micro.Verb, name, id string, into any) {
	t.Helper()
	subject, err := micro.ControlSubject(verb, name, id)
	must(t, err)
	answer, err := conn.Request(subject, nil, testTimeout)
	must(t, err)
	decoder := json.NewDecoder(bytes.NewReader(answer.Data))
	decoder.DisallowUnknownFields()
	must(t, decoder.Decode(into))
}

// A worker of this library is a service for programs that use nats.go's package micro.
func TestWorkersAreServicesOfNATS(t *testing.T) {
	s := startServer(t, "")
	client := plain(t, s)
	worker, err := presence.Connect(s.url, presence.Name("llm"))
	must(t, err)
	defer worker.Close(context.Background())
	service, err := worker.Listen(t.Context(), "llm.generate", "workers")
	must(t, err)
	go service.Serve(func(_ context.Context, req *presence.Request, sender *presence.Sender) error {
		if len(req.Data) > 0 {
			return presence.Errorf(404, "no such model")
		}
		return nil
	})
	for _, data := range []string{"", "x", ""} {
		stream, err := worker.Request(t.Context(), "llm.generate", []byte(data), "")
		must(t, err)
		for range stream.Messages() {
		}
	}

	var ping micro.Ping
	askMicro(t, client, micro.PingVerb, "llm", "", &ping)
	semver := regexp.MustCompile(`^\d+\.\d+\.\d+$`)
	if ping.Type != micro.PingResponseType || ping.Name != "llm" || ping.ID == "" || !semver.MatchString(ping.Version) {
		t.Errorf("%+v", ping)
	}
	var info micro.Info
	askMicro(t, client, micro.InfoVerb, ping.Name, ping.ID, &info)
	if info.Type != micro.InfoResponseType || info.ID != ping.ID || len(info.Endpoints) != 1 {
		t.Fatalf("%+v", info)
	}
	if e := info.Endpoints[0]; e.Name != "llm_generate" || e.Subject != "llm.generate" || e.QueueGroup != "workers" {
		t.Errorf("%+v", e)
	}
	var stats micro.Stats
	askMicro(t, client, micro.StatsVerb, "", "", &stats)
	if stats.Type != micro.StatsResponseType || stats.ID != ping.ID || len(stats.Endpoints) != 1 {
		t.Fatalf("%+v", stats)
	}
	if age := time.Since(stats.Started); age < -time.Minute || age > time.Hour {
		t.Errorf("started %v ago", age)
	}
	e := stats.Endpoints[0]
	if e.NumRequests != 3 || e.NumErrors != 1 || e.ProcessingTime <= 0 || e.AverageProcessingTime > e.ProcessingTime {
		t.Errorf("%+v", e)
	}
}
