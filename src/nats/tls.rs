//! Certificates and keys, which are checked before they are used, so that an error says what is wrong with which file;
//! and a certificate verifier for servers that are connected by an address instead of their name.

use crate::config::ConnectOptions;
use crate::error::{Error, Result};
use async_nats::rustls::client::WebPkiServerVerifier;
use async_nats::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use async_nats::rustls::crypto::{self, CryptoProvider, ring};
use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use async_nats::rustls::sign::CertifiedKey;
use async_nats::rustls::{self, ClientConfig, DigitallySignedStruct, InconsistentKeys, RootCertStore, SignatureScheme};
use once_cell::sync::OnceCell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// The object identifier of the curve P-521 in keys and certificates.
const P_521: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23];

/// The certificates and keys that the options name.
pub(crate) struct Files {
    roots: Option<Arc<RootCertStore>>,
    client: Option<Arc<CertifiedKey>>,
}

impl Files {
    /// Reads and checks them.
    pub(crate) fn read(options: &ConnectOptions) -> Result<Files> {
        let roots = match &options.tls_ca_file {
            Some(file) => Some(Arc::new(read_roots(file)?)),
            None => None,
        };
        let client = match (&options.tls_cert_file, &options.tls_key_file) {
            (Some(certificate), Some(key)) => Some(Arc::new(read_client(certificate, key)?)),
            _ => None,
        };
        Ok(Files { roots, client })
    }

    /// Returns the TLS configuration for a server that is connected by its address, and must have a certificate for
    /// `name`. None if `name` is no host name.
    pub(crate) fn config_for(&self, name: &str) -> Option<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let name = ServerName::try_from(name.to_owned()).ok()?;
        let roots = self.roots.clone();
        let verifier =
            Arc::new(NameVerifier { name, roots, verifier: OnceCell::new(), provider: Arc::clone(&provider) });
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .ok()?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        Some(match &self.client {
            Some(client) => builder
                .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(CertifiedKey::clone(client)))),
            None => builder.with_no_client_auth(),
        })
    }
}

/// Checks a server's certificate against the name that was resolved to its address, not against the address.
#[derive(Debug)]
struct NameVerifier {
    name: ServerName<'static>,
    /// None: those of the system.
    roots: Option<Arc<RootCertStore>>,
    /// Made for the first certificate: a server without TLS needs none, and loading the system's authorities takes
    /// time.
    verifier: OnceCell<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl NameVerifier {
    fn verifier(&self) -> Result<&Arc<WebPkiServerVerifier>, rustls::Error> {
        self.verifier.get_or_try_init(|| {
            let roots = self.roots.clone().unwrap_or_else(|| Arc::new(system_roots()));
            let builder = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider));
            builder.build().map_err(|error| rustls::Error::General(error.to_string()))
        })
    }
}

/// Loads the system's authorities, as async-nats does.
fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

impl ServerCertVerifier for NameVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _address: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verifier()?.verify_server_cert(end_entity, intermediates, &self.name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The error for the file of an option.
fn wrong(option: &str, file: &Path, why: &str) -> Error {
    Error::invalid(format!("{option} {}: {why}", file.display()))
}

fn read(option: &str, file: &Path) -> Result<Vec<u8>> {
    let text = fs::read(file).map_err(|error| wrong(option, file, &error.to_string()))?;
    if text.trim_ascii().is_empty() {
        return Err(wrong(option, file, "the file is empty"));
    }
    Ok(text)
}

/// Returns the labels of the sections of a PEM file, as in "-----BEGIN CERTIFICATE-----".
fn sections(text: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(text);
    let labels = text.lines().filter_map(|line| line.trim().strip_prefix("-----BEGIN ")?.strip_suffix("-----"));
    labels.map(str::to_owned).collect()
}

/// The error for a file without the right section. It says what the file has instead.
fn missing(option: &str, file: &Path, text: &[u8], what: &str) -> Error {
    let found = sections(text);
    let instead = match found.first() {
        Some(label) => format!("its first section is {label}"),
        None if text.starts_with(&[0x30]) => {
            "it looks like DER; convert it to PEM by `openssl x509 -inform der` or `openssl pkey -inform der`".into()
        }
        None => "it has no PEM section".into(),
    };
    wrong(option, file, &format!("there is no {what} in PEM form in it; {instead}"))
}

fn read_certificates(option: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = read(option, file)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let certificates =
        certificates.map_err(|error| wrong(option, file, &format!("a certificate in it cannot be read: {error}")))?;
    if certificates.is_empty() {
        return Err(missing(option, file, &text, "certificate"));
    }
    Ok(certificates)
}

fn read_roots(file: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for (index, certificate) in read_certificates("tls_ca_file", file)?.into_iter().enumerate() {
        roots.add(certificate).map_err(|error| {
            wrong("tls_ca_file", file, &format!("certificate {} in it cannot be used: {error}", index + 1))
        })?;
    }
    Ok(roots)
}

fn read_key(file: &Path) -> Result<PrivateKeyDer<'static>> {
    let option = "tls_key_file";
    let text = read(option, file)?;
    let is_encrypted = sections(&text).iter().any(|label| label == "ENCRYPTED PRIVATE KEY")
        || String::from_utf8_lossy(&text)
            .lines()
            .any(|line| line.starts_with("Proc-Type:") && line.contains("ENCRYPTED"));
    if is_encrypted {
        return Err(wrong(
            option,
            file,
            "the key is encrypted by a passphrase, which is not supported; decrypt it by `openssl pkey -in FILE -out \
             NEW`, and protect it by the permissions of the file",
        ));
    }
    if !sections(&text).iter().any(|label| label.ends_with("PRIVATE KEY")) {
        return Err(missing(option, file, &text, "private key"));
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
        wrong(option, file, &format!("the key cannot be read: {error}; use PKCS#8, PKCS#1 or SEC1 in PEM form"))
    })
}

/// Reads a certificate, with its chain, and its key.
fn read_client(certificate_file: &Path, key_file: &Path) -> Result<CertifiedKey> {
    const USABLE: &str = "use ECDSA on P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits";
    let certificates = read_certificates("tls_cert_file", certificate_file)?;
    let key = read_key(key_file)?;
    let signing_key = ring::sign::any_supported_type(&key).map_err(|_| {
        let is_p_521 = contains(key.secret_der(), P_521) || contains(&certificates[0], P_521);
        let what = if is_p_521 { "the key is on the curve P-521" } else { "the key is of a type" };
        wrong("tls_key_file", key_file, &format!("{what}, which is not supported; {USABLE}"))
    })?;
    let client = CertifiedKey::new(certificates, signing_key);
    match client.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(client),
        Err(rustls::Error::InconsistentKeys(_)) => {
            // The first certificate of the chain must be that of the key.
            let fits = |certificate: &CertificateDer<'static>| {
                CertifiedKey::new(vec![certificate.clone()], Arc::clone(&client.key)).keys_match().is_ok()
            };
            match client.cert.iter().position(fits) {
                Some(index) => Err(wrong(
                    "tls_cert_file",
                    certificate_file,
                    &format!(
                        "the certificate of the key in tls_key_file is number {} in it; it must be the first, before \
                         its issuers",
                        index + 1
                    ),
                )),
                None => Err(Error::invalid(format!(
                    "tls_cert_file {} and tls_key_file {} do not belong together: the key is another certificate's",
                    certificate_file.display(),
                    key_file.display()
                ))),
            }
        }
        Err(error) => Err(wrong(
            "tls_cert_file",
            certificate_file,
            &format!("the first certificate in it cannot be used: {error}"),
        )),
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Adds to an error of a TLS handshake what to do about it.
pub(crate) fn explain(error: &str, options: &ConnectOptions) -> String {
    let has = |part| error.contains(part);
    let hint = if has("InvalidContentType") && options.tls_first {
        "the server does not speak TLS, or not from the start of the connection (tls_first)"
    } else if has("InvalidContentType") {
        "the server does not speak TLS"
    } else if has("CaUsedAsEndEntity") {
        "the server uses the certificate of an authority, such as `openssl req -x509` makes; give it one that the \
         authority has issued, or one made with `-addext basicConstraints=critical,CA:FALSE` and set that as tls_ca_file"
    } else if has("UnknownIssuer") {
        "the issuer of the server's certificate is not in CA_FILE, or the server does not send the intermediate \
         certificates"
    } else if has("BadSignature") {
        "the server's certificate was signed by another key than that of the authority with this name in CA_FILE"
    } else if has("UnsupportedSignatureAlgorithm") || has("UnsupportedCertVersion") {
        "the server's certificate has a type of key or signature that is not supported (P-521, SHA-1, RSA below 2048 \
         bits, X.509 before version 3)"
    } else if has("HandshakeFailure") || has("ProtocolVersion") {
        "this client and the server have no TLS version or type of key in common: the server needs TLS 1.3, and ECDSA \
         on P-256 or P-384, Ed25519, or RSA of at least 2048 bits"
    } else if has("certificate expired") || has("not valid yet") {
        "check the dates of the server's certificate and the clock of this machine"
    } else if has("failed signing nonce") {
        "nkey_seed or creds_file does not have the seed of a user"
    } else if has("received fatal alert") {
        "the server refuses our certificate, or requires one (tls_cert_file, tls_key_file)"
    } else if has("timed out") && options.needs_tls() && !options.tls_first {
        "set tls_first for a server with handshake_first"
    } else {
        return error.to_owned();
    };
    let ca = if options.tls_ca_file.is_some() { "tls_ca_file" } else { "the system's authorities (set tls_ca_file)" };
    format!("{error}: {}", hint.replace("CA_FILE", ca))
}
