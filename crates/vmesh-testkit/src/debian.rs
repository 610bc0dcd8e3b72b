//! Programs from Debian packages, which are identified by their hash and not installed. The servers of tests
//! are run from them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Failed, Result, cache};

/// One package file.
#[derive(Debug, Clone, Copy)]
pub struct Deb {
    /// The path on every Debian mirror: `pool/main/c/consul/consul_1.8.7+dfsg1-2+b3_amd64.deb`.
    pub path: &'static str,
    pub sha256: &'static str,
}

impl Deb {
    fn file(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

/// Returns a directory in which `debs` are unpacked together, as they would be at `/`. The cache keeps it
/// under `name`.
///
/// Each file is looked up in `$VMESH_TOOLS_CACHE`, then fetched from the mirrors in the machine's own apt
/// sources. A file with another hash is never used.
pub fn unpacked(name: &str, debs: &[Deb]) -> Result<PathBuf> {
    cache::get(name, |work| {
        let root = work.join("root");
        make(&root)?;
        for deb in debs {
            let file = found(deb, work)?;
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("-x").arg(&file).arg(&root);
            cache::run(&mut unpack, "unpacking needs dpkg-deb: `apt-get install dpkg`")?;
        }
        Ok(root)
    })
}

/// Reports whether `$VMESH_TOOLS_CACHE` has one of these packages.
pub fn is_provided(debs: &[Deb]) -> bool {
    debs.iter().any(|deb| cache::provided(deb.file()).is_some())
}

/// Returns the program `name` from the PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths).map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn make(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Failed::to(format!("could not create {}", dir.display())))
}

fn found(deb: &Deb, work: &Path) -> Result<PathBuf> {
    let mut tried = Vec::new();
    if let Some(kept) = cache::provided(deb.file()) {
        match verified(&kept, deb) {
            Ok(()) => return Ok(kept),
            Err(failed) => tried.push(failed.to_string()),
        }
    }
    let to = work.join(deb.file());
    for mirror in mirrors() {
        let from = format!("{}/{}", mirror.trim_end_matches('/'), deb.path);
        eprintln!("fetching {} (once)", deb.file());
        match fetched(&from, &to).and_then(|()| verified(&to, deb)) {
            Ok(()) => return Ok(to),
            Err(failed) => tried.push(failed.to_string()),
        }
    }
    Err(Failed::new(format!(
        "no package {} with the SHA-256 {} could be had: put it into the directory that VMESH_TOOLS_CACHE names, or \
         add a Debian mirror that has it to the apt sources. Tried: {}",
        deb.file(),
        deb.sha256,
        if tried.is_empty() {
            "nothing, the apt sources name no mirror".to_owned()
        } else {
            tried.join("; ")
        }
    )))
}

fn verified(file: &Path, deb: &Deb) -> Result<()> {
    let output = Command::new("sha256sum")
        .arg(file)
        .output()
        .map_err(Failed::to("could not run sha256sum: `apt-get install coreutils`"))?;
    let hash = String::from_utf8_lossy(&output.stdout);
    // `sha256sum` prints a backslash before the sum if the name has special characters.
    if hash.trim_start_matches('\\').starts_with(deb.sha256) {
        return Ok(());
    }
    Err(Failed::new(format!("{} has another hash ({})", file.display(), hash.trim())))
}

/// Fetches a file with Python's urllib. Python is needed anyway for pip, and urllib uses the machine's proxy
/// settings.
pub(crate) fn fetched(from: &str, to: &Path) -> Result<()> {
    const SCRIPT: &str = "import shutil, sys, urllib.request\n\
        with urllib.request.urlopen(sys.argv[1], timeout=60) as answer, open(sys.argv[2], 'wb') as file:\n    \
        shutil.copyfileobj(answer, file)";
    let mut python = Command::new("python3");
    python.args(["-c", SCRIPT, from]).arg(to);
    cache::run(&mut python, "fetching needs Python 3: `apt-get install python3`")
        .map_err(|failed| Failed::new(failed.to_string().lines().last().unwrap_or_default().to_owned()))
}

/// Returns the mirrors in apt's sources, in the order in which apt reads them.
pub(crate) fn mirrors() -> Vec<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let directory = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten();
    let mut more: Vec<_> = directory.filter_map(|entry| Some(entry.ok()?.path())).collect();
    more.sort();
    files.extend(more);
    let mut mirrors = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        for uri in uris(&text) {
            if !mirrors.contains(&uri) {
                mirrors.push(uri);
            }
        }
    }
    mirrors
}

/// Returns the HTTP addresses in a sources file of either format: see sources.list(5).
fn uris(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let wanted = lines.filter_map(|line| {
        line.strip_prefix("URIs:")
            .or_else(|| line.strip_prefix("deb "))
            .or_else(|| line.strip_prefix("deb\t"))
    });
    let words = wanted.flat_map(str::split_whitespace);
    words
        .filter(|word| word.starts_with("http://") || word.starts_with("https://"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirrors_are_those_of_the_apt_sources() {
        let text = "Types: deb\n# URIs: http://not.example/\nURIs: http://one.example/debian https://two.example/debian\n\
                    Suites: bookworm\n";
        assert_eq!(uris(text), ["http://one.example/debian", "https://two.example/debian"]);
        let text = "# deb http://not.example/ x\ndeb [arch=amd64 signed-by=/x.gpg] http://three.example/debian bookworm main\n\
                    deb-src http://src.example/debian bookworm main\ndeb cdrom:[x]/ bookworm main\n";
        assert_eq!(uris(text), ["http://three.example/debian"]);
    }

    #[test]
    fn a_package_that_cannot_be_had_names_what_was_tried() {
        let deb = Deb { path: "pool/main/n/no/no-such_1_all.deb", sha256: "00" };
        let failed = unpacked("no-such", &[deb]).unwrap_err().to_string();
        assert!(
            failed.starts_with("no package no-such_1_all.deb with the SHA-256 00 could be had"),
            "{failed}"
        );
    }
}
