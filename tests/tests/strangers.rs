//! Untrusted clients: silent, greedy, with invented names, or a second control plane. The mesh keeps working.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use vmesh_proto::envoy::config::core::v3::{Locality, Node};
use vmesh_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use vmesh_testkit::process::{Daemon, binary};
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::{BOUND, Mesh};
use vmesh_xds::Kind;
use vmesh_xds::client::AdsStream;

const ORDERS: &str = "service: orders\nendpoints: [{address: \"10.0.0.1:80\", zone: a}]\n";

fn request(node: &str, zone: &str) -> DeltaDiscoveryRequest {
    let locality = Locality { zone: zone.into(), ..Locality::default() };
    DeltaDiscoveryRequest {
        node: Some(Node { id: node.into(), locality: Some(locality), ..Node::default() }),
        type_url: Kind::Cluster.type_url().to_owned(),
        ..DeltaDiscoveryRequest::default()
    }
}

/// Connects a client and waits until it has its clusters.
async fn client(xds: SocketAddr, node: &str, zone: &str) -> Result<AdsStream> {
    let mut stream =
        AdsStream::connect(&format!("http://{xds}")).await.map_err(Failed::to("could not connect"))?;
    stream.send(&request(node, zone)).await.map_err(Failed::to("could not ask"))?;
    tokio::time::timeout(BOUND, stream.next())
        .await
        .map_err(Failed::to("no answer came"))?
        .map_err(Failed::to("it was not served"))?;
    Ok(stream)
}

/// Sends a raw request to the API, and returns the status and the body.
fn ask(api: SocketAddr, request: &str) -> Result<String> {
    let mut stream = TcpStream::connect(api).map_err(Failed::to("could not connect to the API"))?;
    stream.set_read_timeout(Some(BOUND)).map_err(Failed::to("no timeout"))?;
    stream.write_all(request.as_bytes()).map_err(Failed::to("could not ask the API"))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(Failed::to("the API did not answer"))?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_stop_neither_xds_nor_the_api_nor_files_nor_the_state() -> Result<()> {
    let mut mesh = Mesh::prepare(&[("services.d/orders.yaml", ORDERS)])?;
    // The limit of file descriptors is the default of most systems, soft and hard.
    let mut command = Command::new("prlimit");
    command.args(["--nofile=1024:1024"]).arg(binary("vmesh-control")?).args(["--config", "control.yaml"]);
    command.current_dir(mesh.path(""));
    mesh.adopt_control(Daemon::spawn("vmesh-control", command)?).await?;
    let (xds, api) = (mesh.xds(), mesh.api());
    let mut silent = Vec::new();
    for i in 0..1500 {
        let to = if i % 10 == 0 { api } else { xds };
        silent.extend(TcpStream::connect_timeout(&to, BOUND).ok());
    }
    assert!(silent.len() > 1000, "{}", silent.len());
    let stream = client(xds, "web-1", "").await?;
    let two = ORDERS.replace("}]", "}, {address: \"10.0.0.2:80\"}]");
    mesh.write("services.d/orders.yaml", &two)?;
    mesh.until_endpoints("orders", &["10.0.0.1:80", "10.0.0.2:80"]).await?;
    wait_for("the state to be written", BOUND, async || {
        let text = mesh.kept_state();
        if text.contains("10.0.0.2:80") { Ok(()) } else { Err(text) }
    })
    .await?;
    let listeners =
        DeltaDiscoveryRequest { type_url: Kind::Listener.type_url().to_owned(), ..request("web-1", "") };
    stream.send(&listeners).await.map_err(Failed::to("the stream has ended"))?;
    assert!(mesh.metric("vmesh_xds_connections").await? < 700.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_answers_only_for_loopback_and_nobody_who_does_not_read_costs_much() -> Result<()> {
    let services: String = (0..3000)
        .map(|i| {
            format!("---\nservice: orders-with-a-long-name-{i}\nendpoints: [\"10.0.0.1:{}\"]\n", 1000 + i)
        })
        .collect();
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", services.trim_start_matches("---\n"))]).await?;
    let (xds, api) = (mesh.xds(), mesh.api());
    let _web = client(xds, "web-1", "").await?;
    for (host, status) in [
        ("Host: localhost\r\n".to_owned(), "200"),
        (format!("Host: {api}\r\n"), "200"),
        (String::new(), "400"),
        ("Host: evil.example\r\n".to_owned(), "403"),
    ] {
        let answer = ask(api, &format!("GET /api/v1/status HTTP/1.1\r\n{host}Connection: close\r\n\r\n"))?;
        assert_eq!(answer.split(' ').nth(1), Some(status), "{host}: {answer}");
    }
    let before = mesh.control()?.anonymous_bytes()?;
    let asked = format!("GET /api/v1/nodes/web-1/config HTTP/1.1\r\nHost: {api}\r\n\r\n");
    let mut unread = Vec::new();
    for _ in 0..400 {
        let mut stream = TcpStream::connect(api).map_err(Failed::to("could not connect to the API"))?;
        _ = stream.write_all(asked.as_bytes());
        unread.push(stream);
    }
    // A change reaches new clients meanwhile, and the API still answers clients that read. These wait for
    // earlier connections: the API serves 64 at a time, and gives up each after 5 s.
    let _other = client(xds, "web-2", "").await?;
    wait_for("an answer of the API", Duration::from_secs(120), async || {
        mesh.get("/api/v1/revision").await.map_err(|failed| failed.to_string())
    })
    .await?;
    let more = mesh.control()?.anonymous_bytes()?.saturating_sub(before);
    assert!(more < 256 << 20, "{} MiB more", more >> 20);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn invented_names_and_zones_cost_no_more_than_their_limit() -> Result<()> {
    let document = "kind: Mesh\nload_balancing: {locality: prefer_local}\n";
    let files = [("services.d/orders.yaml", ORDERS), ("mesh.d/mesh.yaml", document)];
    let mut mesh = Mesh::prepare_on(
        "  - file: {path: services.d}\n",
        "documents: {dir: mesh.d}\nlimits: {nodes: 50}\n",
        &files,
    )?;
    mesh.start_control().await?;
    let xds = mesh.xds();
    let stays = client(xds, "stays", "a").await?;
    for i in 0..200 {
        drop(client(xds, &format!("invented-{i}"), &format!("zone-{i}")).await?);
    }
    wait_for("all but one to be offline", BOUND, async || {
        let nodes = mesh.get("/api/v1/nodes").await.map_err(|failed| failed.to_string())?;
        let nodes = nodes["nodes"].as_array().cloned().unwrap_or_default();
        let connected: Vec<_> = nodes.iter().filter(|node| node["connected"] == true).collect();
        match (nodes.len(), &connected[..]) {
            (0..=50, [node]) if node["name"] == "stays" => Ok(()),
            (known, _) => Err(format!("{known} nodes, {connected:?}")),
        }
    })
    .await?;
    assert!(mesh.metric("vmesh_classes").await? <= 8.0, "{}", mesh.metric("vmesh_classes").await?);
    drop(stays);
    // The limit also holds over a restart, although each name has a file.
    mesh.control()?.terminate(BOUND).await?;
    mesh.start_control().await?;
    let nodes = mesh.get("/api/v1/nodes").await?["nodes"].as_array().map_or(0, Vec::len);
    assert!((2..=50).contains(&nodes), "{nodes}");
    let socket = format!("unix:{}", mesh.path("state/control/api.sock").display());
    let forgotten = mesh.ctl(&["--api", &socket, "forget", "--offline-for", "1h"])?;
    assert_eq!(String::from_utf8_lossy(&forgotten.stdout), "0 nodes are forgotten\n");
    let forgotten = mesh.ctl(&["--api", &socket, "forget", "--offline-for", "1ms"])?;
    assert_eq!(String::from_utf8_lossy(&forgotten.stdout), format!("{nodes} nodes are forgotten\n"));
    wait_for("no node to be known", BOUND, async || {
        let nodes = mesh.get("/api/v1/nodes").await.map_err(|failed| failed.to_string())?;
        if nodes["nodes"].as_array().is_some_and(Vec::is_empty) { Ok(()) } else { Err(nodes.to_string()) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_control_plane_leaves_the_state_of_the_first_alone_and_no_signal_of_a_script_kills()
-> Result<()> {
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", ORDERS)]).await?;
    let pid = mesh.control()?.pid();
    fs::write(mesh.path("state/control/.nodes.json.1-0.vmesh-tmp"), "half").map_err(Failed::to("no file"))?;
    let mut second = mesh.spawn_control()?;
    let status = second.wait_exit(BOUND).await?;
    assert!(!status.success());
    let message = second.output();
    assert!(
        message.contains("is locked by vmesh-control (pid ") && message.contains(&pid.to_string()),
        "{message}"
    );
    let dir = mesh.path("");
    let mode = |file: &str| fs::metadata(dir.join(file)).map(|metadata| metadata.mode() & 0o777).ok();
    assert_eq!((mode("state/control"), mode("state/control/lock")), (Some(0o700), Some(0o600)));
    for signal in [Signal::HUP, Signal::USR1, Signal::USR2] {
        mesh.control()?.signal(signal)?;
    }
    mesh.control()?.wait_line("SIGHUP: every discovery source is read again", BOUND).await?;
    mesh.control()?.wait_line("SIGUSR2 changes nothing", BOUND).await?;
    assert!(mesh.get("/api/v1/status").await?["ready"] == true);
    assert!(mesh.control()?.terminate(BOUND).await?.success());
    mesh.start_control().await?;
    assert_eq!(mode("state/control/.nodes.json.1-0.vmesh-tmp"), None, "what a killed writer left is swept");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_could_not_be_written_is_written_as_soon_as_there_is_room() -> Result<()> {
    let mut mesh = Mesh::prepare(&[("services.d/orders.yaml", ORDERS)])?;
    let state = mesh.path("state/control");
    fs::create_dir_all(&state).map_err(Failed::to("no directory"))?;
    let until_kept = async |mesh: &Mesh, text: &str| {
        wait_for(format!("the state to have {text}"), BOUND, async || match mesh.kept_state() {
            all if all.contains(text) => Ok(()),
            all => Err(all),
        })
        .await
    };
    let run = |command: &mut Command| -> Result<()> {
        let status = command.status().map_err(Failed::to("could not start a command"))?;
        if status.success() { Ok(()) } else { Err(Failed::new(format!("{command:?} failed: {status}"))) }
    };
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(&state))?;
    let outcome: Result<()> = async {
        mesh.start_control().await?;
        until_kept(&mesh, "10.0.0.1:80").await?;
        let filled = fs::write(state.join("fill"), vec![0; 1 << 20]);
        assert!(filled.is_err(), "the disk is full");
        mesh.write("services.d/orders.yaml", &ORDERS.replace("10.0.0.1", "10.0.0.2"))?;
        let problem = mesh.problem("the last good state").await?;
        assert!(problem.contains("could not") && problem.contains("tried again"), "{problem}");
        assert!((mesh.metric("vmesh_state_unwritten").await? - 1.0).abs() < f64::EPSILON);
        fs::remove_file(state.join("fill")).map_err(Failed::to("no file"))?;
        until_kept(&mesh, "10.0.0.2:80").await?;
        wait_for("the problem to be gone", BOUND, async || {
            match mesh.metric("vmesh_state_unwritten").await.map_err(|failed| failed.to_string())? {
                unwritten if unwritten < 0.5 => Ok(()),
                unwritten => Err(unwritten.to_string()),
            }
        })
        .await?;
        mesh.control()?.terminate(BOUND).await.map(drop)
    }
    .await;
    run(Command::new("umount").arg("--lazy").arg(&state))?;
    outcome
}
