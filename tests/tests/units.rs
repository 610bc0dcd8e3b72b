//! The unit files and packages: their confinement scores, their content as dpkg sees it, and their example
//! configurations.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmesh_testkit::debian::on_path;
use vmesh_testkit::hosts::{Root, Suite};
use vmesh_testkit::process::binary;
use vmesh_testkit::{Failed, Result, tempdir};
use vmesh_tests::hosts::Packages;

fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn the_unit_of_vmesh_net_lets_it_dial_what_it_tests_captures_with() -> Result<()> {
    let unit = read(&tree().join("systemd/vmesh-net.service"))?;
    let allowed = unit.lines().find_map(|line| line.strip_prefix("IPAddressAllow=")).unwrap_or_default();
    for address in vmesh_capture::spec::SELF_TESTS {
        let address = address.ip().to_string();
        assert!(allowed.split(' ').any(|one| one == address), "{address} is not in IPAddressAllow={allowed}");
    }
    Ok(())
}

/// The limit of the exposure score, from 10 (unconfined) to 0.
const WORST: f64 = 2.0;

fn analyze() -> Result<Command> {
    match on_path("systemd-analyze") {
        Some(path) => Ok(Command::new(path)),
        None => Ok(Root::get(Suite::Bookworm)?.command("systemd-analyze")),
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Failed::to(format!("could not read {}", path.display())))
}

fn services() -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(tree().join("systemd")).map_err(Failed::to("could not list the units"))?;
    let mut all: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    all.retain(|path| path.extension().is_some_and(|extension| extension == "service"));
    all.sort();
    Ok(all)
}

/// Returns the score that `systemd-analyze security` prints. Its exit status alone is not reliable.
fn score(unit: &Path) -> Result<f64> {
    let mut command = analyze()?;
    let output = command.args(["security", "--no-pager", "--offline=true"]).arg(unit).output();
    let output = output.map_err(Failed::to("could not run systemd-analyze"))?;
    let message = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = message.lines().rev().find(|line| line.contains("Overall exposure level")).unwrap_or_default();
    let number = line.rsplit_once(": ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    number.ok_or_else(|| {
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        Failed::new(format!("systemd-analyze printed no score for {}: {message}{errors}", unit.display()))
    })
}

#[test]
fn every_unit_is_confined() -> Result<()> {
    let units = services()?;
    assert!(units.len() >= 5, "{units:?}");
    for unit in &units {
        let score = score(unit)?;
        eprintln!("{score} {}", unit.display());
        assert!(score <= WORST, "{}: {score} is above {WORST}", unit.display());
    }
    Ok(())
}

/// The drop-in replaces an empty set, so its lines can be appended to the unit.
#[test]
fn envoy_is_confined_with_what_tproxy_needs_too() -> Result<()> {
    let drop_in = read(&tree().join("systemd/examples/vmesh-envoy-tproxy.conf"))?;
    let mut unit = read(&tree().join("systemd/vmesh-envoy.service"))?;
    for line in drop_in.lines().filter(|line| line.contains("CAP_")) {
        if let Some((name, _)) = line.split_once('=').filter(|(name, _)| !name.starts_with('#')) {
            let empty = format!("\n{name}=\n");
            assert!(unit.contains(&empty), "{name}");
            unit = unit.replace(&empty, &format!("\n{line}\n"));
        }
    }
    assert!(unit.contains("\nAmbientCapabilities=CAP_NET_ADMIN\n"), "{unit}");
    let dir = tempdir()?;
    let path = dir.join("vmesh-envoy.service");
    fs::write(&path, unit).map_err(Failed::to("could not write a unit"))?;
    let score = score(&path)?;
    assert!(score <= WORST, "{score}");
    Ok(())
}

/// A setting in the wrong section has no effect, and systemd only warns about it.
#[test]
fn every_unit_is_read_without_a_warning() -> Result<()> {
    let mut paths = services()?;
    paths.extend(["vmesh.target", "vmesh.slice"].map(|unit| tree().join("systemd").join(unit)));
    let output = analyze()?.args(["verify", "--no-pager"]).args(&paths).output();
    let output = output.map_err(Failed::to("could not run systemd-analyze"))?;
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    // The programs are not installed on this machine, nor are the manual pages that its own units refer to.
    let ours = |line: &&str| {
        line.contains("vmesh")
            && !line.contains("is not executable")
            && !line.contains("No such file or directory")
    };
    let lines: Vec<&str> = message.lines().filter(ours).collect();
    assert!(lines.is_empty(), "{}", lines.join("\n"));
    Ok(())
}

fn dpkg_deb(words: &[&str], deb: &Path) -> Result<String> {
    let output = Command::new("dpkg-deb").args(words).arg(deb).output();
    let output = output.map_err(Failed::to("could not run dpkg-deb: `apt-get install dpkg`"))?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn packages_are_the_same_bytes_each_time_and_hold_what_they_name() -> Result<()> {
    let (one, other) = (Packages::make("0.1.0")?, Packages::make("0.1.0")?);
    for (one, other) in [(&one.agent, &other.agent), (&one.control, &other.control)] {
        let bytes = |path: &PathBuf| fs::read(path).map_err(Failed::to("could not read a package"));
        assert!(bytes(one)? == bytes(other)?, "{} differs from itself", one.display());
        let listed = dpkg_deb(&["--contents"], one)?;
        for line in listed.lines() {
            assert!(line.contains(" root/root "), "{line}");
        }
        for script in ["preinst", "postinst", "prerm", "postrm"] {
            let text = dpkg_deb(&["--info"], one).and_then(|_| {
                let output = Command::new("dpkg-deb").arg("--info").arg(one).arg(script).output();
                let output = output.map_err(Failed::to("could not run dpkg-deb"))?;
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            })?;
            assert!(text.starts_with("#!/bin/sh\n") && text.contains("\nset -e\n"), "{script}: {text}");
        }
    }
    let agent = dpkg_deb(&["--contents"], &one.agent)?;
    for wanted in [
        "./usr/bin/vmesh-agent",
        "./usr/bin/vmeshctl",
        "./usr/sbin/vmesh-net",
        "./usr/lib/vmesh/bypass",
        "./lib/systemd/system/vmesh-envoy.service",
        "./usr/lib/sysusers.d/vmesh.conf",
        "./usr/share/doc/vmesh-agent/copyright",
        "./usr/share/doc/vmesh-agent/changelog.gz",
    ] {
        assert!(agent.lines().any(|line| line.ends_with(wanted)), "{wanted} is missing:\n{agent}");
    }
    // The programs that the units start are in the package.
    for unit in services()? {
        let text = read(&unit)?;
        for line in text.lines().filter(|line| line.starts_with("Exec")) {
            let program =
                line.split_once('=').map_or("", |(_, command)| command.trim_start_matches(['+', '-']));
            let program = program.split(' ').next().unwrap_or_default();
            let ours = program.contains("vmesh");
            let all = [agent.as_str(), &dpkg_deb(&["--contents"], &one.control)?].concat();
            assert!(!ours || all.lines().any(|line| line.ends_with(&format!(".{program}"))), "{program}");
        }
    }
    Ok(())
}

#[test]
fn the_examples_of_the_packages_are_accepted() -> Result<()> {
    let agent = tree().join("packaging/vmesh-agent/agent.yaml");
    let output = Command::new(binary("vmesh-agent")?).arg("--check").arg("--config").arg(&agent).output();
    let output = output.map_err(Failed::to("could not run vmesh-agent"))?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The sources of the example do not exist here. The control plane reports this problem, and no other.
    let control = tree().join("packaging/vmesh-control/control.yaml");
    let output = Command::new(binary("vmesh-control")?).arg("--check").arg("--config").arg(&control).output();
    let output = output.map_err(Failed::to("could not run vmesh-control"))?;
    assert_ne!(output.status.code(), Some(64), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
