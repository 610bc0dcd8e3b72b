//! Sanitises everything that reaches a terminal. Names, zones, labels, builds and reasons come from the network or from a registry, and may
//! contain control characters that move the cursor, hide a line, or imitate another line.
//!
//! [`printable_answer`] sanitises each text of an answer before the layout, so that no text can start a line of its own. The complete
//! output then goes through [`terminal`], or through [`json`].

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmesh_text::is_unsafe;

/// Maximum number of characters shown of one text. Envoy's reasons have a few hundred.
const LONGEST: usize = 2000;

/// Returns `text` as a single line of limited length without control characters.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(LONGEST));
    for (count, character) in text.chars().enumerate() {
        if count == LONGEST {
            let more = text.chars().count() - LONGEST;
            shown.push_str(&format!("… ({more} more characters)"));
            break;
        }
        match is_unsafe(character) {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    shown
}

/// Returns `answer` with every text in it made [`printable`].
pub(crate) fn printable_answer<T: Serialize + DeserializeOwned>(answer: &T) -> Result<T, serde_json::Error> {
    let mut value = serde_json::to_value(answer)?;
    make_printable(&mut value);
    serde_json::from_value(value)
}

fn make_printable(value: &mut Value) {
    match value {
        Value::String(text) if text.chars().any(is_unsafe) || text.len() > LONGEST => *text = printable(text),
        Value::Array(values) => values.iter_mut().for_each(make_printable),
        Value::Object(fields) => {
            let printed = std::mem::take(fields).into_iter().map(|(name, mut value)| {
                make_printable(&mut value);
                (printable(&name), value)
            });
            *fields = printed.collect();
        }
        _ => {}
    }
}

/// Returns `text`, which may have several lines, without other control characters.
pub(crate) fn terminal(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, character| {
        match is_unsafe(character) && character != '\n' {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
        shown
    })
}

/// Returns the JSON `text` with the same meaning, and with control characters escaped.
pub(crate) fn json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if is_unsafe(character) && character != '\n' {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                shown.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_shown_as_what_it_is() {
        for (text, shown) in [
            ("orders", "orders"),
            ("größe 日本語 🦀", "größe 日本語 🦀"),
            ("\u{1b}[2J\u{1b}]0;x\u{7}", "\\u{1b}[2J\\u{1b}]0;x\\u{7}"),
            ("a\nFAKE  ok\r\n\tb", "a\\nFAKE  ok\\r\\n\\tb"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("a\u{202e}b\u{2066}c", "a\\u{202e}b\\u{2066}c"),
            ("z\u{200b}w\u{feff}\u{7f}\u{e0041}", "z\\u{200b}w\\u{feff}\\u{7f}\\u{e0041}"),
            ("one\u{2028}two", "one\\u{2028}two"),
        ] {
            assert_eq!(printable(text), shown);
        }
        let long = "x".repeat(LONGEST + 7);
        assert_eq!(printable(&long), format!("{}… (7 more characters)", "x".repeat(LONGEST)));
        assert_eq!(terminal("a\n\u{1b}b\n"), "a\n\\u{1b}b\n");
    }

    #[test]
    fn names_and_values_of_an_answer_are_made_printable_however_deep_they_are() {
        let answer: BTreeMap<String, Vec<BTreeMap<String, String>>> =
            [("a\n".to_owned(), vec![[("k\u{1b}".to_owned(), "v\u{202e}".to_owned())].into()])].into();
        let shown = printable_answer(&answer).unwrap();
        assert_eq!(format!("{shown:?}"), r#"{"a\\n": [{"k\\u{1b}": "v\\u{202e}"}]}"#);
    }

    proptest! {
        #[test]
        fn nothing_deceptive_is_printed_and_json_keeps_its_meaning(text in any::<String>()) {
            prop_assert!(!printable(&text).chars().any(is_unsafe));
            prop_assert!(!terminal(&text).chars().any(|character| character != '\n' && is_unsafe(character)));
            let encoded = serde_json::to_string_pretty(&[&text]).unwrap();
            let shown = json(&encoded);
            prop_assert!(!shown.chars().any(|character| character != '\n' && is_unsafe(character)));
            prop_assert_eq!(serde_json::from_str::<Vec<String>>(&shown).unwrap(), [text]);
        }
    }
}
