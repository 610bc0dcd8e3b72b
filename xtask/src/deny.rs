//! `cargo xtask deny`: checks the dependencies against `deny.toml`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use vmesh_testkit::cargo_tool::DENY;
use vmesh_testkit::{Failed, Result, tempdir};

use crate::build;

/// The environment variable with the path of a clone of the RustSec advisory database.
const DATABASE: &str = "VMESH_ADVISORY_DB";
/// The directory in which cargo-deny looks for its default database.
const CLONE: &str = "advisory-db-3157b0e258782691";

/// Checks licences, bans and sources, and advisories if a database is available.
pub(crate) fn run() -> Result<()> {
    let deny = DENY.find()?;
    let check = ["deny", "--log-level", "error", "check", "--hide-inclusion-graph"];
    build::run(&deny, "check the dependencies", &[&check[1..], &["licenses", "bans", "sources"]].concat())?;
    let Some(database) = std::env::var_os(DATABASE).map(PathBuf::from) else {
        println!(
            "advisories: NOT checked, since {DATABASE} names no database: \
             `git clone https://github.com/rustsec/advisory-db`, and set it to that directory"
        );
        return Ok(());
    };
    let database = fs::canonicalize(&database)
        .map_err(Failed::to(format!("{DATABASE} names {}, which cannot be read", database.display())))?;
    let dir = tempdir()?;
    let failed = || format!("could not prepare {} for cargo-deny", dir.display());
    symlink(&database, dir.join(CLONE)).map_err(Failed::to(failed()))?;
    let rules = build::root().join("deny.toml");
    let rules =
        fs::read_to_string(&rules).map_err(Failed::to(format!("could not read {}", rules.display())))?;
    let rules =
        rules.replace("[advisories]", &format!("[advisories]\ndb-path = {:?}", dir.display().to_string()));
    let config = dir.join("deny.toml");
    fs::write(&config, rules).map_err(Failed::to(failed()))?;
    let config = config.display().to_string();
    build::run(
        &deny,
        "check the dependencies for advisories",
        &["--log-level", "error", "--config", &config, "check", "--hide-inclusion-graph", "advisories"],
    )
}
