//! Sends this node's report to the control planes that it does not take configuration from.
//!
//! Replicas share no database, and each needs the reports of all nodes to compute the same configuration as the others. A report is an xDS
//! stream with a single request, which carries the `Node`. The stream stays open, which tells the replica that the node is online.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::debug;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;

use crate::config::ControlPlane;
use crate::credentials::CredentialsReceiver;
use crate::credentials::client::connect_ads;
use crate::status::ControlPlaneStatus;
use vmesh_backoff::Backoff;

/// The type URL of the request. No resource has this type: a server that does not know it counts the request and keeps the stream.
pub(crate) const TYPE_URL: &str = "type.googleapis.com/vmesh.NodeReport";

const OPENS_WITHIN: Duration = Duration::from_secs(5);

/// Keeps a report stream open to `replica` while the configuration comes from another replica. A change of the node opens another stream.
pub(crate) async fn report(
    replica: ControlPlane,
    mut node: watch::Receiver<Node>,
    mut credentials: CredentialsReceiver,
    status: watch::Sender<ControlPlaneStatus>,
) {
    let name = replica.to_string();
    let mut in_use = status.subscribe();
    let mut backoff = Backoff::decorrelated(Duration::from_millis(200), Duration::from_secs(10));
    loop {
        // The replica in use has the report from the configuration stream.
        let elsewhere = in_use.wait_for(|status| status.in_use.as_ref() != Some(&name)).await.is_ok();
        let has_identity = !replica.is_tls || credentials.wait_for(Option::is_some).await.is_ok();
        if !elsewhere || !has_identity {
            return;
        }
        let reported = node.borrow_and_update().clone();
        tokio::select! {
            ended = stream(&replica, reported, &credentials, || {
                backoff.reset();
                set(&status, &name, Some(true));
            }) => debug!(control_plane = name, "the report's stream ended: {ended}"),
            () = async {
                // Dropped here, because the returned guard holds the lock that `set` needs.
                _ = in_use.wait_for(|status| status.in_use.as_ref() == Some(&name)).await;
            } => {
                set(&status, &name, None);
                continue;
            }
            Ok(()) = node.changed() => continue,
        }
        set(&status, &name, Some(false));
        sleep(backoff.next_pause()).await;
    }
}

/// Records whether the replica has the report. `None` removes the replica, since it is in use.
fn set(status: &watch::Sender<ControlPlaneStatus>, name: &str, reported: Option<bool>) {
    status.send_if_modified(|status| match reported {
        Some(reported) => status.reported_to.insert(name.to_owned(), reported) != Some(reported),
        None => status.reported_to.remove(name).is_some(),
    });
}

/// Runs one stream until it ends, and returns why it ended.
async fn stream(
    replica: &ControlPlane,
    node: Node,
    credentials: &CredentialsReceiver,
    open: impl FnOnce(),
) -> String {
    let mut stream = match connect_ads(replica, credentials).await {
        Ok(stream) => stream,
        Err(error) => return error.to_string(),
    };
    let request = DeltaDiscoveryRequest {
        node: Some(node),
        type_url: TYPE_URL.to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    if let Err(failure) = stream.send(&request).await {
        return failure.to_string();
    }
    match timeout(OPENS_WITHIN, stream.opened()).await {
        Ok(Ok(())) => open(),
        Ok(Err(failure)) => return failure.to_string(),
        Err(_) => return format!("no answer within {} s", OPENS_WITHIN.as_secs()),
    }
    loop {
        // No answer is expected, but the server may send one.
        if let Err(failure) = stream.next_bytes().await {
            return failure.to_string();
        }
    }
}
