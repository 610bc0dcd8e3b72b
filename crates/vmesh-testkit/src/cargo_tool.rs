//! Cargo's own tools, found on the machine or compiled once from the package registry.

use std::path::PathBuf;
use std::process::Command;

use crate::debian::on_path;
use crate::{Result, cache};

/// A tool that is run as `cargo NAME`.
#[derive(Debug)]
pub struct CargoTool {
    /// The name of the package and of the program: `cargo-nextest`.
    pub name: &'static str,
    /// The version to compile if the machine has none. A tool on the `PATH` is used in any version; its own
    /// configuration file can require a minimum.
    pub version: &'static str,
    pub default_features: bool,
    /// The time for compiling it on two cores in minutes, for the message.
    pub minutes: u32,
}

/// Runs each test in its own process.
pub const NEXTEST: CargoTool =
    CargoTool { name: "cargo-nextest", version: "0.9.143", default_features: false, minutes: 6 };

/// Checks dependencies against `deny.toml`. Without its default features it fetches nothing by itself.
pub const DENY: CargoTool =
    CargoTool { name: "cargo-deny", version: "0.20.2", default_features: false, minutes: 3 };

impl CargoTool {
    /// Returns the program, and compiles it first if the machine has none.
    ///
    /// # Errors
    /// If the tool cannot be compiled; the message has the last lines of the compiler.
    pub fn find(&self) -> Result<PathBuf> {
        if let Some(found) = on_path(self.name) {
            return Ok(found);
        }
        let CargoTool { name, version, default_features, minutes } = *self;
        let root = cache::get(&format!("{name}-{version}"), |work| {
            eprintln!("compiling {name} {version} (about {minutes} minutes, once)");
            let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            install
                .args(["install", "--quiet", "--locked", "--version", version, "--root"])
                .arg(work)
                .arg(name);
            if !default_features {
                install.arg("--no-default-features");
            }
            cache::run(&mut install, &format!("install it by hand: `cargo install --locked {name}`"))?;
            Ok(work.join("bin"))
        })?;
        Ok(root.join(name))
    }
}
