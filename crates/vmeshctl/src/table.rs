//! Lays text out in columns.

/// Maximum number of characters in a cell, except in the last cell of a row. A service's name has at most 253 and is never cut.
const WIDEST: usize = 260;

/// Returns `text`, cut if it would push the other columns out of sight.
fn cut(text: &str) -> String {
    match text.char_indices().nth(WIDEST) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// Lays out `rows` in columns that are as wide as their widest cell, two spaces apart. The first row is the heading.
pub(crate) fn table<R: AsRef<[String]>>(rows: &[R]) -> String {
    let mut widths = vec![0; rows.first().map_or(0, |row| row.as_ref().len())];
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let row = row.as_ref();
            let last = row.len().saturating_sub(1);
            let cells = row.iter().enumerate();
            cells.map(|(index, cell)| if index == last { cell.clone() } else { cut(cell) }).collect()
        })
        .collect();
    for row in &rows {
        let but_last = row.len().saturating_sub(1);
        for (width, cell) in widths.iter_mut().zip(row.iter().take(but_last)) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
