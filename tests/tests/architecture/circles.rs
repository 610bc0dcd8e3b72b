//! Finds circles among the top modules of a crate: modules that import each other, directly or in a chain.
//!
//! A path counts if it starts with `crate::`, and in a top module's own file also if it starts with `super::`. A
//! name that `lib.rs` re-exports counts as its module. Code that is compiled only for tests does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::{self, Visit};
use syn::{Item, Meta, UseTree};

/// The top modules of a crate, each with the top modules that it imports.
#[derive(Debug, Default)]
pub(crate) struct Imports {
    modules: BTreeMap<String, BTreeSet<String>>,
    /// The module of each name that `lib.rs` re-exports.
    exports: BTreeMap<String, String>,
}

impl Imports {
    /// Returns the number of top modules.
    pub(crate) fn modules(&self) -> usize {
        self.modules.len()
    }

    /// Returns a circle as `a -> b -> a`, or `None` if there is none.
    pub(crate) fn circle(&self) -> Option<String> {
        let mut done = BTreeSet::new();
        self.modules.keys().find_map(|module| self.circle_from(module, &mut Vec::new(), &mut done))
    }

    fn circle_from<'a>(
        &'a self,
        module: &'a str,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> Option<String> {
        if let Some(start) = path.iter().position(|earlier| *earlier == module) {
            let circle: Vec<_> = path.iter().skip(start).chain([&module]).copied().collect();
            return Some(circle.join(" -> "));
        }
        if done.contains(module) {
            return None;
        }
        path.push(module);
        let imported = self.modules.get(module).into_iter().flatten();
        let circle = imported.into_iter().find_map(|next| self.circle_from(next, path, done));
        path.pop();
        done.insert(module);
        circle
    }

    /// Adds the code of `module`. `is_top` is set for the file of the module itself.
    pub(crate) fn add(&mut self, module: &str, text: &str, is_top: bool) {
        let parsed = syn::parse_file(text).unwrap_or_else(|error| panic!("{module}: {error}"));
        let mut finder = ImportFinder { is_top, names: BTreeSet::new() };
        finder.visit_file(&parsed);
        let names = finder.names.into_iter().map(|name| self.exports.get(&name).cloned().unwrap_or(name));
        self.modules.entry(module.to_owned()).or_default().extend(names.filter(|name| name != module));
    }
}

/// Reads the crate whose `lib.rs` is in `source`.
pub(crate) fn read(source: &Path) -> Imports {
    let mut imports = Imports::default();
    if let Ok(text) = fs::read_to_string(source.join("lib.rs")) {
        for item in syn::parse_file(&text).expect("Rust").items {
            if let Item::Use(reexport) = item
                && let UseTree::Path(path) = reexport.tree
            {
                let module = path.ident.to_string();
                each_path(&path.tree, &mut vec![], &mut |names| {
                    if let Some(name) = names.last() {
                        imports.exports.insert(name.clone(), module.clone());
                    }
                });
            }
        }
    }
    read_directory(source, None, &mut imports);
    imports
}

fn read_directory(directory: &Path, top: Option<&str>, imports: &mut Imports) {
    for entry in fs::read_dir(directory).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if stem == "tests" || (top.is_none() && ["lib", "main", "bin", "generated"].contains(&&*stem)) {
            continue;
        }
        let module = top.unwrap_or(&stem);
        if path.is_dir() {
            read_directory(&path, Some(module), imports);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let is_top =
                top.is_none() || stem == "mod" && path.parent().is_some_and(|at| at.ends_with(module));
            imports.add(module, &fs::read_to_string(&path).expect("UTF-8"), is_top);
        }
    }
}

/// Calls `found` with the names of each path of a `use`.
fn each_path(tree: &UseTree, prefix: &mut Vec<String>, found: &mut impl FnMut(&[String])) {
    let name = match tree {
        UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            each_path(&path.tree, prefix, found);
            prefix.pop();
            return;
        }
        UseTree::Group(group) => return group.items.iter().for_each(|tree| each_path(tree, prefix, found)),
        UseTree::Name(name) => name.ident.to_string(),
        UseTree::Rename(renamed) => renamed.ident.to_string(),
        UseTree::Glob(_) => "*".to_owned(),
    };
    prefix.push(name);
    found(prefix);
    prefix.pop();
}

struct ImportFinder {
    is_top: bool,
    names: BTreeSet<String>,
}

impl ImportFinder {
    fn check(&mut self, path: &[String]) {
        if let [root, name, ..] = path
            && (root == "crate" || (root == "super" && self.is_top))
        {
            self.names.insert(name.clone());
        }
    }
}

impl<'ast> Visit<'ast> for ImportFinder {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            _ => &Vec::new(),
        };
        let is_test = |meta: &Meta| matches!(meta, Meta::List(list) if list.path.is_ident("cfg") && list.tokens.to_string() == "test");
        if attributes.iter().any(|attribute| is_test(&attribute.meta)) {
            return;
        }
        if let Item::Use(import) = item {
            each_path(&import.tree, &mut Vec::new(), &mut |path| self.check(path));
        }
        visit::visit_item(self, item);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.check(&names);
        visit::visit_path(self, path);
    }
}
