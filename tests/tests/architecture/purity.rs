//! Finds accesses to the outside world (clock, files, sockets, environment, processes) in the code of a
//! crate.
//!
//! A crate is read like the compiler reads it: from one file along its `mod` declarations, without code that
//! is compiled only for tests or only with a given feature. Text inside comments and strings does not count;
//! code after a test module does.

use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Attribute, Expr, ExprMethodCall, Item, ItemMod, Macro, Meta, Token, UseTree};

/// The findings in one crate or module.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Each access to the outside world as `file:line: path`.
    pub(crate) impure: Vec<String>,
    /// The number of items that were read. The test needs this number to prove that code was read at all.
    pub(crate) items: usize,
    /// The files that were read.
    pub(crate) files: Vec<PathBuf>,
}

/// Reads the module in `file` and its submodules, except for modules that need one of `features`.
pub(crate) fn read(file: &Path, features: &[&str]) -> Findings {
    let mut reading = Findings::default();
    read_file(file, &submodule_directory(file), features, &mut reading);
    reading
}

/// Reads a text as if it were a file without submodules.
pub(crate) fn read_text(text: &str) -> Vec<String> {
    let parsed = syn::parse_file(text).expect("Rust");
    let mut reading = Findings::default();
    Finder { file: Path::new("text.rs"), features: &[], submodules: Path::new(""), reading: &mut reading }
        .visit_file(&parsed);
    reading.impure
}

fn read_file(file: &Path, submodules: &Path, features: &[&str], reading: &mut Findings) {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    reading.files.push(file.to_owned());
    Finder { file, features, submodules, reading }.visit_file(&parsed);
}

/// Returns the directory of the submodules of `file`: next to `lib.rs` and `mod.rs`, below any other file.
fn submodule_directory(file: &Path) -> PathBuf {
    match file.file_name().and_then(|name| name.to_str()) {
        Some("lib.rs" | "mod.rs" | "main.rs") => file.parent().unwrap_or(file).to_owned(),
        _ => file.with_extension(""),
    }
}

struct Finder<'a> {
    file: &'a Path,
    features: &'a [&'a str],
    submodules: &'a Path,
    reading: &'a mut Findings,
}

/// Paths that access the outside world. A path counts if it contains these names in a row.
const IMPURE: &[&[&str]] = &[
    &["std", "fs"],
    &["std", "env", "var"],
    &["std", "env", "var_os"],
    &["std", "env", "vars"],
    &["std", "env", "args"],
    &["std", "env", "current_dir"],
    &["std", "process", "Command"],
    &["std", "process", "id"],
    &["std", "thread"],
    &["std", "io", "stdin"],
    &["std", "net", "TcpStream"],
    &["std", "net", "TcpListener"],
    &["std", "net", "UdpSocket"],
    &["std", "net", "ToSocketAddrs"],
    &["std", "os", "unix", "net"],
    &["tokio", "fs"],
    &["tokio", "net"],
    &["tokio", "process"],
    &["tokio", "spawn"],
    &["tokio", "task"],
    &["tokio", "time", "sleep"],
    &["rustix"],
    &["libc"],
];

impl Finder<'_> {
    fn report(&mut self, line: usize, what: &str) {
        self.reading.impure.push(format!("{}:{line}: {what}", self.file.display()));
    }

    fn check(&mut self, path: &[String], line: usize) {
        // This also finds `Clock::now`, where `Instant` was imported under another name.
        let reads_clock = path.len() > 1 && path.last().is_some_and(|last| last == "now");
        let names_world = IMPURE.iter().any(|impure| {
            path.windows(impure.len()).any(|part| part.iter().zip(*impure).all(|(a, b)| a == b))
        });
        if reads_clock || names_world {
            self.report(line, &path.join("::"));
        }
    }

    fn check_use(&mut self, tree: &UseTree, prefix: &mut Vec<String>, line: usize) {
        match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.check_use(&path.tree, prefix, line);
                prefix.pop();
            }
            UseTree::Name(name) => self.check_imported(name.ident.to_string(), prefix, line),
            UseTree::Rename(renamed) => self.check_imported(renamed.ident.to_string(), prefix, line),
            UseTree::Glob(_) => self.check(&prefix.clone(), line),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.check_use(tree, prefix, line)),
        }
    }

    fn check_imported(&mut self, name: String, prefix: &[String], line: usize) {
        let mut path = prefix.to_vec();
        if name != "self" {
            path.push(name);
        }
        self.check(&path, line);
    }

    fn is_left_out(&self, attributes: &[Attribute]) -> bool {
        attributes.iter().filter(|attribute| attribute.path().is_ident("cfg")).any(|attribute| {
            let Meta::List(list) = &attribute.meta else { return false };
            let condition = list.tokens.to_string();
            condition == "test"
                || self.features.iter().any(|feature| condition.contains(&format!("feature = \"{feature}\"")))
        })
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if self.is_left_out(attributes(item)) {
            return;
        }
        self.reading.items += 1;
        if let Item::Use(import) = item {
            self.check_use(&import.tree, &mut Vec::new(), import.use_token.span.start().line);
        }
        visit::visit_item(self, item);
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        let name = module.ident.to_string();
        if module.content.is_some() {
            let submodules = self.submodules.join(&name);
            let Finder { file, features, .. } = *self;
            let mut inner = Finder { file, features, submodules: &submodules, reading: self.reading };
            visit::visit_item_mod(&mut inner, module);
            return;
        }
        let beside = self.submodules.join(format!("{name}.rs"));
        let file = if beside.exists() { beside } else { self.submodules.join(&name).join("mod.rs") };
        read_file(&file, &submodule_directory(&file), self.features, self.reading);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        let line = path.segments.first().map_or(0, |segment| segment.ident.span().start().line);
        self.check(&names, line);
        visit::visit_path(self, path);
    }

    fn visit_expr_method_call(&mut self, call: &'ast ExprMethodCall) {
        if call.args.is_empty() && (call.method == "elapsed" || call.method == "to_socket_addrs") {
            self.report(call.method.span().start().line, &format!(".{}()", call.method));
        }
        visit::visit_expr_method_call(self, call);
    }

    /// Most macros take expressions: `assert!(a, b)`, `vec![..]`, `format!(..)`. A body of another form is
    /// skipped.
    fn visit_macro(&mut self, call: &'ast Macro) {
        let expressions = call
            .parse_body_with(syn::punctuated::Punctuated::<Expr, Token![,]>::parse_terminated)
            .unwrap_or_default();
        expressions.iter().for_each(|expression| self.visit_expr(expression));
        visit::visit_macro(self, call);
    }
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}
