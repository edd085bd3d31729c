// Package natsgo takes over the settings of nats.go: the servers of a connection, credentials, TLS, and times.
package natsgo

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
	presence "github.com/nats-presence/nats-presence/bindings/go"
)

// Connect makes a connection of nats-presence with the servers and settings of nc, which may be closed. Options in opts
// replace those of nc. It fails like [ConnectOptions] and [presence.Connect].
func Connect(nc *nats.Conn, opts ...presence.ConnectOption) (*presence.Conn, error) {
	own, err := convert(&nc.Opts)
	if err != nil {
		return nil, err
	}
	var servers []string
	if nc.Opts.Url != "" {
		servers = append(servers, nc.Opts.Url)
	}
	servers = append(servers, nc.Opts.Servers...)
	return presence.Connect(strings.Join(servers, ","), append(own, opts...)...)
}

// ConnectOptions returns the options of [presence.Connect] that correspond to options of nats.Connect. Those that have
// their default there keep the default of presence. Callbacks for events, and options that change only what nats.go
// does, are ignored; so is NoReconnect.
//
// It fails with errors.ErrUnsupported for CustomDialer, InProcessServer and ProxyPath, which presence does not have.
// [presence.Connect] then fails for a TLS configuration that [presence.TLSConfig] cannot use.
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

func convert(o *nats.Options) ([]presence.ConnectOption, error) {
	for name, isSet := range map[string]bool{
		"CustomDialer":    o.CustomDialer != nil,
		"InProcessServer": o.InProcessServer != nil,
		"ProxyPath":       o.ProxyPath != "",
	} {
		if isSet {
			return nil, fmt.Errorf("%w: presence does not have the option %s of nats.go", errors.ErrUnsupported, name)
		}
	}
	config, err := tlsConfig(o)
	if err != nil {
		return nil, err
	}
	defaults := nats.GetDefaultOptions()
	var opts []presence.ConnectOption
	for _, candidate := range []struct {
		isSet bool
		opt   presence.ConnectOption
	}{
		{o.Name != "", presence.Name(o.Name)},
		{o.User != "", presence.User(o.User)},
		{o.Password != "", presence.Password(o.Password)},
		{o.Token != "", presence.Token(o.Token)},
		{o.UserInfo != nil || o.TokenHandler != nil || o.UserJWT != nil || o.Nkey != "", credentials(o)},
		{o.Secure, presence.TLSRequired()},
		{o.TLSHandshakeFirst, presence.TLSFirst()},
		{config != nil, presence.TLSConfig(config)},
		{o.InboxPrefix != "", presence.InboxPrefix(o.InboxPrefix)},
		{o.Timeout > 0 && o.Timeout != defaults.Timeout, presence.ConnectTimeout(o.Timeout)},
		{o.PingInterval > 0 && o.PingInterval != defaults.PingInterval, presence.PingInterval(o.PingInterval)},
		{o.MaxReconnect > 0 && o.MaxReconnect != defaults.MaxReconnect, presence.MaxReconnects(o.MaxReconnect)},
		{o.ReconnectWait > 0 && o.ReconnectWait != defaults.ReconnectWait, presence.ReconnectMax(o.ReconnectWait)},
		{o.RetryOnFailedConnect, presence.RetryOnInitialConnect()},
	} {
		if candidate.isSet {
			opts = append(opts, candidate.opt)
		}
	}
	return opts, nil
}

// credentials calls the callbacks of nats.go for each attempt to connect, as nats.go does.
func credentials(o *nats.Options) presence.ConnectOption {
	return presence.CredentialsFunc(func(nonce []byte) (c presence.Credentials, err error) {
		c = presence.Credentials{User: o.User, Password: o.Password, Token: o.Token, NKey: o.Nkey}
		if o.UserInfo != nil {
			c.User, c.Password = o.UserInfo()
		}
		if o.TokenHandler != nil {
			c.Token = o.TokenHandler()
		}
		if o.UserJWT != nil {
			if c.JWT, err = o.UserJWT(); err != nil {
				return c, err
			}
		}
		if o.SignatureCB != nil {
			c.Signature, err = o.SignatureCB(nonce)
		}
		return c, err
	})
}

// tlsConfig returns the TLS configuration with what the callbacks of nats.go return, or nil if there is none.
func tlsConfig(o *nats.Options) (config *tls.Config, err error) {
	if o.TLSConfig == nil && o.RootCAsCB == nil && o.TLSCertCB == nil {
		return nil, nil
	}
	config = new(tls.Config)
	if o.TLSConfig != nil {
		config = o.TLSConfig.Clone()
	}
	if o.RootCAsCB != nil {
		if config.RootCAs, err = o.RootCAsCB(); err != nil {
			return nil, err
		}
	}
	if o.TLSCertCB != nil {
		certificate, err := o.TLSCertCB()
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{certificate}
	}
	return config, nil
}
