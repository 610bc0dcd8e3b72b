//! Lines that a discovery plug-in prints to its standard output.

use std::sync::Arc;

use vmesh_discovery::plugin::protocol::{PluginLine, read};

use crate::{assert_printable, files};

pub(crate) fn run(bytes: &[u8]) {
    let source = Arc::from("plugin:srv");
    for line in String::from_utf8_lossy(bytes).lines().take(16) {
        match read(&source, line) {
            Ok(PluginLine::View(view)) => files::check(&view.parsed, line.len()),
            Ok(PluginLine::Alive) => {}
            Ok(PluginLine::Failed(reason)) | Err(reason) => assert_printable(&reason),
        }
    }
}
