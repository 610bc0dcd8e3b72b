//! Bad input affects only itself: it is reported with its place, and nothing that worked before is lost.
//!
//! The tables next to each parser have more cases. This test shows that a running control plane keeps the
//! rule.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::vm::{Rules, Site};
use vmesh_tests::{BOUND, Mesh};
use vmesh_xds::Kind;
use vmesh_xds::client::AdsStream;

const ORDERS: &str = "service: orders\nprotocol: http\nendpoints: [\"10.0.0.1:80\", \"10.0.0.2:80\"]\n";

/// The file, its bad content, and the expected problem. The endpoints of `orders` were valid before, so they
/// must stay.
const FILES: &[(&str, &str, &str)] = &[
    (
        "services.d/orders.yaml",
        "service: orders\nprotocl: http\nendpoints: [\"10.0.0.1:80\"]\n",
        "services.d/orders.yaml:2:1: unknown field `protocl`, did you mean `protocol`?",
    ),
    (
        "services.d/orders.yaml",
        "service: orders\nendpoints: 7\n",
        "services.d/orders.yaml:2:12: `endpoints`: expected a list",
    ),
    ("services.d/orders.yaml", "", "services.d/orders.yaml: the file is empty"),
    (
        "services.d/orders.yaml",
        "service: orders\nendpoints: [\"10.0.0.1:80\"",
        "services.d/orders.yaml:2:12:",
    ),
    ("services.d/more.yaml", "service: orders\nendpoints: [\"10.0.0.9:80\"]\n", "services.d/more.yaml"),
    (
        "services.d/ports.yaml",
        "service: ports\nendpoints: [\"10.0.0.1:0\", \"10.0.0.2:80\"]\n",
        "services.d/ports.yaml:2:13: ",
    ),
    (
        "services.d/big-ports.yaml",
        "service: big-ports\nendpoints: [\"10.0.0.1:70000\", \"10.0.0.2:80\"]\n",
        "port 70000 is out of range: 1 to 65535",
    ),
    (
        "services.d/address.yaml",
        "service: address\nendpoints: [\"10.0.0.256:80\", \"10.0.0.2:80\"]\n",
        "`10.0.0.256` is neither an IP address nor a host name",
    ),
    (
        "mesh.d/orders.yaml",
        "kind: Route\nservice: orders\nrules:\n  - split: [{subset: v1, weight: 0}]\n",
        "mesh.d/orders.yaml:4:",
    ),
    (
        "mesh.d/orders.yaml",
        "kind: Route\nservice: orders\nrules:\n  - split: [{subset: v9}]\n",
        "mesh.d/orders.yaml:4:22: ",
    ),
    (
        "mesh.d/orders.yaml",
        "kind: Route\nservice: orders\nrules:\n  - split: [{service: odrers}]\n",
        "`odrers`, which no discovery source and no document knows: did you mean `orders`?",
    ),
    (
        "mesh.d/circle.yaml",
        "kind: Route\nservice: a\nrules: [{redirect: {service: b}}]\n---\nkind: Route\nservice: b\nrules: [{redirect: {service: a}}]\n",
        "a -> b -> a",
    ),
    (
        "mesh.d/nodes.yaml",
        "kind: Node\nname: web-1\n---\nkind: Node\nname: web-1\n",
        "mesh.d/nodes.yaml:4:1: ",
    ),
    ("mesh.d/kind.yaml", "kind: Servce\nname: orders\n", "did you mean `Service`?"),
];

#[tokio::test(flavor = "multi_thread")]
async fn no_file_stops_the_daemon_or_empties_a_service() -> Result<()> {
    let good = "kind: Service\nname: orders\nsubsets: {v1: {version: v1}}\n";
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", ORDERS), ("mesh.d/service.yaml", good)]).await?;
    mesh.until_endpoints("orders", &["10.0.0.1:80", "10.0.0.2:80"]).await?;
    for (file, text, message) in FILES {
        mesh.write(file, text)?;
        let problem = mesh.problem(message).await?;
        assert!(!problem.contains(" serde"), "{problem}");
        assert_eq!(mesh.endpoints("orders").await?, ["10.0.0.1:80", "10.0.0.2:80"], "after {message}");
        if *file == "services.d/orders.yaml" {
            mesh.write(file, ORDERS)?;
        } else {
            mesh.remove(file)?;
        }
        wait_for("the problem to be gone", BOUND, async || {
            let problems = mesh.problems().await.map_err(|failed| failed.to_string())?;
            if problems.iter().any(|problem| problem.contains(message)) {
                Err(problems.join("\n"))
            } else {
                Ok(())
            }
        })
        .await?;
    }
    assert!(mesh.control()?.has_exited().is_none());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_text_file_is_named_and_left_alone() -> Result<()> {
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", ORDERS)]).await?;
    fs::write(mesh.path("services.d/latin.yaml"), b"service: caf\xe9\n").expect("written");
    mesh.problem("services.d/latin.yaml:1:13: ").await?;
    let huge = fs::File::create(mesh.path("services.d/huge.yaml")).expect("created");
    huge.set_len(50 << 20).expect("extended");
    drop(huge);
    mesh.problem("services.d/huge.yaml: ").await?;
    let fifo = mesh.path("services.d/fifo.yaml");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo runs").success());
    mesh.problem("services.d/fifo.yaml: ").await?;
    symlink("loop.yaml", mesh.path("services.d/loop.yaml")).expect("linked");
    mesh.problem("services.d/loop.yaml: ").await?;
    assert!(
        Command::new("mkfifo").arg(mesh.path("mesh.d/fifo.yaml")).status().expect("mkfifo runs").success()
    );
    mesh.problem("mesh.d/fifo.yaml: it is not a file").await?;
    let huge = fs::File::create(mesh.path("mesh.d/huge.yaml")).expect("created");
    huge.set_len(50 << 20).expect("extended");
    drop(huge);
    mesh.problem("mesh.d/huge.yaml: ").await?;
    assert_eq!(mesh.endpoints("orders").await?, ["10.0.0.1:80", "10.0.0.2:80"]);
    // The control plane still reads good files.
    mesh.write("services.d/orders.yaml", &ORDERS.replace("10.0.0.2", "10.0.0.3"))?;
    mesh.until_endpoints("orders", &["10.0.0.1:80", "10.0.0.3:80"]).await?;
    assert!(mesh.control()?.has_exited().is_none());
    Ok(())
}

fn request(kind: &str, node: Option<&str>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.to_owned(),
        node: node.map(|id| Node { id: id.to_owned(), ..Node::default() }),
        ..DeltaDiscoveryRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_stops_the_daemon_or_another_stream() -> Result<()> {
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", ORDERS)]).await?;
    let uri = format!("http://{}", mesh.xds);
    let clusters = Kind::Cluster.type_url();

    // A well-behaved stream, which is checked again at the end.
    let mut well = AdsStream::connect(&uri).await.expect("connected");
    well.send(&request(clusters, Some("well"))).await.expect("sent");
    assert_eq!(well.next().await.expect("an answer").resources.len(), 1);

    for (what, wrong, message) in [
        ("no node", request(clusters, None), "the first request of a stream must have `node.id`"),
        ("no node id", request(clusters, Some("")), "the first request of a stream must have `node.id`"),
        ("a name that is none", request(clusters, Some("a b")), "`a b` is not a node name"),
        ("no type", request("", Some("bad")), "an aggregated stream needs `type_url` in every request"),
    ] {
        let mut stream = AdsStream::connect(&uri).await.expect("connected");
        stream.send(&wrong).await.expect("sent");
        let refusal = stream.next().await.expect_err(what).to_string();
        assert!(refusal.contains("InvalidArgument") && refusal.contains(message), "{what}: {refusal}");
    }

    // A type that is not served: it gets no response, and the stream stays open.
    let mut stream = AdsStream::connect(&uri).await.expect("connected");
    stream.send(&request("type.googleapis.com/no.such.Type", Some("odd"))).await.expect("sent");
    let mut many = request(clusters, None);
    many.resource_names_subscribe = (0..50_000).map(|number| format!("no-such-cluster-{number}")).collect();
    many.resource_names_subscribe.push("*".to_owned());
    stream.send(&many).await.expect("sent");
    let answer = stream.next().await.expect("an answer");
    assert_eq!(answer.resources.len(), 1);
    assert_eq!(answer.removed_resources.len(), 50_000);

    // The request subscribes to more names than a stream may have.
    let mut stream = AdsStream::connect(&uri).await.expect("connected");
    let mut far_too_many = request(Kind::Endpoint.type_url(), Some("greedy"));
    far_too_many.resource_names_subscribe = (0..500_000).map(|number| format!("{number}")).collect();
    stream.send(&far_too_many).await.expect("sent");
    let refusal = stream.next().await.expect_err("refused").to_string();
    assert!(refusal.contains("ResourceExhausted"), "{refusal}");

    // The client does not speak HTTP/2.
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff"]
    {
        let mut socket = TcpStream::connect(mesh.xds).expect("connected");
        _ = socket.write_all(garbage);
    }
    let mut deaf = TcpStream::connect(mesh.xds).expect("connected");
    deaf.write_all(b"PRI").expect("written");

    mesh.write("services.d/orders.yaml", &ORDERS.replace("http", "http2"))?;
    let ack = DeltaDiscoveryRequest { response_nonce: "1".to_owned(), ..request(clusters, None) };
    well.send(&ack).await.expect("sent");
    let changed = tokio::time::timeout(Duration::from_secs(10), well.next()).await;
    assert_eq!(changed.expect("in time").expect("an answer").resources.len(), 1);
    assert!(mesh.control()?.has_exited().is_none());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hosts_of_one_name_are_a_problem_and_both_are_served() -> Result<()> {
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", ORDERS)]).await?;
    mesh.agent("web-1", &["orders"], "").await?;
    mesh.synced("web-1").await?;
    // A clone of the machine has the same name and another address.
    mesh.agent("web-1-clone", &["orders"], "").await?;
    mesh.synced("web-1-clone").await?;
    mesh.agent_daemon("web-1-clone")?.terminate(BOUND).await?;
    mesh.rename_agent("web-1-clone", "web-1")?;
    mesh.restart_agent("web-1-clone")?;
    let problem = mesh.problem("two hosts go by the name `web-1`").await?;
    assert!(problem.contains("give each its own `node.name`"), "{problem}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_are_copies_of_one_another_are_told_apart_by_where_they_come_from() -> Result<()> {
    let site = Site::start(&[("services.d/orders.yaml", ORDERS)]).await?;
    let mut vms = Vec::new();
    for number in 1..=2 {
        let mut vm = site.vm(&format!("vm-{number}"), Rules::Nft, "upstreams: [orders]").await?;
        let config = fs::read_to_string(vm.config_file()).unwrap_or_default();
        let (before, after) = config.split_once("node: ").unwrap_or_default();
        let after = after.split_once('}').unwrap_or_default().1;
        // The configuration comes from an image: it contains a node name and no address.
        let copied = format!("{before}node: {{name: web}}{after}");
        fs::write(vm.config_file(), copied).map_err(vmesh_testkit::Failed::to("could not write"))?;
        vm.start_agent()?;
        vms.push(vm);
    }
    let message = wait_for("the problem", BOUND, async || match site.control_api("/api/v1/problems")? {
        message if message.contains("two hosts go by the name `web`") => Ok(message),
        message => Err(vmesh_testkit::Failed::new(message)),
    })
    .await?;
    for vm in &vms {
        assert!(message.contains(&format!("one from {}", vm.host.v4)), "{message}");
    }
    assert!(site.control_api("/metrics")?.contains("vmesh_shared_node_names 1"));
    let logged = wait_for("the log to say so", BOUND, async || match site.control_output() {
        message if message.contains("two hosts go by the name") => Ok(message),
        message => Err(vmesh_testkit::Failed::new(message)),
    })
    .await?;
    assert_eq!(logged.matches("two hosts go by the name").count(), 1, "{logged}");

    // With its own name, the clone is another node.
    if let Some(agent) = &mut vms[1].agent {
        agent.kill()?;
    }
    wait_for("the clone to go", BOUND, async || match site.control_api("/metrics")? {
        message if message.contains("vmesh_shared_node_names 0") => Ok(()),
        message => Err(vmesh_testkit::Failed::new(message)),
    })
    .await?;
    assert!(!site.control_api("/api/v1/problems")?.contains("two hosts go by"));
    Ok(())
}
