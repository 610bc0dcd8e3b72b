//! The encoding of the last good state, which a restarted control plane serves until its sources answer
//! again.
//!
//! Each part of the state is a header line with a checksum, followed by JSON. The caller writes it to a
//! temporary file, syncs and renames it. The state never expires: serving correct old data is better than
//! serving nothing.

use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: &str = "vmesh-state 1";

/// The reason why a text is not a valid part of the state.
#[derive(Debug, thiserror::Error)]
pub enum DamagedState {
    #[error("it has no header line")]
    NoHeader,
    #[error("its header is not `{MAGIC}` and a checksum")]
    ForeignHeader,
    #[error("its checksum does not match its content: it was cut short or changed")]
    Checksum,
    #[error("its content cannot be read: {0}")]
    Content(serde_json::Error),
}

/// Encodes one part of the state for the disk.
pub fn encode<T: Serialize>(part: &T) -> Result<Vec<u8>, serde_json::Error> {
    let body = serde_json::to_vec(part)?;
    let mut text = format!("{MAGIC} {:016x}\n", xxh3_64(&body)).into_bytes();
    text.extend_from_slice(&body);
    Ok(text)
}

/// Decodes one part of the state, and verifies its checksum.
pub fn decode<T: DeserializeOwned>(text: &[u8]) -> Result<T, DamagedState> {
    let end = text.iter().position(|b| *b == b'\n').ok_or(DamagedState::NoHeader)?;
    let (header, body) = text.split_at_checked(end).ok_or(DamagedState::NoHeader)?;
    let body = body.get(1..).unwrap_or_default();
    let sum = std::str::from_utf8(header)
        .ok()
        .and_then(|header| header.strip_prefix(MAGIC))
        .ok_or(DamagedState::ForeignHeader)?;
    if sum.trim() != format!("{:016x}", xxh3_64(body)) {
        return Err(DamagedState::Checksum);
    }
    serde_json::from_slice(body).map_err(DamagedState::Content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_encoded_is_decoded() {
        let text = encode(&vec!["orders"]).unwrap();
        assert_eq!(decode::<Vec<String>>(&text).unwrap(), ["orders"]);
    }

    #[test]
    fn damage_anywhere_is_noticed() {
        let text = encode(&vec!["orders", "payments"]).unwrap();
        for at in 0..text.len() {
            let mut flipped = text.clone();
            flipped[at] ^= 1;
            assert!(decode::<Vec<String>>(&flipped).is_err(), "a flipped bit at {at} went unnoticed");
            assert!(decode::<Vec<String>>(&text[..at]).is_err(), "a cut at {at} went unnoticed");
        }
    }
}
