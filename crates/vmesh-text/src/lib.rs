//! Text of others (a client, a registry, a proxy, a file), made safe for a log, a terminal and an answer: what would be taken for more than
//! text is written as an escape.

use std::borrow::Cow;

/// The longest text of others that a message has room for, in bytes.
pub const MAX: usize = 1024;

/// Returns `text` with every character escaped (`\u{1b}`, `\n`) that [`is_unsafe`].
pub fn printable(text: &str) -> Cow<'_, str> {
    match text.contains(is_unsafe) {
        true => Cow::Owned(escaped(text, usize::MAX)),
        false => Cow::Borrowed(text),
    }
}

/// Returns `text` as [`printable`] does, at most `max` bytes of it, and `…` if there was more.
pub fn escaped(text: &str, max: usize) -> String {
    let mut escaped = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let before = escaped.len();
        if is_unsafe(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
        if escaped.len() > max {
            escaped.truncate(before);
            escaped.push('…');
            break;
        }
    }
    escaped
}

/// Reports whether a terminal or a log would act on `c` instead of showing it: control characters, line breaks, and what changes the direction
/// or the presence of the text around it.
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            // Soft hyphen; Arabic letter mark; marks and joiners without width; separators of lines; embeddings, overrides and
            // isolates of bidirectional text; invisible operators; the byte order mark; interlinear notes; tags.
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_escaped_and_what_is_long_is_cut() {
        assert_eq!(escaped("\u{1b}[31mred\u{1b}[0m\r\nline", MAX), "\\u{1b}[31mred\\u{1b}[0m\\r\\nline");
        assert_eq!(escaped("\u{9b}2J \u{202e}txt\u{7f}", MAX), "\\u{9b}2J \\u{202e}txt\\u{7f}");
        assert_eq!(escaped("Größe 5 µs", MAX), "Größe 5 µs");
        assert_eq!(escaped("äää", 4), "ää…");
        assert_eq!(escaped("a\u{1b}b", 4), "a…");
        assert!(escaped(&"x".repeat(1 << 20), MAX).len() <= MAX + '…'.len_utf8());
        assert_eq!(printable("a\tb\u{202e}"), "a\\tb\\u{202e}");
        assert!(matches!(printable("Größe 5 µs"), Cow::Borrowed(_)));
    }
}
