//! The state file of vmesh-net.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tracing::warn;
use vmesh_capture::confirm::CommitRecord;
use vmesh_capture::machine::SavedState;
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;
use xxhash_rust::xxh3::xxh3_64;

const MAX_STATE: u64 = 16 << 20;
/// The beginning of the file. The hash of the remaining fields follows, in 16 hexadecimal digits.
const CHECKSUM: &str = "{\"checksum\":\"";

/// Writes the state file with its checksum.
pub(crate) fn save(state: &SavedState, path: &Path) -> Result<(), String> {
    let json = serde_json::to_string(state).map_err(|error| error.to_string())?;
    let text = with_checksum(&json);
    fsx::write_atomically(path, text.as_bytes(), fsx::PRIVATE).map_err(|error| one_line(&error))
}

/// Reads the state file. Returns `true` if it is complete and undamaged; otherwise the state contains only
/// the parts that this version understands.
pub(crate) fn load(path: &Path) -> (SavedState, bool) {
    let text = match fsx::read_capped(path, MAX_STATE) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return (SavedState::default(), true),
        Err(error) => {
            warn!(
                "could not read the state file, so no rule changes until the agent connects: {}",
                one_line(&error)
            );
            return (SavedState::default(), false);
        }
    };
    let error = match serde_json::from_slice::<SavedState>(&text) {
        Ok(state) if is_undamaged(&text) => return (state, true),
        Ok(state) => {
            warn!("the checksum of {} is wrong, so no rule changes until the agent connects", path.display());
            // The footprint is safe to use, because it can only lead to the removal of empty chains.
            let commit = CommitRecord { footprint: state.commit.footprint, ..CommitRecord::default() };
            return (SavedState { commit, ..SavedState::default() }, false);
        }
        Err(error) => error,
    };
    warn!("could not parse {}, so no rule changes until the agent connects: {error}", path.display());
    (parts(&text), false)
}

fn parts(text: &[u8]) -> SavedState {
    fn part<T: DeserializeOwned + Default>(of: &Value, name: &str) -> T {
        of.get(name).and_then(|part| T::deserialize(part).ok()).unwrap_or_default()
    }
    let all = serde_json::from_slice(text).unwrap_or(Value::Null);
    let footprint = part(all.get("commit").unwrap_or(&Value::Null), "footprint");
    let commit = CommitRecord { footprint, ..CommitRecord::default() };
    SavedState {
        commit,
        agent_facts: part(&all, "known"),
        failed_trial: part(&all, "refused"),
        memory: part(&all, "memory"),
    }
}

/// Inserts the checksum as the first field of the object `json`.
fn with_checksum(json: &str) -> String {
    let fields = json.strip_prefix('{').unwrap_or(json);
    format!("{CHECKSUM}{:016x}\",{fields}", xxh3_64(fields.as_bytes()))
}

/// Reports whether the checksum is correct. Earlier versions wrote none, which also counts as correct.
fn is_undamaged(text: &[u8]) -> bool {
    let Some(rest) = text.strip_prefix(CHECKSUM.as_bytes()) else { return true };
    let Some((digits, rest)) = rest.split_at_checked(16) else { return false };
    let Some(fields) = rest.strip_prefix(b"\",") else { return false };
    format!("{:016x}", xxh3_64(fields)).as_bytes() == digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bit_that_changes_is_noticed_and_a_file_of_an_earlier_version_is_read() {
        let json = serde_json::to_string(&SavedState::default()).unwrap();
        assert!(is_undamaged(json.as_bytes()), "an earlier version's");
        let text = with_checksum(&json);
        assert!(is_undamaged(text.as_bytes()));
        assert_eq!(serde_json::from_str::<SavedState>(&text).unwrap(), SavedState::default());
        for at in CHECKSUM.len()..text.len() {
            let mut damaged = text.clone().into_bytes();
            damaged[at] ^= 1;
            assert!(!is_undamaged(&damaged), "byte {at}");
        }
        assert!(!is_undamaged(&text.as_bytes()[..text.len() - 1]), "cut off");
    }
}
