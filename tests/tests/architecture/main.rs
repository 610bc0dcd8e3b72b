//! Checks the code map of `ARCHITECTURE.md`: no crate depends on what it must not know.
//!
//! Only normal dependencies of `cargo tree` count: a test may use what the code may not.

#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on ends")]

mod circles;
mod purity;
mod words;

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

/// The forbidden dependencies of each crate.
const NEVER: &[(&str, &[&str])] = &[
    ("vmesh-backoff", &["tokio", "vmesh-model"]),
    ("vmesh-proto", &["tokio", "tonic", "hyper"]),
    ("vmesh-model", &["tokio", "vmesh-proto", "vmesh-xds", "notify", "hyper"]),
    ("vmesh-consul", &["vmesh-model", "vmesh-daemon", "vmesh-discovery", "zookeeper-client"]),
    ("vmesh-zookeeper", &["vmesh-model", "vmesh-daemon", "vmesh-discovery", "vmesh-consul"]),
    ("vmesh-discovery", &["vmesh-proto", "vmesh-xds", "vmesh-catalog", "vmesh-compile", "tonic"]),
    ("vmesh-capture", &["vmesh-xds", "vmesh-proto"]),
    ("vmesh-dns", &["vmesh-xds", "vmesh-proto", "vmesh-discovery"]),
    ("vmesh-identity", &["vmesh-xds", "vmesh-proto", "vmesh-daemon", "tokio"]),
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

/// zookeeper-client is heavy and its watches are unreliable, so only one crate uses it.
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

/// Pure crates get the time and all text as arguments. A clock that they read themselves could not be
/// controlled by a test.
#[test]
fn no_pure_crate_reads_a_clock() {
    let crates = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates");
    // The root module, the features whose modules are drivers with sockets, and the least number of files.
    let pure: &[(&str, &[&str], usize)] = &[
        ("vmesh-backoff/src/lib.rs", &[], 1),
        ("vmesh-model/src/lib.rs", &[], 12),
        ("vmesh-catalog/src/lib.rs", &[], 4),
        ("vmesh-identity/src/lib.rs", &[], 7),
        ("vmesh-compile/src/lib.rs", &[], 12),
        ("vmesh-xds/src/lib.rs", &["server", "client"], 10),
        ("vmesh-dns/src/answer.rs", &[], 1),
        ("vmesh-dns/src/table.rs", &[], 1),
        ("vmesh-discovery/src/guard.rs", &[], 3),
        ("vmesh-discovery/src/format.rs", &[], 5),
        ("vmesh-discovery/src/assemble.rs", &[], 1),
        ("vmesh-agent/src/supervisor/plan.rs", &[], 1),
    ];
    for (start, drivers, files) in pure {
        let reading = purity::read(&std::path::Path::new(crates).join(start), drivers);
        assert!(reading.impure.is_empty(), "{start} reads the outside world:\n{}", reading.impure.join("\n"));
        assert!(reading.files.len() >= *files, "{start}: only {:?} were read", reading.files);
        assert!(reading.items > 5 * files, "{start}: only {} items were read", reading.items);
    }
}

/// Tests the check itself with code that it must refuse and code that it must accept.
#[test]
fn the_check_for_clocks_sees_them_wherever_they_stand() {
    let refused = [
        ("after a test module", "#[cfg(test)] mod tests { } fn f() { std::time::Instant::now(); }"),
        ("after an import for tests", "#[cfg(test)] use a::b; fn f() -> Instant { Instant::now() }"),
        ("under another name", "use std::time::Instant as Clock; fn f() { Clock::now(); }"),
        ("as a function value", "fn f() { a.unwrap_or_else(Instant::now); }"),
        ("without naming it", "fn f(since: Instant) { since.elapsed(); }"),
        ("inside a macro", "fn f() { assert!(true, \"{:?}\", SystemTime::now()); }"),
        ("in a method", "impl A { fn f() { let x = || std::fs::read(\"a\"); } }"),
        ("imported in a group", "use std::{fmt, fs::{self, File}};"),
        ("in an inner module", "mod inner { pub fn f() { std::env::var(\"A\"); } }"),
        ("a socket", "fn f() { std::net::TcpStream::connect(a); }"),
    ];
    for (where_it_stands, code) in refused {
        assert!(!purity::read_text(code).is_empty(), "{where_it_stands}: {code}");
    }
    let accepted = [
        "use std::net::{IpAddr, SocketAddr}; fn f(now: Instant) -> Duration { now.duration_since(a) }",
        "/// Instant::now() is not called.\nfn f() { let s = \"std::fs::read\"; }",
        "#[cfg(test)] mod tests { fn f() { Instant::now(); } }",
    ];
    for code in accepted {
        assert_eq!(purity::read_text(code), Vec::<String>::new(), "{code}");
    }
}

/// A reader who meets a name or a first line knows what it stands for. `CONTRIBUTING.md` has the rules.
#[test]
fn names_of_types_and_doc_comments_name_their_subject() {
    let root = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let crates = std::fs::read_dir(root.join("crates")).expect("crates");
    let crates = crates.map(|entry| entry.expect("an entry").path());
    let (mut faults, mut documented, mut types) = (Vec::new(), 0, 0);
    for directory in crates.chain([root.join("xtask"), root.join("tests")]) {
        let wording = words::read(&directory);
        types += wording.types.len();
        // The modules of the test kit are named where they are used: `consul::Options`, `netns::Host`.
        let is_named_by_module = directory.ends_with("vmesh-testkit");
        let shared = if is_named_by_module { Vec::new() } else { wording.shared_names() };
        let shared = shared.into_iter().map(|names| format!("one name for several types: {names}"));
        let place =
            |fault: String| format!("{}: {fault}", directory.file_name().unwrap_or_default().display());
        faults.extend(wording.faults.iter().cloned().chain(shared).map(place));
        documented += wording.documented;
    }
    assert!(documented > 1_000, "only {documented} doc comments were read");
    assert!(types > 1_000, "only {types} types were read");
    assert!(faults.is_empty(), "{} faults, see CONTRIBUTING.md:\n{}", faults.len(), faults.join("\n"));
}

/// The check itself, on code that it must refuse and on code that it must not.
#[test]
fn the_check_of_words_sees_faults_wherever_they_stand() {
    let refused = [
        ("a question word", "struct What;"),
        ("in a module for tests", "#[cfg(test)] mod tests { enum Said {} }"),
        ("in a function", "fn f() { struct Held; }"),
        ("a clause", "/// Whether it is gone.\npub fn is_gone() {}"),
        ("a pronoun", "/// It waits.\npub struct Waiter;"),
        ("of a method", "impl A { /// What is left.\npub fn left(&self) {} }"),
        ("of a method of a trait", "pub trait A { /// Whom it concerns.\nfn whom(&self); }"),
        ("of a field", "pub struct A { /// So many.\npub count: u32 }"),
        ("of a variant", "pub enum A { /// Not known.\nUnknown }"),
    ];
    for (place, code) in refused {
        assert_eq!(words::read_text(code).faults.len(), 1, "{place}: {code}");
    }
    let twice = words::read_text("struct Entry; mod inner { enum Entry {} }");
    assert_eq!(twice.shared_names(), ["`Entry`: text.rs:1, text.rs:1"]);
    let accepted = [
        "/// Returns the limit.\npub fn limit() {}",
        "/// The limit of open streams.\npub const LIMIT: u32 = 1;",
        "/// What a private item says is checked by readers.\nfn f() {}",
        "struct Entry; #[cfg(test)] mod tests { struct Entry; }",
    ];
    for code in accepted {
        let wording = words::read_text(code);
        assert!(wording.faults.is_empty() && wording.shared_names().is_empty(), "{code}: {wording:?}");
    }
}

/// Crates with top modules that import each other in a circle, to be mended. No crate may be added.
const WITH_CIRCLES: &[&str] =
    &["vmesh-agent", "vmesh-capture", "vmesh-compile", "vmesh-control", "vmesh-identity", "vmesh-net"];

/// A reader can start at the modules that import nothing, and understands each module without the later ones.
#[test]
fn no_module_imports_itself_over_others() {
    let crates = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates");
    let mut circles = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(crates).expect("crates") {
        let directory = entry.expect("an entry").path();
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let imports = circles::read(&directory.join("src"));
        assert!(name != "vmesh-discovery" || imports.modules() > 10, "{imports:?}");
        if let Some(circle) = imports.circle().filter(|_| !WITH_CIRCLES.contains(&&*name)) {
            circles.insert(name, circle);
        }
    }
    assert!(circles.is_empty(), "{circles:#?}");
}

#[test]
fn the_check_for_circles_sees_them_however_they_are_written() {
    let circle = |a: &str, b: &str| {
        let mut imports = circles::Imports::default();
        imports.add("a", a, true);
        imports.add("b", b, true);
        imports.circle()
    };
    let back = "use crate::a::X;";
    for there in [
        "use crate::b::Y;",
        "use super::b;",
        "use crate::{c, b::{Y, Z}};",
        "fn f() { crate::b::f(); }",
        "mod inner { pub use crate::b::*; }",
    ] {
        assert_eq!(circle(there, back).as_deref(), Some("a -> b -> a"), "{there}");
    }
    for there in ["use crate::c::Y;", "use other::b;", "#[cfg(test)] mod tests { use crate::b; }"] {
        assert_eq!(circle(there, back), None, "{there}");
    }
}
