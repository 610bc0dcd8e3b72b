//! A Python with pinned packages.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, cache};

pub(crate) const INSTALL: &str = "it needs Python 3 with pip: `apt-get install python3 python3-pip`";

/// A Python interpreter with a set of packages.
#[derive(Debug, Clone)]
pub struct Python {
    packages: PathBuf,
}

/// Returns a Python with `packages`, each with its version (`grpcio==1.85.1`). The first use installs them in
/// the cache.
pub fn with(packages: &[&str]) -> Result<Python> {
    // Compiled packages work with one minor version of Python only.
    let version = version()?;
    let name = format!("python{version}-{}", packages.join("+").replace("==", "-"));
    let packages = cache::get(&name, |work| {
        eprintln!("installing {} for Python {version} (once)", packages.join(", "));
        let target = work.join("packages");
        let mut pip = Command::new("python3");
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-warn-script-location",
        ]);
        pip.args(["--only-binary=:all:", "--target"]).arg(&target).args(packages);
        cache::run(&mut pip, INSTALL)?;
        Ok(target)
    })?;
    Ok(Python { packages })
}

fn version() -> Result<String> {
    let mut python = Command::new("python3");
    python.args(["-c", "import sys; print('%d.%d' % sys.version_info[:2])"]);
    let output = python.output().map_err(|error| {
        crate::Failed::new(format!("could not run `{}` ({error}); {INSTALL}", cache::show(&python)))
    })?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Python {
    /// Builds the command `python3 script`, with the packages available.
    pub fn command(&self, script: &Path) -> Command {
        let mut python = Command::new("python3");
        python.env("PYTHONPATH", &self.packages).env("PYTHONUNBUFFERED", "1").arg(script);
        python
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_python_finds_the_pinned_packages() {
        let dir = crate::tempdir().unwrap();
        let script = dir.join("version.py");
        std::fs::write(&script, "import grpc; print(grpc.__version__)").unwrap();
        let output = with(&["grpcio==1.85.1"]).unwrap().command(&script).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "1.85.1\n", "{output:?}");
    }
}
