mod access;
mod documents;
mod library;
mod values;

use expect_test::Expect;

use super::*;

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("{problem}\n")).collect()
}

/// Splits a text into files. Each begins with a line `== path`.
fn files(text: &str) -> Vec<(&str, &str)> {
    let mut files = Vec::new();
    for part in text.trim_start().split("== ").skip(1) {
        let (path, content) = part.split_once('\n').unwrap();
        files.push((path, content));
    }
    files
}

fn update(library: &mut Library, text: &str) -> (Arc<Documents>, String) {
    let files = files(text);
    let files: Vec<_> = files
        .iter()
        .map(|(path, content)| DocumentFile {
            path,
            content: content
                .strip_prefix("unreadable: ")
                .map_or(Ok(content.as_bytes()), |why| Err(why.trim())),
        })
        .collect();
    let (documents, problems) = library.update(&files);
    (documents, list(&problems))
}

/// Lists the documents in force, one per line, and then the problems.
fn show(library: &mut Library, text: &str) -> String {
    let (documents, problems) = update(library, text);
    let mut shown = String::new();
    let mut line = |what: String, place: &Place| shown.push_str(&format!("{what} ({place})\n"));
    if let Some(mesh) = &documents.mesh {
        line("Mesh".to_owned(), &mesh.place);
    }
    for service in documents.services.values() {
        let subsets: Vec<_> = service.subsets.keys().map(|s| s.as_str()).collect();
        line(format!("Service {} [{}]", service.name, subsets.join(" ")), &service.place);
    }
    for route in documents.routes.values() {
        line(format!("Route {} with {} rules", route.service, route.rules.len()), &route.place);
    }
    for node in &documents.nodes {
        line(format!("Node {}", node.selector()), &node.place);
    }
    for access in documents.access.values().flatten() {
        let name = access.name.as_ref().map_or_else(String::new, |name| format!("/{name}"));
        line(format!("Access {}{name} with {} rules", access.service, access.rules.len()), &access.place);
    }
    shown + &problems
}

fn check(text: &str, expected: Expect) {
    expected.assert_eq(&show(&mut Library::default(), text));
}

const DESIGN: &str = r#"
== mesh.d/orders.yaml
kind: Service
name: orders
subsets: {v1: {version: v1}, v2: {version: v2}}
load_balancing: {policy: least_request}      # round_robin | least_request | latency_aware | random | ring_hash | maglev
outlier_detection: {consecutive_5xx: 5, base_ejection: 30s}
---
kind: Route
service: orders
rules:
  - match: {path: {prefix: /v2}, headers: {x-canary: "true"}}
    split: [{subset: v2, weight: 100}]
  - split: [{subset: v1, weight: 90}, {subset: v2, weight: 10}]
    timeout: 2s
    retry: {attempts: 3, on: [5xx, reset], per_try_timeout: 500ms}
"#;
