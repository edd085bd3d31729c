// Package natsgo takes over the settings of nats.go: the servers of a connection, credentials, TLS, and times.
package natsgo

import (
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// Connect makes a connection of nats-presence with the servers and settings of nc, which may be closed. Options in opts
// replace those of nc.
func Connect(nc *nats.Conn, opts ...presence.ConnectOption) (*presence.Conn, error) {
	own, err := convert(&nc.Opts)
	if err != nil {
		return nil, err
	}
	servers := nc.Opts.Servers
	if nc.Opts.Url != "" {
		servers = append(strings.Split(nc.Opts.Url, ","), servers...)
	}
	return presence.Connect(strings.Join(servers, ","), append(own, opts...)...)
}

// ConnectOptions returns the options of [presence.Connect] that correspond to options of nats.Connect. Those that have
// their default there keep the default of presence. Callbacks for events, and options that change only what nats.go
// does, are ignored. It fails, with errors.ErrUnsupported, for an option that presence does not have.
func ConnectOptions(opts ...nats.Option) ([]presence.ConnectOption, error) {
	options := nats.GetDefaultOptions()
	for _, opt := range opts {
		if opt != nil {
			if err := opt(&options); err != nil {
				return nil, err
			}
		}
	}
	return convert(&options)
}

// unsupported returns the error for an option that presence does not have.
func unsupported(option string) error {
	return fmt.Errorf("%w: presence does not have the option %s of nats.go", errors.ErrUnsupported, option)
}

func convert(o *nats.Options) (opts []presence.ConnectOption, err error) {
	switch {
	case o.CustomDialer != nil:
		return nil, unsupported("CustomDialer")
	case o.InProcessServer != nil:
		return nil, unsupported("InProcessServer")
	case o.ProxyPath != "":
		return nil, unsupported("ProxyPath")
	case o.TLSConfig != nil || o.RootCAsCB != nil || o.TLSCertCB != nil:
		return nil, unsupported("TLSConfig")
	case o.UserJWT != nil || o.SignatureCB != nil:
		return nil, unsupported("SignatureCB")
	}
	add := func(isSet bool, opt func() presence.ConnectOption) {
		if isSet {
			opts = append(opts, opt())
		}
	}
	defaults := nats.GetDefaultOptions()
	add(o.Name != "", func() presence.ConnectOption { return presence.Name(o.Name) })
	add(o.User != "", func() presence.ConnectOption { return presence.User(o.User) })
	add(o.Password != "", func() presence.ConnectOption { return presence.Password(o.Password) })
	add(o.Token != "", func() presence.ConnectOption { return presence.Token(o.Token) })
	add(o.Secure, presence.TLSRequired)
	add(o.TLSHandshakeFirst, presence.TLSFirst)
	add(o.InboxPrefix != "", func() presence.ConnectOption { return presence.InboxPrefix(o.InboxPrefix) })
	add(o.Timeout > 0 && o.Timeout != defaults.Timeout, func() presence.ConnectOption {
		return presence.ConnectTimeout(o.Timeout)
	})
	add(o.PingInterval > 0 && o.PingInterval != defaults.PingInterval, func() presence.ConnectOption {
		return presence.PingInterval(o.PingInterval)
	})
	add(o.MaxReconnect > 0 && o.MaxReconnect != defaults.MaxReconnect, func() presence.ConnectOption {
		return presence.MaxReconnects(o.MaxReconnect)
	})
	add(o.ReconnectWait > 0 && o.ReconnectWait != defaults.ReconnectWait, func() presence.ConnectOption {
		return presence.ReconnectMax(o.ReconnectWait)
	})
	return opts, nil
}
