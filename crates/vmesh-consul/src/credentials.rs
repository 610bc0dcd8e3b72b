//! Reads the token and the certificates from their files, and reads them again when they change.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio::time::Instant;

use crate::config::{Config, Tls};

/// The minimum time between two checks of a file.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The limit of a token, in bytes. A token is a UUID or a JWT; a longer file is something else.
const MAX_TOKEN: usize = 16 << 10;
/// The bundles of trusted authorities of operating systems: Debian, Red Hat, SUSE, Alpine.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A value made from files, with the number of its revision.
#[derive(Clone)]
pub(crate) struct Revision<T> {
    pub(crate) value: T,
    /// Grows with every change.
    pub(crate) number: u64,
}

pub(crate) struct Credentials {
    token_file: Option<PathBuf>,
    tls: Tls,
    token: tokio::sync::Mutex<FileCache<HeaderValue>>,
    config: tokio::sync::Mutex<FileCache<Arc<ClientConfig>>>,
    /// Warnings for operators: at most one for the token and one for TLS.
    warnings: Mutex<[Option<Arc<str>>; 2]>,
}

/// The last value read from a set of files, with their fingerprints.
struct FileCache<T> {
    checked_at: Option<Instant>,
    /// The fingerprints of the files at the last read, whether it succeeded or failed.
    fingerprints: Vec<FileFingerprint>,
    good: Option<Revision<T>>,
    failure: Option<String>,
}

impl<T> FileCache<T> {
    fn new() -> FileCache<T> {
        FileCache { checked_at: None, fingerprints: Vec::new(), good: None, failure: None }
    }
}

/// Metadata that differs between two versions of a file. The change time covers a second write within one tick
/// of the file system's clock.
#[derive(Debug, PartialEq, Eq)]
struct FileFingerprint(Option<[i64; 7]>);

impl FileFingerprint {
    async fn at(path: &Path) -> FileFingerprint {
        let look = tokio::fs::metadata(path).await.ok().map(|m| {
            let (dev, ino, size) = (m.dev().cast_signed(), m.ino().cast_signed(), m.size().cast_signed());
            [dev, ino, size, m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()]
        });
        FileFingerprint(look)
    }
}

const TOKEN: usize = 0;
const TLS: usize = 1;

impl Credentials {
    pub(crate) fn new(config: &Config) -> Credentials {
        Credentials {
            token_file: config.token_file.clone(),
            tls: config.tls.clone(),
            token: tokio::sync::Mutex::new(FileCache::new()),
            config: tokio::sync::Mutex::new(FileCache::new()),
            warnings: Mutex::new([None, None]),
        }
    }

    /// Returns warnings for operators that do not stop the client.
    pub(crate) fn warnings(&self) -> Vec<Arc<str>> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten().cloned().collect()
    }

    fn set_warning(&self, about: usize, warning: Option<String>) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = warnings.get_mut(about)
            && before.as_deref() != warning.as_deref()
        {
            if let Some(warning) = &warning {
                tracing::warn!("{warning}");
            }
            *before = warning.map(Into::into);
        }
    }

    /// Returns the current token, or `None` if none is configured. `again` skips the minimum time between
    /// checks, after the server rejected the token.
    pub(crate) async fn token(&self, again: bool) -> Result<Option<Revision<HeaderValue>>, String> {
        let Some(path) = &self.token_file else { return Ok(None) };
        let mut files = self.token.lock().await;
        let paths = [path.as_path()];
        self.refresh(TOKEN, &mut files, &paths, again, async || {
            let (token, warning) = read_token(path).await?;
            Ok((token, warning))
        })
        .await
        .map(Some)
    }

    /// Returns the current TLS configuration.
    pub(crate) async fn tls(&self) -> Result<Revision<Arc<ClientConfig>>, String> {
        let mut files = self.config.lock().await;
        let paths: Vec<&Path> = [&self.tls.ca_file, &self.tls.cert_file, &self.tls.key_file]
            .into_iter()
            .filter_map(|path| path.as_deref())
            .collect();
        let tls = self.tls.clone();
        self.refresh(TLS, &mut files, &paths, false, async || {
            let read = tokio::task::spawn_blocking(move || client_config(&tls)).await;
            let config = read.map_err(|panicked| panicked.to_string())??;
            Ok((Arc::new(config), None))
        })
        .await
    }

    pub(crate) fn has_certificate(&self) -> bool {
        self.tls.cert_file.is_some()
    }

    pub(crate) fn server_name(&self) -> Option<&str> {
        self.tls.server_name.as_deref()
    }

    /// Returns the value of the files, and reads them first if their fingerprints have changed. If a changed
    /// file cannot be used, the last good value stays in use: the file may be in the middle of a write.
    async fn refresh<T: Clone>(
        &self,
        slot: usize,
        files: &mut FileCache<T>,
        paths: &[&Path],
        again: bool,
        read: impl AsyncFnOnce() -> Result<(T, Option<String>), String>,
    ) -> Result<Revision<T>, String> {
        let now = Instant::now();
        let is_due = again || files.checked_at.is_none_or(|at| now >= at + CHECK_INTERVAL);
        if is_due {
            files.checked_at = Some(now);
            let mut fingerprints = Vec::new();
            for path in paths {
                fingerprints.push(FileFingerprint::at(path).await);
            }
            if fingerprints != files.fingerprints || files.good.is_none() {
                let number = files.good.as_ref().map_or(0, |good| good.number);
                files.fingerprints = fingerprints;
                match read().await {
                    Ok((value, warning)) => {
                        self.set_warning(slot, warning);
                        files.good = Some(Revision { value, number: number + 1 });
                        files.failure = None;
                    }
                    Err(wrong) => {
                        if files.good.is_some() {
                            self.set_warning(slot, Some(format!("{wrong}; the previous ones stay in use")));
                        }
                        files.failure = Some(wrong);
                    }
                }
            }
        }
        match (&files.good, &files.failure) {
            (Some(good), _) => Ok(good.clone()),
            (None, failure) => Err(failure.clone().unwrap_or_else(|| "nothing was read".to_owned())),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("token_file", &self.token_file).finish_non_exhaustive()
    }
}

async fn read_token(path: &Path) -> Result<(HeaderValue, Option<String>), String> {
    let shown = path.display();
    let failed = |error: std::io::Error| {
        format!(
            "the token file {shown} cannot be read: {error}; make it readable for the user of this process"
        )
    };
    let mode = tokio::fs::metadata(path).await.map_err(failed)?.mode();
    let text = tokio::fs::read(path).await.map_err(failed)?;
    let token = parse_token(&text).map_err(|wrong| format!("the token file {shown} {wrong}"))?;
    let warning = (mode & 0o044 != 0).then(|| {
        let mode = mode & 0o777;
        format!("the token file {shown} may be read by others (mode {mode:04o}): `chmod 0600 {shown}`")
    });
    Ok((token, warning))
}

/// Parses a token. Errors never quote it.
fn parse_token(text: &[u8]) -> Result<HeaderValue, &'static str> {
    if text.len() > MAX_TOKEN {
        return Err("is too long for a token");
    }
    let text = text.trim_ascii();
    if text.is_empty() {
        return Err("is empty: it has to contain the token and nothing else");
    }
    if !text.iter().all(u8::is_ascii_graphic) {
        return Err("contains more than a token: it has to contain one word in ASCII");
    }
    let mut token = HeaderValue::from_bytes(text).map_err(|_| "is not a token")?;
    token.set_sensitive(true);
    Ok(token)
}

fn client_config(tls: &Tls) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    let ca_file = match &tls.ca_file {
        Some(path) => path.clone(),
        None => SYSTEM_BUNDLES.iter().map(PathBuf::from).find(|path| path.is_file()).ok_or_else(|| {
            format!(
                "this system has no bundle of certificate authorities ({}): set `tls.ca_file`",
                SYSTEM_BUNDLES.join(", ")
            )
        })?,
    };
    let (added, ignored) = roots.add_parsable_certificates(certificates(&ca_file, "tls.ca_file")?);
    if added == 0 {
        let shown = ca_file.display();
        return Err(format!(
            "`tls.ca_file` {shown} has no usable certificate in it ({ignored} are unusable)"
        ));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS cannot be set up: {error}"))?
        .with_root_certificates(roots);
    let mut config = match (&tls.cert_file, &tls.key_file) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            let chain = certificates(cert, "tls.cert_file")?;
            let private = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| format!("`tls.key_file` {} cannot be used: {error}", key.display()))?;
            builder.with_client_auth_cert(chain, private).map_err(|error| {
                format!("{} and {} do not belong together: {error}", cert.display(), key.display())
            })?
        }
        _ => {
            return Err(
                "`tls.cert_file` and `tls.key_file` have to be set together: one is missing".to_owned()
            );
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(path: &Path, field: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let shown = path.display();
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(all) if all.is_empty() => Err(format!("`{field}` {shown} has no PEM certificate in it")),
        Ok(all) => Ok(all),
        Err(error) => Err(format!("`{field}` {shown} cannot be used: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn with_token(path: &Path) -> Credentials {
        Credentials::new(&Config { token_file: Some(path.to_owned()), ..Config::default() })
    }

    async fn shown(credentials: &Credentials) -> String {
        match credentials.token(true).await {
            Ok(Some(token)) => format!("{} {:?} {:?}", token.number, token.value.to_str(), token.value),
            Ok(None) => "none".to_owned(),
            Err(wrong) => wrong,
        }
    }

    #[tokio::test]
    async fn a_token_is_read_again_when_its_file_changes_and_stays_when_it_cannot_be_read() {
        let dir = vmesh_testkit::tempdir().unwrap();
        let path = dir.join("token");
        let credentials = with_token(&path);
        assert!(shown(&credentials).await.contains("cannot be read: No such file"));
        std::fs::write(&path, "").unwrap();
        assert!(shown(&credentials).await.contains("is empty"));
        std::fs::write(&path, "one\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(shown(&credentials).await, "1 Ok(\"one\") Sensitive");
        assert_eq!(shown(&credentials).await, "1 Ok(\"one\") Sensitive");
        assert_eq!(credentials.warnings(), []);

        std::fs::write(&path, "two").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(shown(&credentials).await, "2 Ok(\"two\") Sensitive");
        assert!(credentials.warnings().concat().contains("may be read by others (mode 0640)"));

        std::fs::write(&path, "two words").unwrap();
        assert_eq!(shown(&credentials).await, "2 Ok(\"two\") Sensitive");
        let warning = credentials.warnings().concat();
        assert!(warning.contains("one word in ASCII") && !warning.contains("two words"), "{warning}");
    }

    #[tokio::test]
    async fn a_certificate_that_cannot_be_used_is_named() {
        let dir = vmesh_testkit::tempdir().unwrap();
        let path = dir.join("ca.pem");
        std::fs::write(&path, "no PEM").unwrap();
        let tls = |tls| Credentials::new(&Config { tls, ..Config::default() });
        let message = tls(Tls { ca_file: Some(path.clone()), ..Tls::default() }).tls().await.err().unwrap();
        assert!(
            message.starts_with("`tls.ca_file` ") && message.ends_with("has no PEM certificate in it"),
            "{message}"
        );
        let gone = Some(dir.join("none"));
        let message = tls(Tls { ca_file: gone, ..Tls::default() }).tls().await.err().unwrap();
        assert!(message.contains("cannot be used"), "{message}");
    }
}
