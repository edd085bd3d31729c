package presence

// #include <nats_presence.h>
import "C"

import (
	"context"
	"crypto/tls"
	"log/slog"
	"strconv"
	"time"
)

// ConnectOption is an option of [Connect]. Options that are not set have their defaults. A wrong value makes the call
// fail with ErrInvalid. Durations are rounded up to whole milliseconds.
type ConnectOption interface {
	option
	forConnect()
}

// RequestOption is an option of [Conn.Request]. It is otherwise like [ConnectOption].
type RequestOption interface {
	option
	forRequest()
}

// ServeOption is an option of [Conn.Serve] and [Conn.Listen]. It is otherwise like [ConnectOption].
type ServeOption interface {
	option
	forServe()
}

// Option is an option of any of these calls, made by [With].
type Option interface {
	ConnectOption
	RequestOption
	ServeOption
}

// option adds itself to the options of a call.
type option interface{ apply(*options) }

type options struct {
	pairs       []pair
	log         func(Event)
	credentials func(nonce []byte) (Credentials, error)
	tls         *tls.Config
	trace       StreamTrace
}

// pair is a named option. The functions below return it as the interface of the call that has the option.
type pair struct{ name, value string }

func (p pair) apply(o *options) { o.pairs = append(o.pairs, p) }
func (pair) forConnect()        {}
func (pair) forRequest()        {}
func (pair) forServe()          {}

// With sets an option by its name in the C library, for options that are read from a configuration. Times are in whole
// milliseconds, sizes in bytes. The call fails with ErrInvalid if it does not have the option.
//
// For Connect: name, user, password, token, nkey_seed, creds_file, auth_socket, tls_required, tls_first, tls_ca_file,
// tls_cert_file, tls_key_file, connect_timeout_ms, retry_on_initial_connect, reconnect_min_ms, reconnect_max_ms,
// max_reconnects, ping_interval_ms, inbox_prefix, offline_subject, announce, lanes, discovery, heartbeat_ms,
// peer_grace_ms, send_buffer_bytes, receive_buffer_bytes, session_grace_ms, worker_threads.
//
// For Request: timeout_ms, retries, retry_delay_ms, stream_buffer_bytes, only_online, header.NAME. The option
// manual_credit is reserved for this package: a message counts against the window until it was read.
//
// For Serve and Listen: max_streams, detached, drain_ms, stop_timeout_ms.
//
// Each has a function below, which describes it; so does nats_presence.h.
func With(name, value string) Option { return pair{name, value} }

func integer(name string, value int) pair { return pair{name, strconv.Itoa(value)} }

// milliseconds rounds away from zero, so that a short time does not become 0, which often means "no limit".
func milliseconds(name string, d time.Duration) pair {
	ms := d.Milliseconds()
	switch rest := d % time.Millisecond; {
	case rest > 0:
		ms++
	case rest < 0:
		ms--
	}
	return pair{name, strconv.FormatInt(ms, 10)}
}

// Name sets the connection's name in nats-server's monitoring. Default: nats-presence.
func Name(name string) ConnectOption { return pair{"name", name} }

// User authenticates with a user name, usually together with [Password]. The URL may contain both instead.
func User(name string) ConnectOption { return pair{"user", name} }

// Password sets the password for [User].
func Password(password string) ConnectOption { return pair{"password", password} }

// Token authenticates with a token. The URL may contain it instead.
func Token(token string) ConnectOption { return pair{"token", token} }

// NKeySeed authenticates with an NKey seed.
func NKeySeed(seed string) ConnectOption { return pair{"nkey_seed", seed} }

// CredsFile authenticates with the JWT and the seed in a credentials file.
func CredsFile(path string) ConnectOption { return pair{"creds_file", path} }

// TLSRequired requires TLS. The other TLS options imply it.
func TLSRequired() ConnectOption { return pair{"tls_required", "true"} }

// TLSFirst starts TLS before nats-server sends its INFO, for servers with handshake_first.
func TLSFirst() ConnectOption { return pair{"tls_first", "true"} }

// TLSCAFile sets the PEM file with the certificates that sign nats-server's certificate.
func TLSCAFile(path string) ConnectOption { return pair{"tls_ca_file", path} }

// TLSCertFile sets the PEM file with the client's certificate. It needs [TLSKeyFile] too.
func TLSCertFile(path string) ConnectOption { return pair{"tls_cert_file", path} }

// TLSKeyFile sets the PEM file with the private key for [TLSCertFile].
func TLSKeyFile(path string) ConnectOption { return pair{"tls_key_file", path} }

// ConnectTimeout limits how long each address of each server is tried, and how long Serve, Listen and ListenOffline
// wait for nats-server. Default: 5 s.
func ConnectTimeout(d time.Duration) ConnectOption { return milliseconds("connect_timeout_ms", d) }

// RetryOnInitialConnect makes [Connect] return at once and keep trying to connect.
func RetryOnInitialConnect() ConnectOption { return pair{"retry_on_initial_connect", "true"} }

// ReconnectMin sets the first delay before a reconnect, which doubles up to [ReconnectMax]. A random half of each delay
// is jitter. The first attempt is made without a delay, unless the connection was lost as soon as it was made. Default:
// 50 ms.
func ReconnectMin(d time.Duration) ConnectOption { return milliseconds("reconnect_min_ms", d) }

// ReconnectMax sets the longest delay before a reconnect. Default: 4 s.
func ReconnectMax(d time.Duration) ConnectOption { return milliseconds("reconnect_max_ms", d) }

// MaxReconnects sets how many attempts in a row may fail before the connection is given up for good. Default: 0, no
// limit.
func MaxReconnects(n int) ConnectOption { return integer("max_reconnects", n) }

// PingInterval sets how often nats-server is pinged. The connection is lost after two unanswered pings. Default: 20 s.
func PingInterval(d time.Duration) ConnectOption { return milliseconds("ping_interval_ms", d) }

// InboxPrefix sets the prefix of the subjects that answers are sent to. Default: _INBOX.
func InboxPrefix(prefix string) ConnectOption { return pair{"inbox_prefix", prefix} }

// OfflineSubject sets the subject that clients are announced offline on. It must be the same in all processes. Default:
// client.offline.
func OfflineSubject(subject string) ConnectOption { return pair{"offline_subject", subject} }

// Announce sets which calls of [MarkClientOffline] are announced to other processes: "always" (the default) announces
// each, "streams" only those of clients with running streams that were requested here and are not on a lane, "never"
// none. With "never", the ends of level-0 streams, and of sessions with such streams, are not announced either.
func Announce(when string) ConnectOption { return pair{"announce", when} }

// NoLanes keeps all streams of the connection on level 0 of the wire, as with peers that do not run this library: they
// are not batched, flow-controlled or resumed after a reconnect.
func NoLanes() ConnectOption { return pair{"lanes", "false"} }

// NoDiscovery keeps the connection from answering NATS's service protocol. Without it, a connection that serves subjects
// is shown by `nats micro ls`, info and stats, under its [Name].
func NoDiscovery() ConnectOption { return pair{"discovery", "false"} }

// HeartbeatInterval sets how often a silent peer on a lane is probed while streams run. After three intervals without a
// message from it, the peer is gone. Default: 5 s.
func HeartbeatInterval(d time.Duration) ConnectOption { return milliseconds("heartbeat_ms", d) }

// PeerGrace sets how long a peer on a lane may be away, when nats-server reports that it is not there, before it is
// gone. With 0 it is gone at once. Default: 1 s for a peer on the same nats-server, 3 s for others.
func PeerGrace(d time.Duration) ConnectOption { return milliseconds("peer_grace_ms", d) }

// SendBuffer sets how many bytes may be unsent and, on each lane, unacknowledged. Beyond that, sends block. Default: 4
// MiB.
func SendBuffer(bytes int) ConnectOption { return integer("send_buffer_bytes", bytes) }

// ReceiveBuffer sets how many bytes may be unread on the connection. On lanes: once the windows of its streams (see
// [StreamBuffer]) add up to it, further streams have windows of 8192 bytes. On level 0: once so much is unread, a
// stream with more than a 64th of it unread ends with ErrFull. Default: 64 MiB.
func ReceiveBuffer(bytes int) ConnectOption { return integer("receive_buffer_bytes", bytes) }

// SessionGrace sets how long the streams of a client go on after its last session was closed. It applies to all
// sessions of the process; the last Connect that sets it wins. Default: 0.
func SessionGrace(d time.Duration) ConnectOption { return milliseconds("session_grace_ms", d) }

// WorkerThreads sets how many threads the C library runs in this process, 1 to 64. The first Connect decides. Default:
// 1.
func WorkerThreads(n int) ConnectOption { return integer("worker_threads", n) }

type logOption func(Event)

func (f logOption) apply(o *options) { o.log = f }
func (logOption) forConnect()        {}

// WithLog makes [Connect] call f for each event of the connection, of kind Connected, Disconnected, Serving and Log.
// The errors and panics of handlers are events of kind Log. f runs in a goroutine of its own and may block: up to 256
// events are kept for it, later ones are dropped, and an event of kind Log with ErrFull reports how many.
func WithLog(f func(Event)) ConnectOption { return logOption(f) }

// WithLogger is [WithLog] with a function that logs each event: Connected and Serving at level Info, Disconnected and
// Log at level Warn. The message is the kind; the attributes are text, status, client and subject, as far as the event
// has them.
func WithLogger(logger *slog.Logger) ConnectOption {
	return WithLog(func(e Event) {
		level := slog.LevelInfo
		if e.Kind == Disconnected || e.Kind == Log {
			level = slog.LevelWarn
		}
		attrs := []slog.Attr{slog.String("text", e.Text)}
		if e.Status != 0 {
			attrs = append(attrs, slog.String("status", e.Status.Error()))
		}
		if e.ClientID != "" {
			attrs = append(attrs, slog.String("client", e.ClientID))
		}
		if e.Subject != "" {
			attrs = append(attrs, slog.String("subject", e.Subject))
		}
		logger.LogAttrs(context.Background(), level, "presence: "+e.Kind.String(), attrs...)
	})
}

// Timeout limits the time from the request to the end of the stream, which then ends with ErrTimeout. Default: 0, no
// limit.
func Timeout(d time.Duration) RequestOption { return milliseconds("timeout_ms", d) }

// Retries sets how often the request is sent again if no worker serves the subject or the worker is busy, as long as no
// message has arrived. Default: 0.
func Retries(n int) RequestOption { return integer("retries", n) }

// RetryDelay sets the delay before each of the [Retries]. Default: 100 ms.
func RetryDelay(d time.Duration) RequestOption { return milliseconds("retry_delay_ms", d) }

// StreamBuffer sets how many bytes of the stream may be unread; each message counts 64 bytes in addition. On a lane
// this is the window, at most 4 MiB, and the worker's sends block when it is full. On level 0 the stream then ends with
// ErrFull. Default: on a lane 256 KiB, which grows up to 4 MiB while the reader is fast; on level 0 64 MiB.
func StreamBuffer(bytes int) RequestOption { return integer("stream_buffer_bytes", bytes) }

// OnlyOnline makes [Conn.Request] fail with ErrOffline if the client is not online in this process. Use it for clients
// that are marked online or have a session: then a late request does not bring back a client that has left.
func OnlyOnline() RequestOption { return pair{"only_online", "true"} }

// Header adds a header that the worker reads with [Request.Header]. The names Connect-ID, Nats-… and Presence-… are
// reserved.
func Header(name, value string) RequestOption { return pair{"header." + name, value} }

// StreamTrace has functions that are called when something happens to a stream that this process requested, whether it
// is read or not. They must not block: other streams wait meanwhile.
type StreamTrace struct {
	FirstMessage func() // the first message has arrived
	// The stream has ended: nil after the worker's end, or the error that its reader gets. It is the last call.
	Ended func(error)
}

// Trace calls functions when something happens to the stream. It does not call them if the request fails.
func Trace(t StreamTrace) RequestOption { return traceOption{t} }

type traceOption struct{ trace StreamTrace }

func (t traceOption) apply(o *options) { o.trace = t.trace }
func (traceOption) forRequest()        {}

// MaxStreams limits how many streams of the service, and how many of its handlers, run at once. A request beyond that
// is answered with "server busy", which its requester gets as ErrBusy. Default: 0, which means 10,000.
func MaxStreams(n int) ServeOption { return integer("max_streams", n) }

// Detached leaves the stream of a handler that returns nil open, as if the handler had called [Sender.Detach]: each
// stream must be ended with [Sender.End] or [Sender.SendError].
func Detached() ServeOption { return pair{"detached", "true"} }

// DrainTimeout sets how long streams that run may go on after the context of Serve or Listen has ended. Default: 0,
// they are cut at once.
func DrainTimeout(d time.Duration) ServeOption { return milliseconds("drain_ms", d) }

// StopTimeout limits how long Serve waits for handlers to return after the streams of its service were cut. Default: 0,
// no limit.
func StopTimeout(d time.Duration) ServeOption { return milliseconds("stop_timeout_ms", d) }

func collect[O option](opts []O) (o options) {
	for _, opt := range opts {
		opt.apply(&o)
	}
	return o
}

// prepare makes what the options need as long as the connection exists, and returns a function that frees it.
func (o *options) prepare() (release func(), err error) {
	var files tlsFiles
	if o.tls != nil {
		var pairs []pair
		if pairs, files, err = newTLSFiles(o.tls); err != nil {
			return nil, err
		}
		o.pairs = append(o.pairs, pairs...)
	}
	if o.credentials == nil {
		return files.close, nil
	}
	agent, err := newAgent(o.credentials)
	if err != nil {
		files.close()
		return nil, err
	}
	o.pairs = append(o.pairs, pair{"auth_socket", agent.path()})
	return func() {
		agent.close()
		files.close()
	}, nil
}

// value returns the value of an option that was set last, or "".
func (o *options) value(name string) (value string) {
	for _, p := range o.pairs {
		if p.name == name {
			value = p.value
		}
	}
	return value
}

// config returns the options as a presence_config, which the caller must free; nil if no option is set.
func (o *options) config() (*C.presence_config, error) {
	if len(o.pairs) == 0 {
		return nil, nil
	}
	config := C.presence_config_new()
	for _, p := range o.pairs {
		if err := p.setIn(config); err != nil {
			freeConfig(config)
			return nil, err
		}
	}
	return config, nil
}

// freeConfig is a function for the tests, which cannot call C.
func freeConfig(config *C.presence_config) { C.presence_config_free(config) }

func (p pair) setIn(config *C.presence_config) error {
	name, err := cText("the name of option "+strconv.Quote(p.name), p.name)
	if err != nil {
		return err
	}
	value, err := cText("the value of option "+p.name, p.value)
	if err != nil {
		return err
	}
	if C.presence_config_set(config, name, value) == C.PRESENCE_OK {
		return nil
	}
	var report C.presence_error
	return callError(C.presence_config_error(config, &report), &report)
}

// serveSettings are the options of Serve and Listen, which the C library does not have.
type serveSettings struct {
	maxStreams         uint64
	drain, stopTimeout time.Duration
	detached           bool
}

func serveOptions(opts []ServeOption) (s serveSettings, err error) {
	o := collect(opts)
	for _, p := range o.pairs {
		if p.name == "detached" {
			if s.detached = p.value == "true"; !s.detached && p.value != "false" {
				return s, invalid("option detached is %q; it must be true or false", p.value)
			}
			continue
		}
		n, err := strconv.ParseUint(p.value, 10, 32)
		switch p.name {
		case "max_streams":
			s.maxStreams = n
		case "drain_ms":
			s.drain = time.Duration(n) * time.Millisecond
		case "stop_timeout_ms":
			s.stopTimeout = time.Duration(n) * time.Millisecond
		default:
			return s, invalid("option %q is not one of Serve: max_streams, detached, drain_ms, stop_timeout_ms", p.name)
		}
		if err != nil {
			return s, invalid("option %s is %q; it must be a whole number from 0 to 4294967295", p.name, p.value)
		}
	}
	return s, nil
}
