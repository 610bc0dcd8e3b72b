//! Finds type names and doc comments that break the writing rules of `CONTRIBUTING.md`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{
    Attribute, Expr, Field, Ident, ImplItemFn, Item, ItemMod, Lit, Meta, TraitItemFn, Variant, Visibility,
};

/// Pronouns, question words, bare participles and nicknames: none of them says what a type holds.
const NOT_TYPE_NAMES: &[&str] = &[
    "Asked",
    "Ask",
    "At",
    "Bell",
    "Built",
    "Careful",
    "Confirmed",
    "Counted",
    "Data",
    "Declared",
    "Desk",
    "Dialled",
    "Done",
    "Door",
    "Everybody",
    "Evicted",
    "Followed",
    "Found",
    "Glance",
    "Gone",
    "Heard",
    "Held",
    "How",
    "Inner",
    "Inward",
    "Keep",
    "Kept",
    "Known",
    "Least",
    "Left",
    "Like",
    "MadeUp",
    "Merged",
    "Mirrored",
    "Never",
    "Nursery",
    "One",
    "Other",
    "Ours",
    "Outward",
    "Over",
    "Own",
    "Patient",
    "Proposed",
    "Published",
    "Ran",
    "Reached",
    "Read",
    "Reading",
    "Recorded",
    "Refused",
    "Registered",
    "Resolved",
    "Said",
    "Say",
    "Seen",
    "Seldom",
    "Shelf",
    "SignOfLife",
    "Standing",
    "Strangers",
    "Stuff",
    "Tagged",
    "Taken",
    "Talk",
    "Temper",
    "Thing",
    "Tide",
    "To",
    "Told",
    "TooMuch",
    "Touched",
    "Unread",
    "Unsaid",
    "Unwritten",
    "Used",
    "Walked",
    "Want",
    "Wanted",
    "Watched",
    "What",
    "Where",
    "Which",
    "Who",
    "Whole",
    "Why",
    "Written",
];

/// Words that open a clause whose subject the reader would have to guess.
const NOT_OPENERS: &[&str] = &[
    "also", "and", "are", "as", "at", "because", "but", "by", "can", "for", "from", "he", "how", "if", "in",
    "is", "it", "its", "like", "may", "must", "not", "of", "on", "or", "since", "so", "such", "that",
    "their", "these", "they", "this", "those", "to", "until", "was", "were", "what", "whatever", "when",
    "where", "whether", "which", "who", "whoever", "whom", "whose", "why", "with", "without",
];

/// The words of one crate, or of one text.
#[derive(Debug, Default)]
pub(crate) struct Wording {
    /// The places (`file:line`) of each type of the crate's own code by its name; types of tests are not among them.
    pub(crate) types: BTreeMap<String, Vec<String>>,
    /// `file:line: text` of each type name and doc comment that breaks a rule.
    pub(crate) faults: Vec<String>,
    /// The number of doc comments of public items, which lets a test prove that comments were read at all.
    pub(crate) documented: usize,
}

impl Wording {
    /// Lists the names that several types of the crate share, each with its places.
    pub(crate) fn shared_names(&self) -> Vec<String> {
        let shared = self.types.iter().filter(|(_, places)| places.len() > 1);
        shared.map(|(name, places)| format!("`{name}`: {}", places.join(", "))).collect()
    }
}

/// Reads all Rust files below `directory`, leaving out generated code.
pub(crate) fn read(directory: &Path) -> Wording {
    let mut wording = Wording::default();
    for file in rust_files(directory) {
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        // Below `directory` only: the path of the whole project may have a folder of this name, too.
        let name = file.strip_prefix(directory).unwrap_or(&file);
        let is_test =
            name.components().any(|part| ["tests", "tests.rs"].iter().any(|test| part.as_os_str() == *test));
        read_file(&name.display().to_string(), &text, is_test, &mut wording);
    }
    wording
}

/// Reads one text as if it were a file of a crate.
pub(crate) fn read_text(text: &str) -> Wording {
    let mut wording = Wording::default();
    read_file("text.rs", text, false, &mut wording);
    wording
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(next) = directories.pop() {
        let entries = fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display()));
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            match path.extension() {
                _ if path.is_dir() && !path.ends_with("generated") => directories.push(path),
                Some(extension) if extension == "rs" => files.push(path),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

fn read_file(name: &str, text: &str, is_test: bool, wording: &mut Wording) {
    let parsed = syn::parse_file(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    Reader { file: name, is_test, wording }.visit_file(&parsed);
}

struct Reader<'a> {
    file: &'a str,
    is_test: bool,
    wording: &'a mut Wording,
}

impl Reader<'_> {
    fn place(&self, name: &Ident) -> String {
        format!("{}:{}", self.file, name.span().start().line)
    }

    fn check_type(&mut self, name: &Ident) {
        let (text, place) = (name.to_string(), self.place(name));
        if NOT_TYPE_NAMES.contains(&text.as_str()) {
            self.wording.faults.push(format!("{place}: a type must not be called `{text}`"));
        }
        if !self.is_test {
            self.wording.types.entry(text).or_default().push(place);
        }
    }

    fn check_docs(&mut self, name: &Ident, attributes: &[Attribute]) {
        let Some(first) = attributes.iter().find_map(doc_line) else { return };
        self.wording.documented += 1;
        let opener = first.split_whitespace().next().unwrap_or_default().to_lowercase();
        if NOT_OPENERS.contains(&opener.as_str()) || first.starts_with("The same") {
            let place = self.place(name);
            self.wording.faults.push(format!("{place}: `{name}` is documented by \"{first}\""));
        }
    }
}

/// Returns the text of an attribute that is a line of a doc comment.
fn doc_line(attribute: &Attribute) -> Option<String> {
    let Meta::NameValue(value) = &attribute.meta else { return None };
    match &value.value {
        Expr::Lit(literal) if value.path.is_ident("doc") => match &literal.lit {
            Lit::Str(text) => Some(text.value().trim().to_owned()),
            _ => None,
        },
        _ => None,
    }
}

fn is_only_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string() == "test",
        _ => false,
    })
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let (name, visibility, attributes) = match item {
            Item::Struct(item) => (&item.ident, &item.vis, &item.attrs),
            Item::Enum(item) => (&item.ident, &item.vis, &item.attrs),
            Item::Trait(item) => (&item.ident, &item.vis, &item.attrs),
            Item::Type(item) => (&item.ident, &item.vis, &item.attrs),
            Item::Fn(item) => (&item.sig.ident, &item.vis, &item.attrs),
            Item::Const(item) => (&item.ident, &item.vis, &item.attrs),
            Item::Static(item) => (&item.ident, &item.vis, &item.attrs),
            _ => return visit::visit_item(self, item),
        };
        if matches!(item, Item::Struct(_) | Item::Enum(_) | Item::Trait(_) | Item::Type(_)) {
            self.check_type(name);
        }
        if is_public(visibility) {
            self.check_docs(name, attributes);
        }
        visit::visit_item(self, item);
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        let was_test = self.is_test;
        self.is_test |= is_only_for_tests(&module.attrs);
        visit::visit_item_mod(self, module);
        self.is_test = was_test;
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        if is_public(&function.vis) {
            self.check_docs(&function.sig.ident, &function.attrs);
        }
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast TraitItemFn) {
        self.check_docs(&function.sig.ident, &function.attrs);
        visit::visit_trait_item_fn(self, function);
    }

    fn visit_field(&mut self, field: &'ast Field) {
        if let Some(name) = &field.ident
            && is_public(&field.vis)
        {
            self.check_docs(name, &field.attrs);
        }
        visit::visit_field(self, field);
    }

    fn visit_variant(&mut self, variant: &'ast Variant) {
        self.check_docs(&variant.ident, &variant.attrs);
        visit::visit_variant(self, variant);
    }
}
