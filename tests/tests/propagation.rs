//! The cost of a change, measured by counters.

use std::time::Duration;

use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::{BOUND, Mesh};
use vmesh_xds::Kind;
use vmesh_xds::client::BenchClient;

const SERVICES: usize = 1_000;
const STREAMS: usize = 50;

fn service(number: usize, weight: u32) -> String {
    let endpoints: String = (0..10u32)
        .map(|at| {
            let weight = if at == 0 { weight } else { 1 };
            format!(
                "  - {{address: \"10.1.{}.{}:{}\", version: v1, weight: {weight}}}\n",
                number % 250,
                at + 1,
                8000 + number / 250
            )
        })
        .collect();
    format!("service: service-{number}\nprotocol: http\nendpoints:\n{endpoints}")
}

#[tokio::test(flavor = "multi_thread")]
async fn one_endpoint_is_one_encoding() -> Result<()> {
    let mut mesh = Mesh::prepare(&[])?;
    for number in 0..SERVICES {
        mesh.write(&format!("services.d/service-{number}.yaml"), &service(number, 1))?;
    }
    // Routes make a service depend on others. Even then a changed endpoint is sent as an endpoint only.
    mesh.write(
        "mesh.d/routes.yaml",
        "kind: Service\nname: service-7\nsubsets: {v1: {version: v1}}\n---\nkind: Route\nservice: service-7\nrules:\n  \
         - match: {path: {prefix: /a}}\n    split: [{service: service-8}]\n",
    )?;
    mesh.start_control().await?;
    let mut clients = Vec::new();
    for number in 0..STREAMS {
        let node = Node { id: format!("node-{number}"), ..Node::default() };
        let mut client =
            BenchClient::connect(&format!("http://{}", mesh.xds), node).await.expect("connected");
        // After all endpoints and the empty response for listeners, nothing else will arrive.
        let (mut held, mut listeners) = (0, false);
        while held < SERVICES + 1 || !listeners {
            let observed = client.next().await.expect("a response");
            match observed.kind {
                Some(Kind::Endpoint) => held += observed.resources.len(),
                Some(Kind::Listener) => listeners = true,
                _ => {}
            }
        }
        clients.push(client);
    }
    let all_synced = async |mesh: &Mesh| {
        wait_for("all to be in sync", BOUND, async || {
            let synced = mesh.metric("vmesh_nodes").await.map_err(|failed| failed.to_string())?;
            let nodes = mesh.get("/api/v1/nodes").await.map_err(|failed| failed.to_string())?;
            let all = nodes["nodes"].as_array().cloned().unwrap_or_default();
            let pushing = all.iter().filter(|node| node["state"] != "synced").count();
            if all.len() == STREAMS && pushing == 0 {
                Ok(())
            } else {
                Err(format!("{synced} nodes, {pushing} not"))
            }
        })
        .await
    };
    all_synced(&mesh).await?;

    for (number, encodings, kinds) in [(3, 1.0, 1), (7, 2.0, 2)] {
        let before = counted(&mesh).await?;
        mesh.write(&format!("services.d/service-{number}.yaml"), &service(number, 5))?;
        for client in &mut clients {
            let observed = client.next().await.expect("a response");
            assert_eq!(observed.kind, Some(Kind::Endpoint));
            assert_eq!(observed.resources.len(), kinds, "{:?}", observed.resources);
            assert!(observed.resources.iter().all(|name| name.starts_with(&format!("service-{number}"))));
        }
        all_synced(&mesh).await?;
        let after = counted(&mesh).await?;
        let streams = STREAMS as f64;
        assert_eq!(after.0 - before.0, encodings, "encodings for service-{number}");
        assert_eq!(after.1 - before.1, streams, "responses for service-{number}");
        assert_eq!(after.2 - before.2, streams * encodings, "resources for service-{number}");
    }
    // A file that is written again without a change costs nothing.
    let before = counted(&mesh).await?;
    mesh.write("services.d/service-3.yaml", &service(3, 5))?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(counted(&mesh).await?, before);
    Ok(())
}

async fn counted(mesh: &Mesh) -> Result<(f64, f64, f64)> {
    Ok((
        mesh.metric("vmesh_xds_encodings_total").await?,
        mesh.metric("vmesh_xds_responses_total").await?,
        mesh.metric("vmesh_xds_resources_sent_total").await?,
    ))
}
