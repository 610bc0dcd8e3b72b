//! `cargo xtask test`: builds the binaries that tests start, runs every test, and prints the slowest.

use std::fs;
use std::time::Duration;

use vmesh_testkit::cargo_tool::NEXTEST;
use vmesh_testkit::{Failed, Result, envoy};

use crate::build;

/// The number of slowest tests that are printed.
const SLOWEST: usize = 10;

/// Runs every test. `rest` are arguments for nextest.
pub(crate) fn run(rest: &[String]) -> Result<()> {
    envoy::find()?;
    let nextest = NEXTEST.find()?;
    build::cargo("build the binaries that the tests start", &["build", "--workspace", "--bins", "--locked"])?;
    let mut args = vec!["nextest", "run", "--workspace", "--locked"];
    args.extend(rest.iter().map(String::as_str));
    // The times are printed even if a test failed.
    let result = build::run(&nextest, "run the tests", &args);
    if let Err(failed) = print_slowest() {
        eprintln!("{failed}");
    }
    result
}

/// One test in nextest's report.
struct TestTime<'a> {
    binary: &'a str,
    name: &'a str,
    took: Duration,
}

fn print_slowest() -> Result<()> {
    let path = build::target()?.join("nextest/default/junit.xml");
    let text = fs::read_to_string(&path).map_err(Failed::to(format!("could not read {}", path.display())))?;
    let report = roxmltree::Document::parse(&text)
        .map_err(Failed::to(format!("could not read the report {}", path.display())))?;
    let mut times: Vec<TestTime<'_>> = report
        .descendants()
        .filter(|node| node.has_tag_name("testcase"))
        .filter_map(|node| {
            let took = Duration::try_from_secs_f64(node.attribute("time")?.parse().ok()?).ok()?;
            Some(TestTime { binary: node.attribute("classname")?, name: node.attribute("name")?, took })
        })
        .collect();
    times.sort_by_key(|test| std::cmp::Reverse(test.took));
    let all: Duration = times.iter().map(|test| test.took).sum();
    println!("\n{} tests took {} s one by one. The slowest:", times.len(), all.as_secs());
    for TestTime { binary, name, took } in times.iter().take(SLOWEST) {
        println!("{:>7.1} s  {binary} {name}", took.as_secs_f64());
    }
    Ok(())
}
