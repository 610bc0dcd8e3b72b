//! The subcommands about identities: `ca`, `token` and `node`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use vmesh_api::identity::{
    IdentityStatus, InitRequest, RotationRequest, RotationStatus, RotationStep, TokenRequest, Tokens,
};
use vmesh_model::text::{parse_duration, show_duration};
use vmesh_model::{Labels, NodeName, ServiceName};

use crate::client::{Api, ApiError};
use crate::table::table;
use crate::{Cli, RenderedOutput, action_output, render};

/// The certificate authority of the mesh.
#[derive(Debug, Subcommand)]
pub(crate) enum CaCommand {
    /// Make the root and the intermediate of this control plane, or take an intermediate that was made elsewhere.
    Init(Supplied),
    /// Show the certificates of the authority, and counts of joins and refusals.
    Status,
    /// Print the roots that the mesh trusts, in PEM.
    Bundle,
    /// Replace the root: begin a rotation, or take its next step. Each step is refused while a live node is not ready for it.
    Rotate(RotateArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RotateArgs {
    /// Show the rotation and the nodes that its next step waits for, and change nothing.
    #[arg(long, conflicts_with_all = ["back", "intermediate", "exempt"])]
    status: bool,
    /// Step back, or end a rotation whose new root has issued nothing.
    #[arg(long, conflicts_with = "intermediate")]
    back: bool,
    /// Replace the intermediate of this control plane under the same root, at once.
    #[arg(long)]
    intermediate: bool,
    /// A node that no step waits for. Its connections may fail until it joins again. Repeat it for each.
    #[arg(long, value_name = "NODE")]
    exempt: Vec<NodeName>,
    #[command(flatten)]
    supplied: Supplied,
}

/// An intermediate that was made elsewhere.
#[derive(Debug, Args)]
pub(crate) struct Supplied {
    /// The chain of an intermediate that was made elsewhere: the intermediate first, the root last.
    #[arg(long, value_name = "FILE", requires = "key_file")]
    chain_file: Option<PathBuf>,
    /// The file with the intermediate's key, on the control plane's host.
    #[arg(long, value_name = "FILE", requires = "chain_file")]
    key_file: Option<String>,
}

impl Supplied {
    fn chain(&self) -> Result<Option<String>, ApiError> {
        let Some(path) = &self.chain_file else { return Ok(None) };
        std::fs::read_to_string(path).map(Some).map_err(|cause| ApiError::File { path: path.clone(), cause })
    }
}

/// Join tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Create a token with which one node can join once, and print it.
    Create(CreateToken),
    /// List the tokens that this control plane created, without their secrets.
    List,
    /// Revoke a token that has not been used.
    Revoke { id: String },
}

#[derive(Debug, Args)]
pub(crate) struct CreateToken {
    /// The name of the node that joins with the token (`node.name` in its agent.yaml).
    #[arg(long)]
    node: NodeName,
    /// A service that the node may run. Repeat it for each.
    #[arg(long = "service", value_name = "SERVICE")]
    services: Vec<ServiceName>,
    /// A label that the node has whatever its agent.yaml says: `role=web`. Repeat it for each.
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// The network that the node must join from: `10.0.0.0/8`.
    #[arg(long, value_name = "NETWORK")]
    from: Option<String>,
    /// The validity of the token.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse_duration)]
    ttl: Duration,
}

/// Nodes as identities.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// End a node's stream, and give it neither configuration nor certificates.
    Ban { node: NodeName },
    /// Lift a ban.
    Unban { node: NodeName },
}

fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("a label is NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(crate) async fn ca(cli: &Cli, api: &Api, command: &CaCommand) -> Result<RenderedOutput, ApiError> {
    match command {
        CaCommand::Init(supplied) => {
            let request = InitRequest { chain: supplied.chain()?, key_file: supplied.key_file.clone() };
            render(cli, api.init_authority(&request).await?, status)
        }
        CaCommand::Rotate(RotateArgs { status: true, .. }) => render(cli, api.rotation().await?, rotation),
        CaCommand::Rotate(RotateArgs { back, intermediate, exempt, supplied, .. }) => {
            let step = match (back, intermediate) {
                (true, _) => RotationStep::Back,
                (false, true) => RotationStep::Intermediate,
                (false, false) => RotationStep::Next,
            };
            let request = RotationRequest {
                step,
                exempt: exempt.iter().cloned().collect(),
                chain: supplied.chain()?,
                key_file: supplied.key_file.clone(),
            };
            render(cli, api.rotate(&request).await?, rotation)
        }
        CaCommand::Status => render(cli, api.identity().await?, status),
        CaCommand::Bundle => {
            let answer = api.bundle().await?;
            match cli.json {
                true => render(cli, answer, |_| (String::new(), false)),
                false => Ok(RenderedOutput { text: answer.bundle, code: 0 }),
            }
        }
    }
}

pub(crate) async fn token(cli: &Cli, api: &Api, command: &TokenCommand) -> Result<RenderedOutput, ApiError> {
    match command {
        TokenCommand::Create(CreateToken { node, services, labels, from, ttl }) => {
            let labels: Labels =
                labels.iter().map(|(name, value)| (name.as_str().into(), value.as_str().into())).collect();
            let request = TokenRequest {
                node: node.clone(),
                services: services.iter().cloned().collect::<BTreeSet<_>>(),
                labels,
                network: from.clone(),
                ttl: ttl.as_secs(),
            };
            render(cli, api.create_token(&request).await?, |token| (format!("{}\n", token.token), false))
        }
        TokenCommand::List => render(cli, api.tokens().await?, tokens),
        TokenCommand::Revoke { id } => render(cli, api.revoke_token(id).await?, action_output),
    }
}

pub(crate) async fn node(cli: &Cli, api: &Api, command: &NodeCommand) -> Result<RenderedOutput, ApiError> {
    let answer = match command {
        NodeCommand::Ban { node } => api.set_ban(node, true).await?,
        NodeCommand::Unban { node } => api.set_ban(node, false).await?,
    };
    render(cli, answer, action_output)
}

fn status(status: &IdentityStatus) -> (String, bool) {
    let mut text = format!("trust domain   {}\n", status.trust_domain);
    match &status.listen {
        Some(listen) => text.push_str(&format!("mTLS xDS       {listen}\n")),
        None => text.push_str("mTLS xDS       not configured (`listen.xds` in control.yaml)\n"),
    }
    let Some(authority) = &status.authority else {
        text.push_str("authority      none: run `vmeshctl ca init`\n");
        return (text, true);
    };
    let root =
        if authority.has_root_key { "its key is on this control plane" } else { "its key is elsewhere" };
    text.push_str(&format!("root           {}; {root}\n", expiry(authority.root_expires)));
    text.push_str(&format!("root key       sha256:{}\n", authority.root_key));
    text.push_str(&format!("intermediate   {}\n", expiry(authority.intermediate_expires)));
    text.push_str(&format!("trust bundle   {} ({} roots)\n", authority.bundle, authority.roots));
    let counts = &status.counts;
    text.push_str(&format!(
        "since start    {} joined, {} joins refused; {} renewals, {} refused; {} handshakes failed, {} admissions denied\n",
        counts.joined,
        counts.join_refused,
        counts.renewed,
        counts.renew_refused,
        counts.handshakes_failed,
        counts.admissions_denied
    ));
    for node in &status.banned {
        text.push_str(&format!("banned         {node}\n"));
    }
    (text, false)
}

fn rotation(rotation: &RotationStatus) -> (String, bool) {
    let Some(stage) = &rotation.stage else { return (format!("{}\n", rotation.summary), false) };
    let mut text = format!(
        "stage          {stage}\n{}\nlive nodes     {}: {} have the trust bundle, {} have certificates of the new root\n",
        rotation.summary, rotation.live, rotation.with_bundle, rotation.with_new_certificates
    );
    for node in &rotation.waiting_for {
        text.push_str(&format!("waits for      {node}\n"));
    }
    (text, false)
}

fn tokens(tokens: &Tokens) -> (String, bool) {
    if tokens.tokens.is_empty() {
        return ("no tokens\n".to_owned(), false);
    }
    let mut rows = vec![["ID", "NODE", "SERVICES", "FROM", "STATE"].map(str::to_owned)];
    for token in &tokens.tokens {
        let services: Vec<&str> = token.services.iter().map(ServiceName::as_str).collect();
        let state = match (&token.redeemed_from, token.expires <= now()) {
            (Some(from), _) => format!("used by {from}"),
            (None, true) => "expired".to_owned(),
            (None, false) => expiry(token.expires),
        };
        let network = token.network.clone().unwrap_or_else(|| "anywhere".to_owned());
        rows.push([token.id.clone(), token.node.to_string(), services.join(","), network, state]);
    }
    (table(&rows), false)
}

fn expiry(at: u64) -> String {
    match at.checked_sub(now()) {
        Some(left) if left > 0 => format!("expires in {}", show_duration(rounded(left))),
        _ => "has expired".to_owned(),
    }
}

/// Rounds a duration in seconds to days, hours or minutes.
fn rounded(seconds: u64) -> Duration {
    let unit = [86_400, 3600, 60].into_iter().find(|unit| seconds >= 2 * unit).unwrap_or(1);
    Duration::from_secs(seconds / unit * unit)
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}
