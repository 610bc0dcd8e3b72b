//! Checks `Access` documents.

use std::sync::Arc;

use super::{DocumentChecker, check_text_match, is_header_name};
use crate::document::{AccessCallers, AccessDocument, AccessPath, AccessRequests, JwtProvider, MeshDocument};
use crate::yaml::{Step, short};

/// The limit of rules in one document. Envoy evaluates them in turn for each request.
const MAX_RULES: usize = 500;
/// The limit, in bytes, of a key set.
const MAX_KEY_SET: usize = 64 * 1024;

pub(crate) fn access(document: &AccessDocument, check: &mut DocumentChecker<'_>) {
    if document.rules.is_empty() && document.default.is_none() {
        check.report(&[], "neither `rules` nor `default`: this document decides nothing");
    }
    if document.rules.len() > MAX_RULES {
        let message = format!(
            "{} rules, and at most {MAX_RULES} are taken: split the service or join rules",
            document.rules.len()
        );
        check.report_key(path!["rules"], message);
    }
    for (index, rule) in document.rules.iter().enumerate() {
        check_callers(&rule.from, path!["rules", index, "from"], check);
        check_requests(&rule.to, path!["rules", index, "to"], check);
    }
    check_providers(&document.jwt_providers, path!["jwt_providers"], check);
}

pub(crate) fn mesh(mesh: &MeshDocument, check: &mut DocumentChecker<'_>) {
    if let Some(access) = &mesh.access {
        check_providers(&access.jwt_providers, path!["access", "jwt_providers"], check);
    }
}

fn check_callers(from: &AccessCallers, at: &[Step<'_>], check: &mut DocumentChecker<'_>) {
    let field = |name: &'static str| [at, path![name]].concat();
    let AccessCallers { anyone, services, nodes, cidrs, jwt } = from;
    let others = [
        ("services", services.is_some()),
        ("nodes", !nodes.is_empty()),
        ("cidrs", cidrs.is_some()),
        ("jwt", jwt.is_some()),
    ];
    for (name, _) in others.into_iter().filter(|(_, given)| *anyone && *given) {
        check.report_key(&field(name), format!("`anyone` and `{name}` together: leave one of them out"));
    }
    let empty = [
        ("services", services.as_ref().is_some_and(Vec::is_empty)),
        ("cidrs", cidrs.as_ref().is_some_and(Vec::is_empty)),
    ];
    report_empty(&empty, "caller", at, check);
    for (name, values) in jwt.iter().flat_map(|jwt| &jwt.claims) {
        if values.0.is_empty() {
            let at = [at, path!["jwt", "claims", &**name]].concat();
            check.report(&at, "an empty list of values: no token matches");
        }
    }
}

fn check_requests(to: &AccessRequests, at: &[Step<'_>], check: &mut DocumentChecker<'_>) {
    let AccessRequests { paths, methods, headers, ports } = to;
    let empty = [
        ("paths", paths.as_ref().is_some_and(Vec::is_empty)),
        ("methods", methods.as_ref().is_some_and(Vec::is_empty)),
        ("ports", ports.as_ref().is_some_and(Vec::is_empty)),
    ];
    report_empty(&empty, "request", at, check);
    for (index, path) in paths.iter().flatten().enumerate() {
        let kind = match path {
            AccessPath::Exact(_) => "exact",
            AccessPath::Prefix(_) => "prefix",
        };
        if let Err(message) = check_path(path.as_str()) {
            check.report(&[at, path!["paths", index, kind]].concat(), message);
        }
    }
    for (name, text) in headers {
        let at = [at, path!["headers", &**name]].concat();
        if !is_header_name(name) || name.starts_with(':') {
            check.report_key(&at, format!("`{}` is not the name of a header", short(name)));
        }
        check_text_match(text, &at, check);
    }
    for (index, port) in ports.iter().flatten().enumerate() {
        if *port == 0 {
            check.report(&[at, path!["ports", index]].concat(), "port 0 is not a port: 1 to 65535");
        }
    }
}

fn report_empty(
    lists: &[(&'static str, bool)],
    noun: &str,
    at: &[Step<'_>],
    check: &mut DocumentChecker<'_>,
) {
    for (name, _) in lists.iter().filter(|(_, empty)| *empty) {
        let message = format!("`{name}: []` matches no {noun}: leave it out to match every {noun}");
        check.report(&[at, path![*name]].concat(), message);
    }
}

/// Checks that a path of a rule can match: requests whose path has another spelling are refused.
fn check_path(path: &str) -> Result<(), String> {
    let shown = short(path);
    if !path.starts_with('/') {
        return Err(format!("`{shown}` is not a path: it starts with `/`"));
    }
    if path.contains(['?', '#']) {
        return Err(format!("`{shown}` is not a path: a path ends before `?` and `#`"));
    }
    let is_dot_segment = |segment: &str| segment == "." || segment == "..";
    if path.contains("//")
        || path.split('/').any(is_dot_segment)
        || path.contains([';', '\\', '%'])
        || !path.is_ascii()
    {
        return Err(format!(
            "`{shown}`: write the plain path, without `//`, `.` and `..` segments, `;`, `\\`, `%` and characters beyond ASCII"
        ));
    }
    if path.chars().any(|c| c.is_ascii_control() || c == ' ') {
        return Err(format!("`{shown}` contains a space or a control character, which no path has"));
    }
    Ok(())
}

fn check_providers(providers: &[JwtProvider], at: &[Step<'_>], check: &mut DocumentChecker<'_>) {
    let mut issuers: Vec<&Arc<str>> = Vec::new();
    for (index, provider) in providers.iter().enumerate() {
        let field = |name: &'static str| [at, path![index, name]].concat();
        if provider.issuer.is_empty() {
            check.report(&field("issuer"), "an empty issuer: give the `iss` of its tokens");
        }
        if issuers.contains(&&provider.issuer) {
            check.report(&field("issuer"), format!("issuer `{}` is listed twice", short(&provider.issuer)));
        }
        issuers.push(&provider.issuer);
        match (&provider.jwks, &provider.jwks_file) {
            (Some(keys), None) => {
                if let Err(message) = check_key_set(keys) {
                    check.report(&field("jwks"), message);
                }
            }
            (None, Some(file)) if !file.ends_with(".jwks") || file.contains('/') => {
                let message = "expected the name of a file beside the documents that ends in `.jwks`, without a directory";
                check.report(&field("jwks_file"), message);
            }
            (None, Some(_)) => {}
            (Some(_), Some(_)) => check
                .report_key(&field("jwks_file"), "`jwks` and `jwks_file` together: leave one of them out"),
            (None, None) => check.report(&[at, path![index]].concat(), "no keys: give `jwks` or `jwks_file`"),
        }
    }
}

/// Checks that a text may be a JSON Web Key Set. Envoy checks the keys themselves.
pub(crate) fn check_key_set(text: &str) -> Result<(), String> {
    if text.len() > MAX_KEY_SET {
        return Err(format!("{} bytes of keys, and at most {MAX_KEY_SET} are taken", text.len()));
    }
    match text.trim_start().starts_with('{') && text.contains("\"keys\"") {
        true => Ok(()),
        false => Err("expected a JSON Web Key Set, such as {\"keys\": [..]}".to_owned()),
    }
}
