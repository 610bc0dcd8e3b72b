//! The protocol between vmesh and a plug-in: version 1, one JSON object per line.
//!
//! vmesh writes to the program's standard input:
//!
//! ```json
//! {"type": "hello", "protocol": 1, "source": "plugin:dns-srv"}
//! {"type": "confirm", "id": 1, "services": ["orders"]}
//! ```
//!
//! The program prints to its standard output, whenever it likes:
//!
//! ```json
//! {"type": "view", "services": [{"service": "orders", "protocol": "http", "endpoints": ["10.0.1.11:8080"]}]}
//! {"type": "view", "confirms": 1, "services": []}
//! {"type": "alive"}
//! {"type": "failed", "message": "the registry answers 503"}
//! ```
//!
//! A view is complete: it lists all services, in the native format of files. `confirm` asks the program to
//! read its registry again with the strongest consistency it offers, and to answer with a view whose
//! `confirms` is the `id` of the request. The standard error of the program goes to the log. The program ends
//! when its standard input is closed.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;
use vmesh_model::yaml::{self, Node, short};
use vmesh_model::{Place, ServiceName};
use vmesh_text::printable;

use crate::format::{Input, ParseResult, native};

/// The version of the protocol.
const VERSION: u32 = 1;

/// A line from the program.
#[derive(Debug)]
pub enum PluginLine {
    View(PluginView),
    /// The last view is still current.
    Alive,
    /// The program could not read its registry.
    Failed(String),
}

/// A complete view of the registry.
#[derive(Debug)]
pub struct PluginView {
    pub parsed: ParseResult,
    /// The ID of the confirmation request that this view answers.
    pub confirms: Option<u64>,
}

/// Returns the first line to a program.
pub fn hello(source: &str) -> String {
    json!({"type": "hello", "protocol": VERSION, "source": source}).to_string() + "\n"
}

/// Returns the line that asks for `services` to be read again.
pub fn confirm(id: u64, services: &BTreeSet<ServiceName>) -> String {
    json!({"type": "confirm", "id": id, "services": services}).to_string() + "\n"
}

/// Parses a line; `source` is used for places. The error describes what is wrong with the line. The error and
/// the reason of a failure are escaped, so both are safe for terminals and logs.
pub fn read(source: &Arc<str>, line: &str) -> Result<PluginLine, String> {
    match read_line(source, line) {
        Ok(PluginLine::Failed(reason)) => Ok(PluginLine::Failed(printable(&reason).into_owned())),
        Ok(line) => Ok(line),
        Err(wrong) => Err(printable(&wrong).into_owned()),
    }
}

fn read_line(source: &Arc<str>, line: &str) -> Result<PluginLine, String> {
    // Only objects are accepted: YAML, of which JSON is a subset, would take any text for a value.
    if !line.trim_start().starts_with('{') {
        return Err(format!("`{}` is not a JSON object: logs belong on standard error", short(line.trim())));
    }
    let document = yaml::parse(source, source, line).into_iter().next();
    let Some(document) = document else { return Err("the line is empty".to_owned()) };
    if let Some(problem) = document.problems.first() {
        return Err(format!("column {}: {}", problem.place.column, problem.message));
    }
    let Some(root) = document.root else { return Err("the line is empty".to_owned()) };
    let line_type = root.get("type").and_then(|node| node.text()).unwrap_or_default();
    match line_type {
        "view" => view(source, line, &root),
        "alive" => Ok(PluginLine::Alive),
        "failed" => {
            let message = root.get("message").and_then(|node| node.text()).unwrap_or_default();
            Ok(PluginLine::Failed(if message.is_empty() {
                "it gives no reason".to_owned()
            } else {
                message.to_owned()
            }))
        }
        other => Err(format!("`type` is `{}`: one of `view`, `alive`, `failed`", short(other))),
    }
}

fn view(source: &Arc<str>, line: &str, root: &Node) -> Result<PluginLine, String> {
    let Some(services) = root.get("services").and_then(|node| node.items()) else {
        return Err(
            "a view without `services`, a list: all that the registry has, `[]` for nothing".to_owned()
        );
    };
    let confirms = match root.get("confirms") {
        None => None,
        Some(node) => {
            let text = node.text().unwrap_or_default();
            Some(
                text.parse()
                    .map_err(|_| format!("`confirms` is `{}`: the `id` that was asked", short(text)))?,
            )
        }
    };
    let nodes: Vec<&Node> = services.iter().map(|node| &**node).collect();
    let mut parsed = native::parse_nodes(&Input::new(source, "", line, true), &nodes, true);
    if parsed.has_failed() {
        let why: Vec<_> = parsed.problems.iter().take(3).map(ToString::to_string).collect();
        return Err(why.join("; "));
    }
    // The column within a line is useless to an operator, and would make every service after a change differ.
    let place = Place::file(source.clone());
    for service in &mut parsed.services {
        service.place = place.clone();
        service.endpoints.iter_mut().for_each(|endpoint| endpoint.place = place.clone());
    }
    Ok(PluginLine::View(PluginView { parsed, confirms }))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(line: &str, expected: Expect) {
        let shown = match read(&"plugin:x".into(), line) {
            Ok(PluginLine::View(PluginView { parsed, confirms })) => {
                let services = parsed.services.iter().map(|service| {
                    let endpoints: Vec<_> = service.endpoints.iter().map(|e| e.address.to_string()).collect();
                    format!("{} {endpoints:?}\n", service.name)
                });
                let problems = parsed.problems.iter().map(|problem| format!("{problem}\n"));
                let head = confirms.map_or("view\n".to_owned(), |id| format!("view that confirms {id}\n"));
                head + &services.chain(problems).collect::<String>()
            }
            Ok(PluginLine::Alive) => "alive\n".to_owned(),
            Ok(PluginLine::Failed(why)) => format!("failed: {why}\n"),
            Err(why) => format!("error: {why}\n"),
        };
        expected.assert_eq(&shown);
    }

    #[test]
    fn a_line_is_a_view_a_sign_of_life_or_a_failure() {
        check(
            r#"{"type":"view","services":[{"service":"orders","endpoints":["10.0.0.1:80",{"address":"[::1]:80"}]},{"service":"empty","endpoints":[]}]}"#,
            expect![[r#"
                view
                orders ["10.0.0.1:80", "[::1]:80"]
                empty []
            "#]],
        );
        check(
            r#"{"type":"view","confirms":7,"services":[]}"#,
            expect![[r#"
                view that confirms 7
            "#]],
        );
        check(
            r#"{"type":"alive","more":"is ignored"}"#,
            expect![[r#"
            alive
        "#]],
        );
        check(
            r#"{"type":"failed","message":"503"}"#,
            expect![[r#"
            failed: 503
        "#]],
        );
    }

    #[test]
    fn a_line_that_makes_no_sense_says_what_is_wrong_with_it() {
        check(
            "connecting to the registry...",
            expect![[r#"
            error: `connecting to the registry...` is not a JSON object: logs belong on standard error
        "#]],
        );
        check(
            "",
            expect![[r#"
            error: `` is not a JSON object: logs belong on standard error
        "#]],
        );
        check(
            r#"{"type":"view""#,
            expect![[r#"
            error: column 1: this `{` is never closed
        "#]],
        );
        check(
            r#"{"type":"veiw"}"#,
            expect![[r#"
            error: `type` is `veiw`: one of `view`, `alive`, `failed`
        "#]],
        );
        check(
            r#"{"type":"view","services":{"orders":[]}}"#,
            expect![[r#"
            error: a view without `services`, a list: all that the registry has, `[]` for nothing
        "#]],
        );
        check(
            r#"{"type":"view","services":[{"endpoints":[]}]}"#,
            expect![[r#"
            error: plugin:x:1:28: `service` is missing: in a file of several services each needs its name
        "#]],
        );
    }

    #[test]
    fn a_bad_endpoint_costs_that_endpoint() {
        check(
            r#"{"type":"view","services":[{"service":"a","endpoints":["10.0.0.1:80","10.0.0.2"]}]}"#,
            expect![[r#"
                view
                a ["10.0.0.1:80"]
                plugin:x:1:70: `10.0.0.2` has no port: write `10.0.0.2:8080`, an address and a port; this endpoint is left out
            "#]],
        );
    }
}
