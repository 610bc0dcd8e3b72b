//! The last good state on disk, which a crash can truncate and another program can change.

use serde::de::DeserializeOwned;
use vmesh_catalog::state::{decode, encode};
use vmesh_discovery::Registrations;
use vmesh_model::NodeReport;
use vmesh_model::load::{Library, SavedDocument};

/// Uses the input first as a file, and then as the body of a file with a correct checksum.
pub(crate) fn run(bytes: &[u8]) {
    let Ok(body) = serde_json::from_slice::<serde_json::Value>(bytes) else {
        read(bytes);
        return;
    };
    if let Ok(whole) = encode(&body) {
        read(&whole);
        // A truncated file must be rejected.
        let cut = whole.get(..whole.len() - 1).unwrap_or_default();
        assert!(decode::<serde_json::Value>(cut).is_err(), "a file that was cut short was read");
    }
}

fn read(file: &[u8]) {
    part::<Registrations>(file);
    part::<Vec<NodeReport>>(file);
    if let Some(kept) = part::<Vec<SavedDocument>>(file) {
        _ = Library::restored(kept).documents();
    }
}

fn part<T: DeserializeOwned>(file: &[u8]) -> Option<T> {
    decode::<T>(file).ok()
}
