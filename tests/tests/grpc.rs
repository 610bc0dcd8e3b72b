//! gRPC's own xDS client without an agent and without Envoy: it resolves `xds:///orders.mesh` through the
//! SotW stream.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use vmesh_testkit::place::Loopback;
use vmesh_testkit::process::Daemon;
use vmesh_testkit::{Failed, Result, python};
use vmesh_tests::{BOUND, Mesh};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/echo.py");

fn python(args: &[&str]) -> Result<Command> {
    let mut command = python::with(&["grpcio==1.85.1"])?.command(Path::new(SCRIPT));
    command.args(args);
    Ok(command)
}

async fn server(address: SocketAddr, name: &str) -> Result<Daemon> {
    let mut server = Daemon::spawn(name, python(&["serve", &address.to_string(), name])?)?;
    server.wait_line("serving", BOUND).await?;
    Ok(server)
}

fn orders(addresses: &[SocketAddr]) -> String {
    let listed: Vec<_> = addresses.iter().map(|address| format!("  - \"{address}\"\n")).collect();
    format!("service: orders\nprotocol: grpc\nendpoints:\n{}", listed.concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_resolves_and_calls_a_service_and_follows_its_changes() -> Result<()> {
    let place = Loopback::unique()?;
    let (one, two) = (SocketAddr::new(place.ip(), 8081), SocketAddr::new(place.ip(), 8082));
    let _one = server(one, "one").await?;
    let _two = server(two, "two").await?;
    let mesh = Mesh::start(&[("services.d/orders.yaml", &orders(&[one]))]).await?;

    let bootstrap = format!(
        "{{\"xds_servers\": [{{\"server_uri\": \"{}\", \"channel_creds\": [{{\"type\": \"insecure\"}}], \
         \"server_features\": [\"xds_v3\"]}}], \"node\": {{\"id\": \"py-1\"}}}}",
        mesh.xds
    );
    let mut command = python(&["call", "xds:///orders.mesh", "20"])?;
    command.env("GRPC_XDS_BOOTSTRAP_CONFIG", bootstrap).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = command.spawn().map_err(Failed::to("could not start the gRPC client"))?;
    let (Some(mut stdin), Some(stdout)) = (client.stdin.take(), client.stdout.take()) else {
        return Err(Failed::new("the gRPC client has no pipes"));
    };
    let mut lines = BufReader::new(stdout).lines();
    let mut answered = move || lines.next().transpose().ok().flatten().unwrap_or_default();

    assert_eq!(answered(), "answered by one");
    mesh.synced("py-1").await?;
    mesh.write("services.d/orders.yaml", &orders(&[one, two]))?;
    // The client does not report when it has applied a change, so the test repeats its calls.
    let mut last = String::new();
    for _ in 0..50 {
        writeln!(stdin).map_err(Failed::to("the gRPC client has ended"))?;
        last = answered();
        if last == "answered by one two" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(last, "answered by one two");
    let nodes = mesh.get("/api/v1/nodes").await?;
    assert_eq!(nodes["nodes"][0]["client"], "grpc", "{nodes}");
    assert_eq!(mesh.metric("vmesh_xds_nacks_total").await?, 0.0, "gRPC refused something");
    drop(stdin);
    client.wait().map_err(Failed::to("the gRPC client did not end"))?;
    Ok(())
}
