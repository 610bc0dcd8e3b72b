//! Parses YAML, and JSON as its subset, into a tree in which every value has its line and column.
//!
//! The intermediate tree is needed because three readers use positions that a typed value no longer has:
//! [`crate::strict`] (several problems of one document at once), the checks of a document's meaning, and the
//! formats of discovery (a bad record affects only itself).
//!
//! The dangerous features of YAML are limited here: nesting depth, the number of values (including expanded
//! aliases, "billion laughs"), and the size of the text. Scalars stay text until a typed field interprets
//! them, so `no`, `1.10` and `0755` arrive as written.

use std::collections::HashMap;
use std::sync::Arc;

use granit_parser::{ErrorKind, Event, Marker, Parser, ScalarStyle, ScanError, Span};

use crate::{Place, Problem};

/// The limit, in bytes, of a text. Hundreds of times larger than any real one.
pub const MAX_TEXT: usize = 16 << 20;
/// The limit of nesting. Deeper texts are attacks or accidents.
const MAX_DEPTH: usize = 64;
/// The limit of values in one text, counted as if every alias were expanded: about 100 MiB of tree.
const MAX_VALUES: u64 = 1_000_000;
/// The limit of problems in one file.
const MAX_PROBLEMS: usize = 100;

/// One YAML document of a file; `---` separates documents.
#[derive(Debug)]
pub struct Document {
    /// `None` if the document cannot be parsed; `problems` contain the reason.
    pub root: Option<Arc<Node>>,
    /// The problems of the syntax, independent of the document's kind.
    pub problems: Vec<Problem>,
}

/// A value and its position.
#[derive(Debug)]
pub struct Node {
    /// Unique among the nodes of a text.
    pub(crate) id: u32,
    /// Counts from 1.
    pub line: u32,
    /// Counts from 1, in characters.
    pub column: u32,
    /// The byte range in the text. For a mapping, the range begins at the first key.
    pub(crate) bytes: (usize, usize),
    pub content: Content,
    depth: usize,
    values: u64,
}

#[derive(Debug)]
pub enum Content {
    Scalar {
        text: Box<str>,
        is_quoted: bool,
    },
    List(Vec<Arc<Node>>),
    /// The entries in the order of the text. Every key is a scalar, and no two keys are equal.
    Mapping(Vec<Entry>),
}

#[derive(Debug, Clone)]
pub struct Entry {
    pub key: Arc<Node>,
    pub value: Arc<Node>,
}

impl Entry {
    pub fn name(&self) -> &str {
        self.key.text().unwrap_or_default()
    }
}

/// One step of a path from a node to a node inside it.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a> {
    Key(&'a str),
    Item(usize),
}

impl<'a> From<&'a str> for Step<'a> {
    fn from(key: &'a str) -> Self {
        Step::Key(key)
    }
}

impl From<usize> for Step<'_> {
    fn from(item: usize) -> Self {
        Step::Item(item)
    }
}

impl Node {
    /// Returns the node `{}`, which stands for an empty text.
    pub(crate) fn empty_mapping() -> Node {
        let content = Content::Mapping(Vec::new());
        Node { id: 0, line: 1, column: 1, bytes: (0, 0), content, depth: 0, values: 1 }
    }

    pub fn place(&self, file: &Arc<str>) -> Place {
        Place::at(file.clone(), self.line, self.column)
    }

    /// Returns the text of a scalar, without quotes and escapes. `true`, `12` and `null` are scalars too.
    pub fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar { text, .. } => Some(text),
            Content::List(_) | Content::Mapping(_) => None,
        }
    }

    /// Reports whether the node is null: `key:`, `~` or `null`.
    pub fn is_null(&self) -> bool {
        match &self.content {
            Content::Scalar { text, is_quoted: false } => {
                matches!(&**text, "" | "~" | "null" | "Null" | "NULL")
            }
            _ => false,
        }
    }

    pub fn items(&self) -> Option<&[Arc<Node>]> {
        match &self.content {
            Content::List(items) => Some(items),
            Content::Scalar { .. } | Content::Mapping(_) => None,
        }
    }

    pub fn entries(&self) -> Option<&[Entry]> {
        match &self.content {
            Content::Mapping(entries) => Some(entries),
            Content::Scalar { .. } | Content::List(_) => None,
        }
    }

    pub fn get(&self, key: &str) -> Option<&Arc<Node>> {
        self.entries()?.iter().find(|entry| entry.name() == key).map(|entry| &entry.value)
    }

    /// Returns the place to show for `path`: that of the value if it is a scalar, else that of its key,
    /// because readers look for `split:` rather than for the first line below it. If the path does not exist,
    /// the place of its deepest existing node.
    pub fn find(&self, file: &Arc<str>, path: &[Step<'_>]) -> Place {
        let mut place = self.place(file);
        let mut node = self;
        for step in path {
            match *step {
                Step::Key(name) => {
                    let entries = node.entries().unwrap_or_default();
                    let Some(entry) = entries.iter().find(|e| e.name() == name) else { return place };
                    let shown = if entry.value.text().is_some() { &entry.value } else { &entry.key };
                    place = shown.place(file);
                    node = &entry.value;
                }
                Step::Item(index) => {
                    let Some(item) = node.items().and_then(|items| items.get(index)) else { return place };
                    place = item.place(file);
                    node = item;
                }
            }
        }
        place
    }

    /// Returns the place of the key at `path`, for a message about the key itself.
    pub fn find_key(&self, file: &Arc<str>, path: &[Step<'_>]) -> Place {
        let Some((Step::Key(last), parents)) = path.split_last() else { return self.find(file, path) };
        let mut node = self;
        for step in parents {
            let next = match *step {
                Step::Key(name) => node.get(name),
                Step::Item(index) => node.items().and_then(|items| items.get(index)),
            };
            let Some(next) = next else { return self.find(file, parents) };
            node = next;
        }
        match node.entries().unwrap_or_default().iter().find(|e| e.name() == *last) {
            Some(entry) => entry.key.place(file),
            None => self.find(file, parents),
        }
    }

    /// Describes the node for a message: the second half of "expected .., found ..".
    pub fn describe(&self) -> String {
        match &self.content {
            _ if self.is_null() => "nothing".to_owned(),
            Content::Scalar { text, is_quoted: false } if matches!(&**text, "true" | "false") => {
                text.to_string()
            }
            Content::Scalar { text, is_quoted: false } if is_number(text) => {
                format!("the number {}", short(text))
            }
            Content::Scalar { text, is_quoted: true } if text.is_empty() => "an empty text".to_owned(),
            Content::Scalar { text, is_quoted: true }
                if is_number(text) || matches!(&**text, "true" | "false") =>
            {
                format!("the text `{}` (in quotes)", short(text))
            }
            Content::Scalar { text, .. } => format!("the text `{}`", short(text)),
            Content::List(_) => "a list".to_owned(),
            Content::Mapping(_) => "a mapping".to_owned(),
        }
    }
}

fn is_number(text: &str) -> bool {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    digits.starts_with(|c: char| c.is_ascii_digit()) && digits.parse::<f64>().is_ok()
}

/// Shortens a text for a message of one line.
pub fn short(text: &str) -> String {
    const SHOWN: usize = 60;
    let one_line = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut shown: String = one_line.take(SHOWN).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

/// Decodes bytes as text, or returns the problem.
pub fn decode_text<'a>(
    file: &Arc<str>,
    subject: &Arc<str>,
    bytes: &'a [u8],
    limit: usize,
) -> Result<&'a str, Problem> {
    let wrong = |place, message: String| Problem::new(place, subject.clone(), message);
    if bytes.len() > limit {
        return Err(wrong(Place::file(file.clone()), too_large(limit)));
    }
    if bytes.is_empty() {
        return Err(wrong(Place::file(file.clone()), "the file is empty".to_owned()));
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(wrong(Place::file(file.clone()), "the text is UTF-16: save it as UTF-8".to_owned()));
    }
    // A byte-order mark is not part of the text.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|error| {
        let good = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let good = std::str::from_utf8(good).unwrap_or_default();
        let line = good.matches('\n').count() + 1;
        let column = good.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        let bad = bytes.get(error.valid_up_to()).copied().unwrap_or_default();
        let message = format!("the text is not UTF-8: byte 0x{bad:02x} belongs to no character");
        wrong(Place::at(file.clone(), to_u32(line), to_u32(column)), message)
    })
}

/// Returns the message for a text that is longer than `limit`.
pub fn too_large(limit: usize) -> String {
    let limit = if limit >= 1 << 20 { format!("{} MiB", limit >> 20) } else { format!("{limit} bytes") };
    format!("larger than {limit}, the most that is read")
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Parses all documents of a text. After a syntax error, parsing continues at the next `---`, so that only
/// that document is lost. Empty documents, as between two `---`, are left out.
pub fn parse(file: &Arc<str>, subject: &Arc<str>, text: &str) -> Vec<Document> {
    parse_from(file, subject, text, 1)
}

/// Does the same as [`parse`] for a part of a file that begins in line `first_line`.
pub fn parse_from(file: &Arc<str>, subject: &Arc<str>, text: &str, first_line: u32) -> Vec<Document> {
    let mut options = granit_parser::Options::default();
    options.disallow_directives = true;
    options.flow_nesting_limit = MAX_DEPTH;
    options.block_nesting_limit = MAX_DEPTH;
    let mut parser = Parser::new_from_str_with_options(text, options);
    let mut builder = TreeBuilder::new(file, subject, first_line);
    let mut documents = Vec::new();
    let mut problems = 0;
    loop {
        match parser.next_event() {
            None => break,
            Some(Ok((Event::DocumentEnd, _))) => {
                let document = builder.finish();
                problems += document.problems.len();
                if document.root.as_ref().is_none_or(|root| !root.is_null()) {
                    documents.push(document);
                }
            }
            Some(Ok((event, span))) => builder.event(event, span),
            Some(Err(error)) => {
                builder.syntax(&error, text);
                let document = builder.finish();
                problems += document.problems.len();
                documents.push(document);
                if !matches!(parser.proceed_next_document(), Ok(true)) {
                    break;
                }
            }
        }
        if builder.is_exhausted || problems > MAX_PROBLEMS {
            if builder.is_open() {
                documents.push(builder.finish());
            }
            break;
        }
    }
    documents
}

enum OpenContainer {
    List { start: ContainerStart, items: Vec<Arc<Node>> },
    Mapping(ContainerStart, MappingBuilder),
}

/// The position and the anchor of a list or mapping.
struct ContainerStart {
    mark: Marker,
    anchor: usize,
}

/// A mapping under construction.
#[derive(Default)]
struct MappingBuilder {
    entries: Vec<Entry>,
    /// The last key, whose value has not been read yet.
    key: Option<Arc<Node>>,
    /// The line of each key so far.
    lines: HashMap<Box<str>, u32>,
    /// The value of `<<`.
    merge: Option<Arc<Node>>,
}

/// Builds the tree from parser events, without recursion, because the text determines the depth.
struct TreeBuilder<'a> {
    file: &'a Arc<str>,
    subject: &'a Arc<str>,
    lines_above: u32,
    open: Vec<OpenContainer>,
    anchors: HashMap<usize, Arc<Node>>,
    root: Option<Arc<Node>>,
    problems: Vec<Problem>,
    next_id: u32,
    values: u64,
    /// A limit of the text was exceeded.
    is_exhausted: bool,
}

impl<'a> TreeBuilder<'a> {
    fn new(file: &'a Arc<str>, subject: &'a Arc<str>, first_line: u32) -> Self {
        TreeBuilder {
            file,
            subject,
            lines_above: first_line.saturating_sub(1),
            open: Vec::new(),
            anchors: HashMap::new(),
            root: None,
            problems: Vec::new(),
            next_id: 0,
            values: 0,
            is_exhausted: false,
        }
    }

    fn position(&self, mark: &Marker) -> (u32, u32) {
        (to_u32(mark.line()).saturating_add(self.lines_above), to_u32(mark.col() + 1))
    }

    fn is_open(&self) -> bool {
        !self.open.is_empty() || self.root.is_some() || !self.problems.is_empty()
    }

    /// Ends the document, whether it is complete or broken.
    fn finish(&mut self) -> Document {
        let broken = !self.open.is_empty() || self.is_exhausted;
        self.open.clear();
        self.anchors.clear();
        let root = self.root.take().filter(|_| !broken);
        Document { root, problems: std::mem::take(&mut self.problems) }
    }

    fn problem(&mut self, line: u32, column: u32, message: impl Into<String>) {
        let place = Place::at(self.file.clone(), line, column);
        self.problems.push(Problem::new(place, self.subject.clone(), message));
    }

    fn syntax(&mut self, error: &ScanError, text: &str) {
        let (line, column) = self.position(&tab_position(error, text).unwrap_or(*error.marker()));
        match bracketed_address(text, error.marker().line()) {
            Some((column, address)) => {
                let message = format!("a text that begins with `[` has to be in quotes: \"{address}\"");
                self.problem(line, column, message);
            }
            None => self.problem(line, column, describe_syntax_error(error.kind())),
        }
        self.root = None;
        self.is_exhausted |= matches!(error.kind(), ErrorKind::RecursionLimitExceeded);
    }

    fn event(&mut self, event: Event<'_>, span: Span) {
        self.tag(&event, &span);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let quoted =
                    style != ScalarStyle::Plain || tag.is_some_and(|t| t.is_yaml_core_schema_tag("str"));
                let content = Content::Scalar { text: text.as_ref().into(), is_quoted: quoted };
                self.complete(ContainerStart { mark: span.start, anchor }, span.end, content);
            }
            Event::SequenceStart(_, anchor, _) => {
                self.open.push(OpenContainer::List {
                    start: ContainerStart { mark: span.start, anchor },
                    items: Vec::new(),
                });
            }
            Event::MappingStart(_, anchor, _) => {
                self.open.push(OpenContainer::Mapping(
                    ContainerStart { mark: span.start, anchor },
                    MappingBuilder::default(),
                ));
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(OpenContainer::List { start, items }) => {
                    self.complete(start, span.end, Content::List(items))
                }
                Some(OpenContainer::Mapping(start, mut pairs)) => {
                    self.merge(&mut pairs);
                    self.complete(start, span.end, Content::Mapping(pairs.entries));
                }
                None => {}
            },
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => self.add(node.clone()),
                None => {
                    let (line, column) = self.position(&span.start);
                    self.problem(line, column, "an alias inside of what it stands for: that would never end");
                    let nothing = Content::Scalar { text: "~".into(), is_quoted: false };
                    self.complete(ContainerStart { mark: span.start, anchor: 0 }, span.end, nothing);
                }
            },
            _ => {}
        }
    }

    /// Rejects tags. No type here depends on a tag, so it was meant for another program (`!vault`).
    fn tag(&mut self, event: &Event<'_>, span: &Span) {
        let Some(tag) = event.tag().filter(|tag| tag.is_custom()) else { return };
        let (line, column) = self.position(&span.tag_start().unwrap_or(span.start));
        let shown = short(&tag.original());
        let message =
            format!("the tag `{shown}` means nothing here; a text that starts with `!` has to be in quotes");
        self.problem(line, column, message);
    }

    /// Merges `<<: *defaults` or `<<: [*a, *b]`: adds the keys that the mapping itself lacks; earlier sources
    /// win.
    fn merge(&mut self, pairs: &mut MappingBuilder) {
        let Some(value) = pairs.merge.take() else { return };
        let sources = value.items().unwrap_or(std::slice::from_ref(&value));
        for source in sources.iter().take(MAX_DEPTH) {
            let Some(more) = source.entries() else {
                let message =
                    format!("`<<` takes a mapping or a list of mappings, found {}", source.describe());
                self.problem(source.line, source.column, message);
                continue;
            };
            for entry in more {
                self.values += 1;
                if !self.is_exhausted && !pairs.lines.contains_key(entry.name()) {
                    pairs.lines.insert(entry.name().into(), entry.key.line);
                    pairs.entries.push(entry.clone());
                }
            }
        }
    }

    fn complete(&mut self, start: ContainerStart, end: Marker, content: Content) {
        let ContainerStart { mark, anchor } = start;
        let (mut depth, mut values) = (0, 1u64);
        let mut contains = |child: &Node| {
            depth = depth.max(child.depth + 1);
            values = values.saturating_add(child.values);
        };
        match &content {
            Content::Scalar { .. } => {}
            Content::List(items) => items.iter().for_each(|item| contains(item)),
            Content::Mapping(entries) => entries.iter().for_each(|entry| {
                contains(&entry.key);
                contains(&entry.value);
            }),
        }
        let (line, column) = self.position(&mark);
        let id = self.next_id;
        self.next_id = self.next_id.saturating_add(1);
        self.values += 1;
        if depth > MAX_DEPTH && !self.is_exhausted {
            self.is_exhausted = true;
            self.problem(line, column, describe_syntax_error(&ErrorKind::RecursionLimitExceeded));
        }
        if values.max(self.values) > MAX_VALUES && !self.is_exhausted {
            self.is_exhausted = true;
            self.problem(line, column, "more than a million values, the most that is read of one file");
        }
        let bytes = (mark.byte_offset().unwrap_or_default(), end.byte_offset().unwrap_or_default());
        let node = Arc::new(Node { id, line, column, bytes, content, depth, values });
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        self.add(node);
    }

    /// Adds a complete node to the innermost open container.
    fn add(&mut self, node: Arc<Node>) {
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(OpenContainer::List { items, .. }) => items.push(node),
            Some(OpenContainer::Mapping(_, pairs)) => {
                if let Some((line, column, message)) = pairs.add(node) {
                    self.problem(line, column, message);
                }
            }
        }
    }
}

impl MappingBuilder {
    /// Adds the next key or value. The problem of a pair is returned when its value is added.
    fn add(&mut self, node: Arc<Node>) -> Option<(u32, u32, String)> {
        let Some(key) = self.key.take() else {
            self.key = Some(node);
            return None;
        };
        let (line, column) = (key.line, key.column);
        let Some(name) = key.text() else {
            return Some((line, column, format!("a key has to be a text, found {}", key.describe())));
        };
        if let Some(first) = self.lines.get(name) {
            let same = format!("`{}` is given twice, first in line {first}", short(name));
            return Some((line, column, same));
        }
        self.lines.insert(name.into(), line);
        match name {
            "<<" => self.merge = Some(node),
            _ => self.entries.push(Entry { key, value: node }),
        }
        None
    }
}

/// Returns the position of the tab that caused an error. The parser reports the start of the preceding value.
fn tab_position(error: &ScanError, text: &str) -> Option<Marker> {
    if !matches!(describe_syntax_error(error.kind()).as_str(), TAB) {
        return None;
    }
    let mark = error.marker();
    let lines = text.split('\n').enumerate().skip(mark.line().saturating_sub(1));
    let (line, tabbed) = lines.take(100).find(|(_, line)| line.trim_start_matches(' ').starts_with('\t'))?;
    let column = tabbed.chars().take_while(|c| *c == ' ').count();
    Some(Marker::new(0, line + 1, column))
}

/// Finds `[fd00::1]:8080` without quotes in a line, which YAML parses as a list. Returns its column and its
/// text.
fn bracketed_address(text: &str, line: usize) -> Option<(u32, String)> {
    let line = text.split('\n').nth(line.checked_sub(1)?)?;
    let at = line.find('[')?;
    let rest = line.get(at..)?;
    let (inside, after) = rest.split_once("]:")?;
    let is_address =
        inside.len() > 1 && inside.bytes().skip(1).all(|b| b.is_ascii_hexdigit() || b":.".contains(&b));
    let digits = after.bytes().take_while(u8::is_ascii_digit).count();
    let column = line.get(..at)?.chars().count() + 1;
    (is_address && inside.contains(':') && digits > 0)
        .then(|| Some((to_u32(column), rest.get(..inside.len() + 2 + digits)?.to_owned())))?
}

const TAB: &str = "a tab: lines are indented with spaces";

/// Describes a syntax error in terms of the file rather than of the YAML grammar.
fn describe_syntax_error(kind: &ErrorKind) -> String {
    use ErrorKind as E;
    let words = match kind {
        E::TabNotAllowed
        | E::TabInBlockIndentation
        | E::TabInIndentation
        | E::TabAtBlockScalarStart
        | E::TabInPlainScalar => TAB,
        E::UnclosedFlowCollection { open } => return format!("this `{open}` is never closed"),
        E::MismatchedFlowCollectionEnd { open, close } => {
            return format!("this `{open}` is closed by a `{close}`");
        }
        E::MisplacedFlowCollectionEnd => "a closing bracket without an opening one",
        E::UnclosedQuotedScalar => "the quote that begins here never ends",
        E::DocumentIndicatorInQuotedScalar => "`---` within quotes: is the closing quote missing above?",
        E::InvalidTrailingSingleQuotedScalar => {
            "more text after the closing quote: a `'` within single quotes is written `''`"
        }
        E::InvalidTrailingDoubleQuotedScalar => {
            "more text after the closing quote: a comma or a colon is missing, or a `\"` within the text is to be `\\\"`"
        }
        E::UnknownQuotedScalarEscape => {
            "this `\\` begins nothing known: write `\\\\`, or put the text in single quotes"
        }
        E::InvalidQuotedScalarHexEscape
        | E::InvalidLowSurrogateHexEscape
        | E::InvalidLowSurrogate
        | E::MissingLowSurrogate
        | E::UnpairedLowSurrogate
        | E::InvalidUnicodeEscape => "this escape stands for no character",
        E::MappingValueNotAllowed | E::InvalidMappingValueWhitespace => {
            "a `:` where none belongs: is the line indented like those around it, or is it a text that has to be in quotes?"
        }
        E::InvalidColonPlacement | E::FlowMappingValueAdjacentCollection => {
            "a `:` where none belongs: is a bracket above not closed?"
        }
        E::SimpleKeyExpected | E::InvalidSimpleKey => "expected `name: value`, found no `:` after the name",
        E::ExpectedBlockMappingKey | E::ExpectedBlockSequenceEntry | E::InvalidIndentation => {
            "this line does not belong to those above it: is it indented like them?"
        }
        E::ExpectedDocumentStart => "this line is indented less than the first one",
        E::BlockSequenceEntryNotAllowed | E::InvalidBlockEntryWhitespace | E::BlockEntryInFlowCollection => {
            "a `-` where no list can begin: start the list on a line of its own"
        }
        E::ExpectedFlowMappingSeparator => "a `,` or `}` is missing here",
        E::ExpectedFlowSequenceSeparator => "a `,` or `]` is missing here",
        E::UnknownAnchor => {
            "an alias (`*name`) without its anchor (`&name`) above; a text that starts with `*` has to be in quotes"
        }
        E::MissingAnchorOrAliasName => "a text that starts with `*` or `&` has to be in quotes",
        E::UnexpectedCharacter { character } if character.is_control() => {
            return format!("the character U+{:04X} is not allowed in a text", u32::from(*character));
        }
        E::UnexpectedCharacter { character } => {
            return format!("a text that starts with `{character}` has to be in quotes");
        }
        E::RecursionLimitExceeded => return format!("nested deeper than {MAX_DEPTH} levels"),
        E::DirectiveDisallowed => "a line that starts with `%`: directives are not supported",
        E::UnexpectedEof
        | E::UnexpectedEofBlockMapping
        | E::UnexpectedEofBlockSequence
        | E::UnexpectedEofFlowMapping
        | E::UnexpectedEofFlowSequence => "the text ends in the middle",
        E::BomInsideDocument => "an invisible character (a byte-order mark) in the middle of the text",
        _ => "this is not YAML: is something missing or left over here?",
    };
    words.to_owned()
}
