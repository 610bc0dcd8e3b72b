//! The documentation is correct: its configurations are accepted by the programs that read them, and its
//! commands run.

#![expect(clippy::expect_used, reason = "a test that cannot go on ends")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmesh_model::load::{DocumentFile, Library};
use vmesh_testkit::Result;
use vmesh_testkit::api::Api;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::place::{Loopback, tempdir};
use vmesh_testkit::process::binary;
use vmesh_tests::Mesh;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A fenced block with its position, the words after the fence, and its text.
struct Block {
    place: String,
    info: String,
    text: String,
}

fn pages() -> Vec<PathBuf> {
    let docs = ["docs", "docs/internals"].into_iter().flat_map(|directory| {
        let entries = fs::read_dir(root().join(directory)).expect("a directory");
        entries.map(|entry| entry.expect("an entry").path())
    });
    let at_root = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|page| root().join(page));
    let mut pages: Vec<_> = docs.chain(at_root).collect();
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "md"));
    pages
}

fn blocks() -> Vec<Block> {
    let mut blocks = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).expect("a page");
        let mut open: Option<Block> = None;
        let mut indent = "";
        for (number, line) in text.lines().enumerate() {
            // A block inside a list is indented like the list.
            match (line.trim_start().strip_prefix("```"), &mut open) {
                (Some(info), None) => {
                    let place = format!("{}:{}", page.display(), number + 1);
                    indent = line.split('`').next().unwrap_or_default();
                    open = Some(Block { place, info: info.to_owned(), text: String::new() });
                }
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (None, Some(block)) => {
                    block.text.push_str(&format!("{}\n", line.strip_prefix(indent).unwrap_or(line)));
                }
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{}: a block that does not end", page.display());
    }
    assert!(blocks.len() > 15, "the documentation is gone");
    blocks
}

#[test]
fn every_configuration_shown_is_accepted_by_what_reads_it() {
    let dir = tempdir().expect("a directory");
    for Block { place, info, text } in blocks() {
        let program = match info.as_str() {
            "yaml control" => "vmesh-control",
            "yaml agent" => "vmesh-agent",
            "yaml documents" => {
                let file = DocumentFile { path: &place, content: Ok(text.as_bytes()) };
                let (documents, problems) = Library::default().update(&[file]);
                assert!(problems.is_empty() && !documents.is_empty(), "{place}: {problems:?}");
                continue;
            }
            // The running control plane below reads these.
            "yaml services" => continue,
            "json" => {
                serde_json::from_str::<serde_json::Value>(&text)
                    .unwrap_or_else(|error| panic!("{place}: {error}"));
                continue;
            }
            "console" | "text" | "" => continue,
            other => panic!("{place}: a block of `{other}`, which no test reads"),
        };
        let file = dir.join("config.yaml");
        fs::write(&file, text).expect("written");
        let mut check = Command::new(binary(program).expect("built"));
        let output = check.arg("--config").arg(&file).arg("--check").output().expect("it runs");
        // The example's directory of documents does not exist here, which is a problem (1) and not an error
        // (64).
        let fine =
            output.status.code().is_some_and(|code| code == 0 || (code == 1 && program == "vmesh-control"));
        assert!(fine, "{place}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn every_example_is_accepted() {
    let quickstart = root().join("examples/quickstart");
    let mut agents = 0;
    let check = |program: &str, config: &Path| {
        let mut check = Command::new(binary(program).expect("built"));
        let output = check.arg("--config").arg(config).arg("--check").current_dir(&quickstart).output();
        let output = output.expect("it runs");
        assert!(output.status.success(), "{}: {}", config.display(), String::from_utf8_lossy(&output.stderr));
    };
    check("vmesh-control", Path::new("control.yaml"));
    for entry in fs::read_dir(quickstart.join("agents")).expect("agents") {
        check("vmesh-agent", &entry.expect("an entry").path());
        agents += 1;
    }
    assert!(agents >= 3, "the quickstart has lost its agents");
}

#[test]
fn every_link_leads_to_a_page_and_a_heading_that_are_there() {
    for page in pages() {
        let text = fs::read_to_string(&page).expect("a page");
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let to = if file.is_empty() { page.clone() } else { page.with_file_name(file) };
            let target = fs::read_to_string(&to);
            let target = target.unwrap_or_else(|error| panic!("{}: {link}: {error}", page.display()));
            let is_there = anchor.is_empty() || headings(&target).any(|heading| heading == anchor);
            assert!(is_there, "{}: there is no heading for {link}", page.display());
        }
    }
}

/// Returns the headings as they appear in links: lower-case letters and digits, joined by dashes.
fn headings(text: &str) -> impl Iterator<Item = String> {
    text.lines().filter(|line| line.starts_with('#')).map(|line| {
        let kept = line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
    })
}

/// The commands run against the mesh that the README describes.
#[tokio::test(flavor = "multi_thread")]
async fn every_command_shown_runs_and_every_service_file_is_read() -> Result<()> {
    let place = Loopback::unique()?;
    let app = HttpApp::start("a", "v1", std::net::SocketAddr::new(place.ip(), place.port()?))?;
    let services = format!("service: orders\nprotocol: http\nendpoints: [\"{}\"]\n", app.address());
    // The runbook uses a source of this name, whatever its content is.
    let sources = "  - file: {path: services.d}\n  - file: {path: consul.yaml, name: consul}\n";
    let files = [("services.d/orders.yaml", services.as_str()), ("consul.yaml", "[]\n")];
    let mut mesh = Mesh::prepare_on(sources, "documents: {dir: mesh.d}\n", &files)?;
    mesh.start_control().await?;
    mesh.agent("web-1", &["orders"], "").await?;
    mesh.synced("web-1").await?;

    let mut ran = BTreeSet::new();
    for Block { place, info, text } in blocks() {
        if info == "yaml services" {
            let other = Mesh::start(&[("services.d/shown.yaml", &text)]).await?;
            assert_eq!(other.problems().await?, Vec::<String>::new(), "{place}");
            let services = other.get("/api/v1/services").await?;
            assert_ne!(services["services"].as_array().map(Vec::len), Some(0), "{place}");
        }
        if info != "console" {
            continue;
        }
        for line in text.lines() {
            let command =
                line.strip_prefix("$ ").unwrap_or_else(|| panic!("{place}: `{line}` is no command"));
            let words: Vec<_> = command.split_whitespace().collect();
            match words.as_slice() {
                ["vmeshctl", args @ ..] => {
                    // The built-in address is replaced by the socket of this mesh, and the example's instance
                    // by an existing one.
                    let socket = format!("unix:{}", mesh.path("state/control/api.sock").display());
                    let here = |word: &&'_ str| match *word {
                        "unix:/var/lib/vmesh-control/api.sock" => socket.clone(),
                        "10.0.1.17:8080" => app.address().to_string(),
                        word => word.to_owned(),
                    };
                    let here: Vec<_> = args.iter().map(here).collect();
                    let output = mesh.ctl(&here.iter().map(String::as_str).collect::<Vec<_>>())?;
                    if args.contains(&"accept") {
                        // No removal is held in a healthy source. The test can only show that the command is
                        // accepted.
                        let message = String::from_utf8_lossy(&output.stderr);
                        let is_nothing = message.contains("nothing of `") && output.status.code() == Some(4);
                        assert!(is_nothing, "{place}: `{command}`: {message}");
                        ran.insert(command.to_owned());
                        continue;
                    }
                    let text = String::from_utf8_lossy(&output.stdout);
                    assert!(output.status.success(), "{place}: `{command}`: {text}");
                    assert!(!text.trim().is_empty(), "{place}: `{command}` says nothing");
                }
                ["vmesh-control", "--config", "control.yaml", "--check"] => {
                    let mut check = Command::new(binary("vmesh-control")?);
                    check.args(["--config", "control.yaml", "--check"]).current_dir(mesh.path("."));
                    assert!(check.status().expect("it runs").success(), "{place}");
                }
                ["vmesh-agent", "--config", "agent.yaml", "--check"] => {
                    let mut check = Command::new(binary("vmesh-agent")?);
                    check.args(["--config", "agents/web-1.yaml", "--check"]).current_dir(mesh.path("."));
                    assert!(check.status().expect("it runs").success(), "{place}");
                }
                // `.ci/run` runs the tests themselves and the commands beside them. A benchmark is not a
                // test.
                ["cargo", "xtask", "demo" | "test" | "deny" | "fuzz", ..]
                | ["cargo", "xtask", "bench", "fleet" | "catalogue" | "discovery", ..] => {}
                other => panic!("{place}: nothing runs {other:?}"),
            }
            ran.insert(command.to_owned());
        }
    }
    assert!(ran.len() >= 10, "{ran:?}");

    let control = Api(mesh.api).text("/metrics").await?;
    let agent = Api(mesh.agent_api("web-1")?).text("/metrics").await?;
    let known: BTreeSet<_> = [&control, &agent].into_iter().flat_map(|text| words(text)).collect();
    let page = fs::read_to_string(root().join("docs/operations.md")).expect("a page");
    let named: BTreeSet<_> = words(&page).filter(|word| word.starts_with("vmesh_")).collect();
    let named: BTreeSet<_> =
        named.into_iter().map(|name| name.strip_suffix("_total").unwrap_or(name)).collect();
    // The name of a crate in a log filter is not a metric.
    let unknown: Vec<_> = named.difference(&known).filter(|name| **name != "vmesh_discovery").collect();
    assert!(unknown.is_empty() && named.len() >= 20, "no daemon has a metric {unknown:?}");
    Ok(())
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_codes_are_those_of_the_documentation() -> Result<()> {
    let services = "service: orders\nprotocol: http\nendpoints: [\"127.0.0.1:1\"]\n";
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", services)]).await?;
    let code = |mesh: &Mesh, args: &[&str]| Ok::<_, vmesh_testkit::Failed>(mesh.ctl(args)?.status.code());
    assert_eq!(code(&mesh, &["problems"])?, Some(0));
    assert_eq!(code(&mesh, &["services", "ordres"])?, Some(4));
    assert_eq!(code(&mesh, &["explain", "orders", "--from", "nobody"])?, Some(4));
    assert_eq!(code(&mesh, &["forget", "nobody"])?, Some(1));
    assert_eq!(code(&mesh, &["nods"])?, Some(64));
    mesh.write("mesh.d/bad.yaml", "kind: Servce\n")?;
    mesh.problem("did you mean `Service`?").await?;
    assert_eq!(code(&mesh, &["problems"])?, Some(3));
    assert_eq!(code(&mesh, &["problems", "--json"])?, Some(3));
    mesh.control()?.kill()?;
    let output = mesh.ctl(&["status"])?;
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("is vmesh-control running there?") && message.contains("because:"), "{message}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_forgotten_through_the_unix_socket_once_it_is_offline() -> Result<()> {
    let mut mesh = Mesh::start(&[]).await?;
    mesh.agent("web-1", &[], "").await?;
    mesh.synced("web-1").await?;
    let socket = format!("unix:{}", mesh.path("state/control/api.sock").display());
    let forget = ["--api", &socket, "forget", "web-1"];
    let refused = mesh.ctl(&forget)?;
    assert!(
        refused.status.code() == Some(1)
            && String::from_utf8_lossy(&refused.stderr).contains("is connected: stop its agent first"),
        "{refused:?}"
    );
    let unknown = mesh.ctl(&["--api", &socket, "forget", "nobody"])?;
    assert_eq!(unknown.status.code(), Some(4), "{unknown:?}");
    mesh.agent_daemon("web-1")?.terminate(vmesh_tests::BOUND).await?;
    vmesh_testkit::wait_for("web-1 to be forgotten", vmesh_tests::BOUND, async || {
        let output = mesh.ctl(&forget).map_err(|failed| failed.to_string())?;
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    })
    .await?;
    vmesh_testkit::wait_for("no node", vmesh_tests::BOUND, async || {
        let nodes = mesh.get("/api/v1/nodes").await.map_err(|failed| failed.to_string())?;
        if nodes["nodes"].as_array().is_some_and(Vec::is_empty) { Ok(()) } else { Err(nodes.to_string()) }
    })
    .await
}

/// The test that proves an invariant must exist.
#[test]
fn every_test_that_the_architecture_names_is_there() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let mut sources = String::new();
    let mut directories = vec![root().join("crates"), root().join("tests")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                sources.push_str(&fs::read_to_string(&path).expect("a source"));
            }
        }
    }
    let names =
        page.split('`').skip(1).step_by(2).filter_map(|code| code.rsplit_once("::").map(|(_, name)| name));
    let tests: Vec<_> = names.filter(|name| name.matches('_').count() >= 3).collect();
    assert!(tests.len() >= 8, "{tests:?}");
    for test in tests {
        assert!(
            sources.contains(&format!("fn {test}(")),
            "ARCHITECTURE.md names `{test}`, which is not there"
        );
    }
}
