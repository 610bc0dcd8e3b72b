//! Checks whether an Envoy would start, before the serving one is touched.
//!
//! A hot restart cannot be undone completely: the old Envoy closes its admin interface when the new one starts, and its listeners when the
//! new one is live. So a trial comes first. It checks that the binary runs, that it accepts the bootstrap, and that it accepts all
//! resources that the serving Envoy received from the control plane, which an older Envoy may reject.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;

/// Timeout of `--version`. A binary that takes longer hangs.
const SAYS_WITHIN: Duration = Duration::from_secs(10);
/// Timeout of `--mode validate`: enough for thousands of clusters on a busy machine.
const VALIDATES_WITHIN: Duration = Duration::from_secs(60);
/// Marks the error of a program that did not exit within its timeout.
const HANGS: &str = "hangs: no end after";
/// Largest number of characters of Envoy's output in an error. The end of the output is kept, since it names the cause.
const MAX_SHOWN: usize = 600;
/// Largest number of bytes kept of a program's output. The program may not be Envoy, and may write without end.
const MAX_OUTPUT: usize = 64 << 10;

/// The versions that a binary reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BinaryVersions {
    /// The version, such as `1.40.0`.
    pub(super) version: String,
    /// The hot restart version, such as `11.104`. Two Envoys can take over from each other if theirs are equal. `None` if the binary has no
    /// hot restart.
    pub(super) hot_restart: Option<String>,
}

/// The reason why a binary cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnusableBinary {
    pub(super) reason: String,
    /// The binary exceeded the timeout, which can happen to a good binary on a busy host.
    pub(super) has_timed_out: bool,
}

/// Runs the binary to query its versions.
pub(super) async fn query_versions(program: &Path) -> Result<BinaryVersions, UnusableBinary> {
    let unusable = |why: String| {
        let has_timed_out = why.contains(HANGS);
        let why = match why.contains("Exec format error") {
            true => format!("{} cannot be run on this machine: {why}", program.display()),
            false => why,
        };
        UnusableBinary { reason: why, has_timed_out }
    };
    run_version_queries(program).await.map_err(unusable)
}

async fn run_version_queries(program: &Path) -> Result<BinaryVersions, String> {
    let version = run_to_end(program, &["--version".to_owned()], SAYS_WITHIN).await?;
    // `envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL`
    let number = version.split_once("version: ").and_then(|(_, rest)| rest.split('/').nth(1));
    let Some(number) = number else {
        return Err(format!(
            "{} is no Envoy: to `--version` it says `{}`",
            program.display(),
            tail(&version)
        ));
    };
    let printed = run_to_end(program, &["--hot-restart-version".to_owned()], SAYS_WITHIN).await?;
    let hot_restart = printed.split_whitespace().find(|word| is_hot_restart_version(word)).map(str::to_owned);
    Ok(BinaryVersions { version: number.to_owned(), hot_restart })
}

fn is_hot_restart_version(word: &str) -> bool {
    word.split_once('.').is_some_and(|(major, size)| {
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number(major) && is_number(size)
    })
}

/// Checks whether `program` accepts `bootstrap`, and also the resources in `dump` (a `/config_dump`) if given. `arguments` is the command
/// line without the bootstrap; `scratch` is a path that is written and removed.
pub(super) async fn validate(
    program: &Path,
    arguments: &[String],
    bootstrap: &Value,
    dump: Option<&Value>,
    scratch: &Path,
) -> Result<(), String> {
    run_validation(program, arguments, bootstrap, scratch)
        .await
        .map_err(|printed| format!("{} refuses the bootstrap: {printed}", program.display()))?;
    let Some(dump) = dump else { return Ok(()) };
    let whole = with_resources(bootstrap.clone(), dump);
    let lenient: Vec<String> =
        arguments.iter().cloned().chain(["--allow-unknown-static-fields".to_owned()]).collect();
    run_validation(program, &lenient, &whole, scratch).await.map_err(|printed| {
        format!(
            "{} refuses what the Envoy that serves has from its control plane: {printed}",
            program.display()
        )
    })
}

async fn run_validation(
    program: &Path,
    arguments: &[String],
    bootstrap: &Value,
    scratch: &Path,
) -> Result<(), String> {
    fsx::write_atomically(scratch, bootstrap.to_string().as_bytes(), fsx::PRIVATE)
        .map_err(|error| one_line(&error))?;
    let mut all: Vec<String> =
        ["--mode", "validate", "--disable-hot-restart", "--config-path"].map(Into::into).into();
    all.push(scratch.display().to_string());
    all.extend_from_slice(arguments);
    let checked = run_to_end(program, &all, VALIDATES_WITHIN).await;
    _ = std::fs::remove_file(scratch);
    checked.map(|_| ())
}

/// Adds the dynamic resources of a `/config_dump` to the static ones of `bootstrap`.
fn with_resources(mut bootstrap: Value, dump: &Value) -> Value {
    let configs = dump.get("configs").and_then(Value::as_array);
    let all = |list: &str, path: &str| -> Vec<Value> {
        let lists = configs.into_iter().flatten().filter_map(|config| config.get(list)?.as_array());
        lists.flatten().filter_map(|one| without_type_or_secrets(one.pointer(path)?)).collect()
    };
    let clusters = all("dynamic_active_clusters", "/cluster");
    let listeners = all("dynamic_listeners", "/active_state/listener");
    let Some(bootstrap_fields) = bootstrap.as_object_mut() else { return bootstrap };
    let fixed = bootstrap_fields.entry("static_resources").or_insert_with(|| json!({}));
    for (name, more) in [("clusters", clusters), ("listeners", listeners)] {
        let list = fixed.as_object_mut().map(|fixed| fixed.entry(name).or_insert_with(|| json!([])));
        if let Some(list) = list.and_then(Value::as_array_mut) {
            list.extend(more);
        }
    }
    bootstrap
}

/// Returns a resource of a dump without its `@type`. Returns `None` for one that contains a private key, which the dump redacts.
fn without_type_or_secrets(resource: &Value) -> Option<Value> {
    let mut fields = resource.as_object()?.clone();
    fields.remove("@type");
    let resource = Value::Object(fields);
    (!resource.to_string().contains("[redacted]")).then_some(resource)
}

/// Runs a program to its end. Returns its output, or the error that it exited with.
async fn run_to_end(program: &Path, arguments: &[String], within: Duration) -> Result<String, String> {
    let shown = program.display();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let first = arguments.first().map(String::as_str).unwrap_or_default();
    let finished = async {
        let mut child = command.spawn()?;
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        tokio::try_join!(child.wait(), read_tail(output), read_tail(errors))
    };
    match timeout(within, finished).await {
        Ok(Ok((status, output, errors))) => {
            let printed = output + &errors;
            if status.success() { Ok(printed) } else { Err(format!("{status}: {}", tail(&printed))) }
        }
        Ok(Err(error)) => Err(format!("could not start {shown}: {error}")),
        Err(_) => Err(format!("{shown} {first} {HANGS} {} s", within.as_secs())),
    }
}

/// Reads to the end, and returns the last part of the output.
async fn read_tail(from: Option<impl AsyncRead + Unpin>) -> io::Result<String> {
    let Some(mut from) = from else { return Ok(String::new()) };
    let mut printed = Vec::new();
    while from.read_buf(&mut printed).await? > 0 {
        if printed.len() > 2 * MAX_OUTPUT {
            printed.drain(..printed.len() - MAX_OUTPUT);
        }
    }
    Ok(String::from_utf8_lossy(&printed).into_owned())
}

fn tail(printed: &str) -> String {
    let lines: Vec<&str> = printed.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let printed = lines.join("; ");
    let skip = printed.chars().count().saturating_sub(MAX_SHOWN);
    printed.chars().skip(skip).collect()
}

/// Identifies the file that a path names: another file has another stamp.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct FileStamp {
    pub(super) path: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
    modified: i64,
    modified_ns: i64,
}

impl FileStamp {
    pub(super) fn of(path: &Path) -> Option<FileStamp> {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(path).ok()?;
        Some(FileStamp {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_envoy_got_dynamically_is_added_to_the_bootstrap_but_for_what_has_a_key_in_it() {
        let bootstrap = json!({"static_resources": {"clusters": [{"name": "xds"}]}});
        let dump = json!({"configs": [
            {"@type": "x", "bootstrap": {}},
            {"dynamic_active_clusters": [
                {"cluster": {"@type": "c", "name": "orders"}},
                {"cluster": {"@type": "c", "name": "secret", "key": "[redacted]"}},
            ]},
            {"dynamic_listeners": [
                {"name": "in", "active_state": {"listener": {"@type": "l", "name": "in"}}},
                {"name": "never", "error_state": {}},
            ]},
        ]});
        assert_eq!(
            with_resources(bootstrap, &dump),
            json!({"static_resources": {
                "clusters": [{"name": "xds"}, {"name": "orders"}],
                "listeners": [{"name": "in"}],
            }})
        );
    }

    #[tokio::test]
    async fn the_real_envoy_says_who_it_is_and_what_is_none_is_told() {
        let envoy = vmesh_testkit::envoy::find().unwrap();
        let binary = query_versions(&envoy).await.unwrap();
        assert_eq!(binary.version, vmesh_proto::ENVOY_VERSION);
        assert!(binary.hot_restart.is_some_and(|version| is_hot_restart_version(&version)));
        assert!(
            query_versions(Path::new("/bin/false")).await.unwrap_err().reason.starts_with("exit status: 1: ")
        );
        assert!(
            query_versions(Path::new("/no/such"))
                .await
                .unwrap_err()
                .reason
                .starts_with("could not start /no/such: ")
        );
        let printed = query_versions(Path::new("/bin/true")).await.unwrap_err().reason;
        assert!(printed.starts_with("/bin/true is no Envoy: to `--version` it says `true "), "{printed}");
    }

    #[tokio::test]
    async fn what_is_found_in_the_middle_of_an_installation_is_no_envoy_and_says_why() {
        use std::os::unix::fs::PermissionsExt;
        let dir = vmesh_testkit::tempdir().unwrap();
        let path = dir.join("envoy");
        let whole = std::fs::read(vmesh_testkit::envoy::find().unwrap()).unwrap();
        let mut foreign = whole.clone();
        // `e_machine` of elf(5), set to a value that no machine has.
        foreign[18..20].copy_from_slice(&[0xfe, 0xca]);
        let check = async |bytes: &[u8], mode: u32, expected: &str| {
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let printed = query_versions(&path).await.unwrap_err().reason;
            assert!(printed.contains(expected), "{expected}: {printed}");
        };
        check(&whole, 0o644, "Permission denied").await;
        check(&foreign, 0o755, "envoy cannot be run on this machine: could not start ").await;
        check(&foreign, 0o755, "Exec format error").await;
        check(&whole[..10], 0o755, "Exec format error").await;
        check(&whole[..whole.len() / 2], 0o755, "signal: ").await;
        check(b"", 0o755, "").await;
        let _written = std::fs::File::options().append(true).open(&path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let printed = query_versions(&path).await.unwrap_err().reason;
        assert!(printed.contains("Text file busy"), "{printed}");
    }

    #[tokio::test]
    async fn of_one_that_never_stops_talking_only_the_last_words_are_kept() {
        let printed =
            run_to_end(Path::new("/usr/bin/yes"), &["word".to_owned()], Duration::from_secs(1)).await;
        assert_eq!(printed.unwrap_err(), "/usr/bin/yes word hangs: no end after 1 s");
        let much = tokio::io::repeat(b'a').take(64 << 20).chain(&b"at last"[..]);
        let printed = read_tail(Some(much)).await.unwrap();
        assert!(printed.ends_with("aat last") && printed.len() <= 2 * MAX_OUTPUT, "{}", printed.len());
    }
}
