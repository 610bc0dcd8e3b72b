//! Text of others (a client, a registry, a proxy), made safe for a log, a terminal and an answer.

use std::fmt::Write;

/// The longest text of others that a message has room for.
pub const MAX: usize = 1024;

/// Returns `text` without anything that a terminal or a log would take for more than text: control characters, line
/// breaks and marks that change the direction of writing are written as escapes. At most `max` bytes, and `…` if there
/// was more.
pub fn escaped(text: &str, max: usize) -> String {
    let mut escaped = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let before = escaped.len();
        if is_unsafe(c) {
            _ = write!(escaped, "{}", c.escape_default());
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

/// Reports whether `c` controls a terminal or the direction of text instead of being a glyph.
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
    }
}
