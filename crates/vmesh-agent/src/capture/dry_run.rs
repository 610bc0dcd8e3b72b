//! `--dry-run`: shows how a configuration would change the host's rules.

use std::collections::BTreeSet;

use vmesh_capture::apply::Tools;
use vmesh_capture::facts::HostPaths;
use vmesh_daemon::report::one_line;
use vmesh_net::client::{self, ClientError};
use vmesh_net::keeper::{Options, plan_here};
use vmesh_net::protocol::{Request, Response};

use super::{desired, probes};
use crate::config::Config;
use crate::ipv4_only::ipv4_only;
use crate::{cache, destinations};

/// The users as whom the package runs the agent and Envoy.
const USERS: [&str; 2] = ["vmesh-agent", "vmesh-envoy"];

/// Returns the plan as text. vmesh-net makes it or, if it does not run, this process, which then needs root's privileges. The destinations
/// are those that Envoy accepted last; no control plane is queried.
///
/// # Errors
/// The text says why no plan could be made.
pub async fn dry_run(config: &Config) -> Result<String, String> {
    let accepted = cache::load(config.name.as_str(), &config.cache()).map_err(|error| one_line(&error))?;
    let (mut accepted, has_ipv6) = (accepted.unwrap_or_default(), !config.capture.report().without_ipv6);
    if !has_ipv6 {
        accepted = ipv4_only(accepted);
    }
    let known = destinations::destinations(&accepted, has_ipv6);
    let want = desired(config, &known, probes::control_plane_addresses(config).await);
    match client::ask(&config.capture.socket, &Request::Plan { want: Some(want.clone()) }).await {
        Ok(Response::Plan(text)) => Ok(text),
        Ok(Response::Refused(why)) => Err(why),
        Ok(Response::Status(_)) => Err("vmesh-net answered something else".to_owned()),
        Err(ClientError::Connect { .. }) => {
            let host_paths = HostPaths::default();
            let mut users = BTreeSet::new();
            for user in USERS.into_iter().filter_map(|user| user.parse().ok()) {
                users.extend(host_paths.user_id(&user).await);
            }
            let slices = "vmesh.slice".parse().into_iter().collect();
            let options = Options {
                backend: None,
                tools: Tools::default(),
                host_paths,
                users,
                slices,
                state_dir: config.state_dir.clone(),
                drain: std::time::Duration::ZERO,
            };
            plan_here(&options, want).await
        }
        Err(error) => Err(one_line(&error)),
    }
}
