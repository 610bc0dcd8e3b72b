//! Mesh documents as YAML or JSON, including successive versions of a file.

use std::sync::Arc;

use vmesh_model::load::{DocumentFile, Library};

use crate::{assert_printable, parts};

/// The parts of the input are successive versions of one file.
pub(crate) fn run(bytes: &[u8]) {
    let mut library = Library::default();
    for version in parts(bytes).take(4) {
        let file = DocumentFile { path: "mesh.d/a.yaml", content: Ok(version) };
        let (documents, problems) = library.update(&[file]);
        for problem in &problems {
            assert!(!problem.message.is_empty(), "a problem says nothing: {problem:?}");
            assert_printable(&problem.to_string());
        }
        let (again, _) = library.update(&[file]);
        assert!(Arc::ptr_eq(&documents, &again), "the same bytes made another set of documents");
    }
    // The restored documents must equal those in force.
    let restored = Library::restored(library.last_good());
    assert_eq!(restored.documents(), library.documents(), "a restart changed what is in force");
}
