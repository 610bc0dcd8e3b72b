//! Runs every seed, and every input that once broke something, through its target.

use std::fs;
use std::panic::catch_unwind;

use vmesh_fuzz::{TARGETS, Target};

#[test]
fn no_input_of_the_corpus_breaks_its_target() {
    let mut broken = Vec::new();
    for target in TARGETS {
        let corpus = target.corpus();
        let entries = fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
        let mut inputs = 0;
        for entry in entries {
            let path = entry.expect("an entry").path();
            let bytes = fs::read(&path).expect("an input");
            if catch_unwind(|| (target.run)(&bytes)).is_err() {
                broken.push(path);
            }
            inputs += 1;
        }
        assert!(inputs >= 3, "{} holds only {inputs} inputs", corpus.display());
    }
    assert!(broken.is_empty(), "inputs that break their targets: {broken:#?}");
}

/// `cargo xtask fuzz` finds the targets by the directories of their seeds.
#[test]
fn every_target_has_seeds_and_every_directory_of_seeds_a_target() {
    let corpus = TARGETS[0].corpus();
    let entries = fs::read_dir(corpus.parent().expect("a parent")).expect("the corpus");
    let mut directories: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
    directories.sort();
    assert_eq!(directories, TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
}

/// Short and generic inputs must break no target.
#[test]
fn no_target_is_broken_by_short_or_foreign_bytes() {
    let inputs: [&[u8]; 9] =
        [b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"{", b"[", b"\xef\xbb\xbf", &[0; 4096], &[b'['; 4096]];
    let mut broken = Vec::new();
    for Target { name, run } in TARGETS {
        for bytes in inputs {
            if catch_unwind(|| run(bytes)).is_err() {
                broken.push(format!("{name}: {:?} ({} bytes)", bytes.get(..8.min(bytes.len())), bytes.len()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
