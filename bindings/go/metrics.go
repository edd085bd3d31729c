package presence

// #include <nats_presence.h>
import "C"

import (
	"net/http"
	"unsafe"
)

// metricsType is the content type of the text that Metrics returns.
const metricsType = "application/openmetrics-text; version=1.0.0; charset=utf-8"

// Metrics returns the metrics of this process as OpenMetrics text: those of all its connections together. No label has
// a client's id; the metrics of a service have its subject. docs/metrics.md describes each metric.
func Metrics() []byte {
	text := make([]byte, 16<<10)
	for {
		length := int64(C.presence_metrics((*C.char)(unsafe.Pointer(&text[0])), C.size_t(len(text))))
		if length < int64(len(text)) {
			return text[:max(length, 0)] // negative only after a defect of the library
		}
		// The text may have grown by the next call.
		text = make([]byte, length+length/4)
	}
}

// MetricsHandler returns a handler that answers GET requests with [Metrics], for Prometheus:
//
//	http.Handle("/metrics", presence.MetricsHandler())
func MetricsHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "metrics are read with GET", http.StatusMethodNotAllowed)
			return
		}
		text := Metrics()
		if len(text) == 0 {
			http.Error(w, "nats-presence could not write its metrics", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", metricsType)
		w.Write(text)
	})
}
