package presence

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// sample returns the value of a sample of the present metrics, by its name and labels.
func sample(t *testing.T, name string) float64 {
	t.Helper()
	text := string(Metrics())
	_, rest, ok := strings.Cut(text, "\nnats_presence_"+name+" ")
	if !ok {
		t.Fatalf("there is no %s in\n%s", name, text)
	}
	line, _, _ := strings.Cut(rest, "\n")
	value, err := strconv.ParseFloat(line, 64)
	must(t, err)
	return value
}

func waitForSample(t *testing.T, name string, value float64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s is %v", name, value), func() bool { return sample(t, name) == value })
}

func TestMetricsCountStreams(t *testing.T) {
	s := startServer(t)
	for _, lanes := range []string{"true", "false"} {
		t.Run("lanes "+lanes, func(t *testing.T) { testMetricsOfStreams(t, s, "metrics."+lanes, With("lanes", lanes)) })
	}
}

func testMetricsOfStreams(t *testing.T, s *server, subject string, level ConnectOption) {
	const secret = "SECRET-ID"
	worker, gateway := fmt.Sprintf("{role=\"worker\",subject=%q", subject), `{role="gateway",subject=""`
	w, g := connect(t, s, level), connect(t, s, level)
	serve(t, w, subject, func(ctx context.Context, request *Request, sender *Sender) error {
		if err := sender.Send([]byte("first")); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	})
	before := map[string]float64{}
	for _, name := range []string{"streams_started_total" + gateway + "}", "streams_ended_total" + gateway + `,status="offline"}`} {
		before[name] = sample(t, name)
	}
	stream := request(t, g, subject, secret)
	if data, err := stream.Next(t.Context()); err != nil || string(data) != "first" {
		t.Fatal(data, err)
	}
	waitForSample(t, "streams_running"+worker+"}", 1)
	if text := string(Metrics()); strings.Contains(text, secret) || !strings.HasSuffix(text, "# EOF\n") {
		t.Fatal(text)
	}
	must(t, MarkClientOffline(secret))
	if _, err := stream.Next(t.Context()); !errors.Is(err, ErrOffline) {
		t.Fatal(err)
	}
	waitForSample(t, "streams_running"+worker+"}", 0)
	waitForSample(t, "streams_ended_total"+worker+`,status="offline"}`, 1)
	waitForSample(t, fmt.Sprintf("stop_latency_seconds_count{subject=%q}", subject), 1)
	waitForSample(t, "first_message_seconds_count"+worker+"}", 1)
	for name, value := range before {
		waitForSample(t, name, value+1)
	}
	if strings.Contains(string(Metrics()), secret) {
		t.Fatal("the client's id is in the metrics")
	}
}

func TestMetricsHandlerAnswersGETOnly(t *testing.T) {
	server := httptest.NewServer(MetricsHandler())
	defer server.Close()
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} {
		request, err := http.NewRequestWithContext(t.Context(), method, server.URL, nil)
		must(t, err)
		response, err := server.Client().Do(request)
		must(t, err)
		body, err := io.ReadAll(response.Body)
		must(t, err)
		response.Body.Close()
		switch {
		case method == http.MethodPost:
			if response.StatusCode != http.StatusMethodNotAllowed || response.Header.Get("Allow") != "GET, HEAD" {
				t.Error(response.Status, response.Header)
			}
		case response.StatusCode != http.StatusOK || response.Header.Get("Content-Type") != metricsType:
			t.Error(response.Status, response.Header)
		case method == http.MethodGet && !strings.HasSuffix(string(body), "# EOF\n"):
			t.Errorf("%s", body)
		}
	}
}

func TestMetricsAreReadByManyGoroutines(t *testing.T) {
	var readers sync.WaitGroup
	for range 8 {
		readers.Add(1)
		go func() {
			defer readers.Done()
			for range 50 {
				if text := string(Metrics()); !strings.HasSuffix(text, "\n# EOF\n") {
					t.Errorf("%q", text)
				}
			}
		}()
	}
	readers.Wait()
}
