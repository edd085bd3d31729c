package presence

// #define _GNU_SOURCE
// #include <sys/mman.h>
import "C"

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"reflect"
	"unsafe"
)

type tlsOption struct{ config *tls.Config }

func (t tlsOption) apply(o *options) { o.tls = t.config }
func (tlsOption) forConnect()        {}

// TLSConfig makes [Connect] require TLS, with the certificate authorities in config.RootCAs (nil: those of the system)
// and the client's certificate in config.Certificates or from config.GetClientCertificate, which is called once. The
// certificates and the key are passed on in memory.
//
// The C library checks the server's certificate itself, against the name in the URL. So Connect fails with ErrInvalid
// if config has InsecureSkipVerify, ServerName, VerifyPeerCertificate, VerifyConnection, a list of encrypted client
// hellos, more than one certificate, a key that is not in memory, or a MinVersion above TLS 1.2. Other fields have no
// effect.
func TLSConfig(config *tls.Config) ConnectOption {
	if config == nil {
		config = new(tls.Config)
	}
	return tlsOption{config}
}

// tlsFiles are files in memory, which the C library reads for each attempt to connect.
type tlsFiles []*os.File

func (f tlsFiles) close() {
	for _, file := range f {
		file.Close()
	}
}

// newTLSFiles returns the options for a TLS configuration, and the files that they name.
func newTLSFiles(config *tls.Config) (pairs []pair, files tlsFiles, err error) {
	defer func() {
		if err != nil {
			files.close()
			err = invalid("option TLSConfig: %v", err)
		}
	}()
	add := func(option string, text []byte) error {
		file, err := memoryFile(text)
		if err != nil {
			return err
		}
		files = append(files, file)
		pairs = append(pairs, pair{option, fmt.Sprintf("/proc/self/fd/%d", file.Fd())})
		return nil
	}
	pairs = append(pairs, pair{"tls_required", "true"})
	if err := checkTLS(config); err != nil {
		return nil, files, err
	}
	if config.RootCAs != nil {
		roots, err := certificatesOf(config.RootCAs)
		if err != nil {
			return nil, files, err
		}
		if err := add("tls_ca_file", certificatesPEM(roots)); err != nil {
			return nil, files, err
		}
	}
	certificate, err := clientCertificate(config)
	if err != nil || certificate == nil {
		return pairs, files, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		return nil, files, fmt.Errorf("the private key cannot be passed on: %w", err)
	}
	if err := add("tls_cert_file", certificatesPEM(certificate.Certificate)); err != nil {
		return nil, files, err
	}
	err = add("tls_key_file", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	return pairs, files, err
}

func checkTLS(config *tls.Config) error {
	for field, isSet := range map[string]bool{
		"InsecureSkipVerify":             config.InsecureSkipVerify,
		"ServerName":                     config.ServerName != "",
		"VerifyPeerCertificate":          config.VerifyPeerCertificate != nil,
		"VerifyConnection":               config.VerifyConnection != nil,
		"EncryptedClientHelloConfigList": config.EncryptedClientHelloConfigList != nil,
		"MinVersion above TLS 1.2":       config.MinVersion > tls.VersionTLS12,
	} {
		if isSet {
			return fmt.Errorf("the C library does not support %s", field)
		}
	}
	return nil
}

// clientCertificate returns the client's certificate, or nil if there is none.
func clientCertificate(config *tls.Config) (*tls.Certificate, error) {
	if config.GetClientCertificate != nil {
		certificate, err := config.GetClientCertificate(&tls.CertificateRequestInfo{Version: tls.VersionTLS13})
		if err != nil || len(certificate.Certificate) == 0 {
			return nil, err
		}
		return certificate, nil
	}
	switch len(config.Certificates) {
	case 0:
		return nil, nil
	case 1:
		return &config.Certificates[0], nil
	}
	return nil, fmt.Errorf("it has %d certificates; the C library takes one", len(config.Certificates))
}

func certificatesPEM(certificates [][]byte) []byte {
	var text bytes.Buffer
	for _, certificate := range certificates {
		pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	}
	return text.Bytes()
}

// memoryFile returns a file that is only in memory. Its path is below /proc/self/fd.
func memoryFile(text []byte) (*os.File, error) {
	name := []byte("presence\x00")
	fd, err := C.memfd_create((*C.char)(unsafe.Pointer(&name[0])), C.MFD_CLOEXEC)
	if fd < 0 {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), "memory")
	if _, err := file.Write(text); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// errPool is the error if crypto/x509 has changed. A test fails then.
var errPool = errors.New("this version of Go does not show the certificates in RootCAs; use TLSCAFile instead")

// certificatesOf returns the certificates in a pool. crypto/x509 has no function for that, so it reads the pool's
// fields.
func certificatesOf(pool *x509.CertPool) (certificates [][]byte, err error) {
	all := reflect.ValueOf(pool).Elem().FieldByName("lazyCerts")
	if !all.IsValid() || all.Kind() != reflect.Slice || all.Type().Elem().Kind() != reflect.Struct {
		return nil, errPool
	}
	for i := range all.Len() {
		get, constraint := all.Index(i).FieldByName("getCert"), all.Index(i).FieldByName("constraint")
		if !get.IsValid() || !constraint.IsValid() || constraint.Kind() != reflect.Func {
			return nil, errPool
		}
		if !constraint.IsNil() {
			return nil, errors.New("a certificate in RootCAs has a constraint, which the C library does not support")
		}
		readable := reflect.NewAt(get.Type(), get.Addr().UnsafePointer()).Elem().Interface()
		load, ok := readable.(func() (*x509.Certificate, error))
		if !ok {
			return nil, errPool
		}
		certificate, err := load()
		if err != nil {
			return nil, err
		}
		certificates = append(certificates, certificate.Raw)
	}
	if len(certificates) == 0 {
		return nil, errors.New("RootCAs has no certificates")
	}
	return certificates, nil
}
