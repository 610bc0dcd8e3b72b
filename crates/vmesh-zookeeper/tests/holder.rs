//! A held node on real servers that are killed, frozen and restarted.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;
use vmesh_testkit::zookeeper::{Client, Kind, Options, Version, ZooKeeper};
use vmesh_testkit::{tempdir, wait_for};
use vmesh_zookeeper::config::Auth;
use vmesh_zookeeper::holder::{HolderStatus, NodeSpec};
use vmesh_zookeeper::{Config, Holder};

const SOON: Duration = Duration::from_secs(60);
const SESSION: Duration = Duration::from_secs(4);

fn config(connect: &str) -> Config {
    Config { session_timeout: SESSION, ..Config::of(connect.parse().unwrap()) }
}

fn hold(connect: &str, path: &str, data: &'static str, sequential: bool) -> Holder {
    let wanted = NodeSpec { path: path.to_owned(), data: Bytes::from_static(data.as_bytes()), sequential };
    Holder::start(config(connect), wanted, |_| {}).unwrap()
}

async fn held(holder: &mut Holder) -> String {
    let waited = timeout(SOON, async {
        loop {
            if let HolderStatus::Held(path) = holder.status() {
                return path.to_string();
            }
            holder.changed().await;
        }
    });
    match waited.await {
        Ok(path) => path,
        Err(_) => panic!("it is {:?}", holder.status()),
    }
}

async fn until(client: &mut Client, path: &str, expected: &[u8]) {
    wait_for(path, SOON, async || match client.get(path).await {
        Ok(data) if data == expected => Ok(()),
        Ok(data) => Err(String::from_utf8_lossy(&data).into_owned()),
        Err(failed) => Err(failed.to_string()),
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_node_stands_until_it_is_withdrawn() {
    for version in [Version::V3_8, Version::V3_4] {
        let servers = ZooKeeper::start(Options { version, ..Options::default() }).await.unwrap();
        let mut client = servers.client(0).await.unwrap();
        let mut holder = hold(&servers.connect(), "/services/pay/web-1", "one", false);
        assert_eq!(held(&mut holder).await, "/services/pay/web-1");
        assert_eq!(client.get("/services/pay/web-1").await.unwrap(), b"one");
        holder.update(Bytes::from_static(b"two"));
        until(&mut client, "/services/pay/web-1", b"two").await;
        // The holder undoes changes by other clients.
        client.set("/services/pay/web-1", b"other").await.unwrap();
        until(&mut client, "/services/pay/web-1", b"two").await;
        client.delete("/services/pay/web-1").await.unwrap();
        until(&mut client, "/services/pay/web-1", b"two").await;
        held(&mut holder).await;
        holder.withdraw(SOON).await.unwrap();
        assert!(client.children("/services/pay").await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn what_happened_long_ago_does_not_keep_a_node_away() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    let mut holder = hold(&servers.connect(), "/services/pay/web-1", "one", false);
    held(&mut holder).await;
    let soon = Duration::from_secs(10);
    for _ in 0..9 {
        // The node exists for longer than the pause.
        tokio::time::sleep(Duration::from_secs(1)).await;
        client.delete("/services/pay/web-1").await.unwrap();
        wait_for("the node", soon, async || client.get("/services/pay/web-1").await.map(drop)).await.unwrap();
    }
}

#[tokio::test]
async fn a_node_of_an_older_session_is_replaced_without_a_gap() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut older = servers.client(0).await.unwrap();
    older.make("/services/pay/web-1", b"one", Kind::Ephemeral).await.unwrap();
    older.make("/nerve/pay/web-1_", b"one", Kind::EphemeralSequential).await.unwrap();
    older.make("/nerve/pay/web-2_", b"two", Kind::EphemeralSequential).await.unwrap();
    let mut holder = hold(&servers.connect(), "/services/pay/web-1", "one", false);
    let mut sequential = hold(&servers.connect(), "/nerve/pay/web-1_", "one", true);
    assert_eq!(held(&mut holder).await, "/services/pay/web-1");
    assert_eq!(held(&mut sequential).await, "/nerve/pay/web-1_0000000002");
    older.close().await.unwrap();
    // The replacement outlives the session that first created the node.
    let mut client = servers.client(0).await.unwrap();
    assert_eq!(client.get("/services/pay/web-1").await.unwrap(), b"one");
    assert_eq!(client.children("/nerve/pay").await.unwrap(), ["web-1_0000000002"]);
}

#[tokio::test]
async fn a_node_of_another_instance_stays() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut other = servers.client(0).await.unwrap();
    other.make("/nerve/pay/web-1_", b"other", Kind::EphemeralSequential).await.unwrap();
    let mut sequential = hold(&servers.connect(), "/nerve/pay/web-1_", "one", true);
    assert_eq!(held(&mut sequential).await, "/nerve/pay/web-1_0000000001");
    assert_eq!(other.children("/nerve/pay").await.unwrap(), ["web-1_0000000000", "web-1_0000000001"]);
}

#[tokio::test]
async fn a_node_is_made_again_in_a_new_session_when_the_old_one_expires() {
    let mut servers = ZooKeeper::one().await.unwrap();
    let mut holder = hold(&servers.connect(), "/nerve/pay/web-1_", "one", true);
    let first = held(&mut holder).await;
    servers.freeze(0).unwrap();
    wait_for("the expiry", SOON, async || match holder.status() {
        HolderStatus::Waiting(why) if why.contains("expired") || why.contains("does not answer") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
    .unwrap();
    servers.thaw(0).unwrap();
    wait_for("another node", SOON, async || match holder.status() {
        HolderStatus::Held(path) if *path != *first => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
    .unwrap();
    let second = held(&mut holder).await;
    let mut client = servers.client(0).await.unwrap();
    let is = second.rsplit('/').next().unwrap().to_owned();
    wait_for("one node", SOON, async || {
        let children = client.children("/nerve/pay").await.map_err(|failed| failed.to_string())?;
        if children == [is.clone()] { Ok(()) } else { Err(format!("{children:?}")) }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_node_stands_whichever_server_is_killed() {
    let mut servers = ZooKeeper::three().await.unwrap();
    let mut holder = hold(&servers.connect(), "/services/pay/web-1", "one", false);
    held(&mut holder).await;
    for killed in 0..3 {
        servers.kill(killed).unwrap();
        let other = (killed + 1) % 3;
        servers.wait_serving(other).await.unwrap();
        let mut client = servers.client(other).await.unwrap();
        until(&mut client, "/services/pay/web-1", b"one").await;
        servers.restart(killed).await.unwrap();
        held(&mut holder).await;
    }
    holder.withdraw(SOON).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_withdrawn_in_time_is_said() {
    let mut servers = ZooKeeper::one().await.unwrap();
    let mut holder = hold(&servers.connect(), "/services/pay/web-1", "one", false);
    held(&mut holder).await;
    servers.freeze(0).unwrap();
    let failed = holder.withdraw(Duration::from_millis(300)).await.unwrap_err().to_string();
    assert_eq!(
        failed,
        "could not withdraw the node /services/pay/web-1: it took longer than 300ms; the node disappears with its session, within 4s"
    );
}

#[tokio::test]
async fn who_has_credentials_makes_nodes_that_others_may_only_read() {
    let servers = ZooKeeper::one().await.unwrap();
    let dir = tempdir().unwrap();
    let file = dir.join("digest");
    std::fs::write(&file, "mesh:secret").unwrap();
    let with = Config { auth: Some(Auth { digest_file: file }), ..config(&servers.connect()) };
    let wanted =
        NodeSpec { path: "/pay/web-1".to_owned(), data: Bytes::from_static(b"one"), sequential: false };
    let mut holder = Holder::start(with, wanted, |_| {}).unwrap();
    held(&mut holder).await;
    let mut other = servers.client(0).await.unwrap();
    assert_eq!(other.get("/pay/web-1").await.unwrap(), b"one");
    assert!(other.set("/pay/web-1", b"x").await.unwrap_err().to_string().ends_with("error -102"));
}
