//! The map of `ARCHITECTURE.md`, proved: what a crate must never know is not among its dependencies.
//!
//! Normal dependencies only, read from `cargo tree`: a test may use what the code may not.

#![expect(clippy::expect_used, reason = "a test that cannot go on ends")]

use std::collections::BTreeSet;
use std::process::Command;

fn dependencies(of: &str) -> BTreeSet<String> {
    let tree = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--locked",
            "--package",
            of,
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .expect("cargo tree runs");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let text = String::from_utf8(tree.stdout).expect("UTF-8");
    let names: BTreeSet<_> =
        text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect();
    assert!(names.contains(of), "cargo tree does not know {of}");
    names
}

/// The crate, and what it must never know.
const NEVER: &[(&str, &[&str])] = &[
    ("vmesh-proto", &["tokio", "tonic", "hyper"]),
    ("vmesh-model", &["tokio", "vmesh-proto", "vmesh-xds", "notify", "hyper"]),
    ("vmesh-consul", &["vmesh-model", "vmesh-daemon", "vmesh-discovery", "zookeeper-client"]),
    ("vmesh-zookeeper", &["vmesh-model", "vmesh-daemon", "vmesh-discovery", "vmesh-consul"]),
    ("vmesh-discovery", &["vmesh-proto", "vmesh-xds", "vmesh-catalog", "vmesh-compile", "tonic"]),
    ("vmesh-capture", &["vmesh-xds", "vmesh-proto"]),
    ("vmesh-dns", &["vmesh-xds", "vmesh-proto", "vmesh-discovery"]),
    ("vmesh-net", &["vmesh-xds", "vmesh-proto", "vmesh-agent", "vmesh-dns", "tonic", "hyper-rustls"]),
    ("vmesh-catalog", &["vmesh-proto", "vmesh-xds", "tonic", "tokio"]),
    ("vmesh-compile", &["tokio", "tonic", "hyper", "notify", "vmesh-discovery"]),
    ("vmesh-xds", &["vmesh-model", "vmesh-catalog", "vmesh-compile", "tokio", "tonic"]),
    ("vmesh-agent", &["vmesh-discovery", "vmesh-catalog", "vmesh-compile", "notify"]),
    ("vmesh-control", &["vmesh-agent"]),
    ("vmeshctl", &["vmesh-discovery", "vmesh-compile", "vmesh-xds", "vmesh-proto", "tonic"]),
];

#[test]
fn no_crate_knows_what_it_must_never_know() {
    for (of, never) in NEVER {
        let known = dependencies(of);
        for unwanted in *never {
            assert!(!known.contains(*unwanted), "{of} depends on {unwanted}; see ARCHITECTURE.md");
        }
    }
}

/// zookeeper-client is heavy, and its watches are not to be trusted: one crate knows how.
#[test]
fn one_crate_names_the_zookeeper_client() {
    for crate_dir in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../crates")).expect("crates") {
        let dir = crate_dir.expect("an entry").path();
        let manifest = std::fs::read_to_string(dir.join("Cargo.toml")).expect("a manifest");
        let is_it = dir.ends_with("vmesh-zookeeper");
        assert_eq!(manifest.contains("zookeeper-client"), is_it, "{}", dir.display());
    }
}

#[test]
fn one_tls_and_no_c_library_beyond_it() {
    for of in ["vmesh-control", "vmesh-agent", "vmeshctl"] {
        let known = dependencies(of);
        for unwanted in ["openssl-sys", "native-tls", "ring", "serde_yaml", "serde_yml", "libz-sys"] {
            assert!(!known.contains(unwanted), "{of} depends on {unwanted}; see deny.toml");
        }
    }
}

/// The invariant of `house-style.md`'s pages: a clock that is read in the middle is a clock that no test can turn.
#[test]
fn no_pure_crate_reads_a_clock() {
    let crates = ["vmesh-model", "vmesh-catalog", "vmesh-compile", "vmesh-xds"].map(|of| format!("{of}/src"));
    // What judges and what reads formats, of a crate whose rest is I/O.
    let parts = ["vmesh-discovery/src/guard", "vmesh-discovery/src/format"].map(str::to_owned);
    for of in crates.into_iter().chain(parts) {
        let source = format!("{}/../crates/{of}", env!("CARGO_MANIFEST_DIR"));
        for file in rust_files(source.as_ref()) {
            // The drivers are the edge, and behind features; tests may turn a clock as they like.
            if file
                .components()
                .any(|part| matches!(part.as_os_str().to_str(), Some("server" | "client" | "tests")))
            {
                continue;
            }
            let text = std::fs::read_to_string(&file).expect("a source file");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for clock in ["Instant::now", "SystemTime::now", "std::fs::", "std::net::Tcp", "std::env::var"] {
                let driver = file.file_name().is_some_and(|name| name == "client.rs" || name == "tests.rs");
                assert!(driver || !code.contains(clock), "{} uses {clock}", file.display());
            }
        }
    }
}

fn rust_files(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a source directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
