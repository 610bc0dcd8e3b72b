//! Watches a prefix of the KV store.

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use crate::client::{Client, Query, escaped};
use crate::watch::{Watch, WatchOptions};

/// A key and its value.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// The whole key, including the prefix.
    pub key: String,
    pub value: Vec<u8>,
    /// Grows with each write to the entry.
    pub modify_index: u64,
    /// An opaque number of the writer.
    pub flags: u64,
}

impl fmt::Debug for Entry {
    /// Omits the value, which may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes, index {})", self.key, self.value.len(), self.modify_index)
    }
}

/// All entries below a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entries {
    /// Sorted by key.
    pub entries: Vec<Entry>,
    /// True if Consul answered that the prefix does not exist (404). A token without read permission gets the
    /// same answer.
    pub absent: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawEntry {
    key: String,
    /// `null` stands for the empty value.
    #[serde(default)]
    value: Option<String>,
    #[serde(default)]
    modify_index: u64,
    #[serde(default)]
    flags: u64,
}

impl Client {
    /// Watches all keys that begin with `prefix`, such as `vmesh/documents/`. Needs `key_prefix "…" { policy =
    /// "read" }`.
    pub fn watch_keys(&self, prefix: &str, options: WatchOptions) -> Watch<Entries> {
        let prefix: Vec<_> = prefix.trim_start_matches('/').split('/').map(escaped).collect();
        let path = format!("/v1/kv/{}", prefix.join("/"));
        let query = Query { flags: &["recurse"], ..Query::default() };
        Watch::new(self.clone(), path, query, options, entries)
    }
}

/// Parses an answer of `/v1/kv/…?recurse`; `None` stands for a missing prefix.
fn entries(body: Option<&[u8]>) -> Result<Entries, String> {
    let Some(body) = body else { return Ok(Entries { entries: Vec::new(), absent: true }) };
    let raw: Vec<RawEntry> = serde_json::from_slice(body).map_err(|wrong| wrong.to_string())?;
    let entry = |raw: RawEntry| {
        let value = BASE64_STANDARD
            .decode(raw.value.unwrap_or_default())
            .map_err(|wrong| format!("the value of `{}` is not base64: {wrong}", raw.key))?;
        Ok(Entry { key: raw.key, value, modify_index: raw.modify_index, flags: raw.flags })
    };
    let mut entries = raw.into_iter().map(entry).collect::<Result<Vec<_>, String>>()?;
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(Entries { entries, absent: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_bytes_and_a_prefix_that_is_not_there_is_absent() {
        let body = br#"[{"Key":"b","Value":null,"ModifyIndex":3,"Flags":1,"LockIndex":0},
                        {"Key":"a","Value":"aGk=","ModifyIndex":2,"CreateIndex":2}]"#;
        let read = entries(Some(body)).unwrap();
        assert_eq!(format!("{:?}", read.entries), "[a (2 bytes, index 2), b (0 bytes, index 3)]");
        assert_eq!(read.entries[0].value, b"hi");
        assert!(entries(None).unwrap().absent);
        assert!(entries(Some(br#"[{"Key":"a","Value":"?"}]"#)).unwrap_err().starts_with("the value of `a`"));
        assert!(entries(Some(b"{}")).is_err());
    }
}
