//! The operator's command. It uses the control plane's HTTP API, and inspects the host that it runs on ([`host`]).
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | success, and nothing needs attention |
//! | 1 | failure: no control plane answers, its answer cannot be read, or it could not do what was requested |
//! | 3 | success, and something needs attention: a rejected configuration, a service or source that is not fresh, an evicted endpoint, a problem, an unreachable service |
//! | 4 | the control plane has no such service, node, source or endpoint, or no such held removal |
//! | 64 | the command line is invalid |

mod client;
mod host;
mod identity;
mod print;
mod show;
mod table;

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use client::{Api, ApiError};
use http::StatusCode;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmesh_api::{AcceptRequest, ActionResult, EndpointRequest, SourceSelector};
use vmesh_daemon::report;
use vmesh_model::ServiceName;

/// Exit code: success, and something needs attention.
const ATTENTION: u8 = 3;
/// Exit code: no such service, node, source or endpoint.
const UNKNOWN: u8 = 4;

/// Query and operate a vmesh control plane, and diagnose this host.
#[derive(Debug, Parser)]
#[command(name = "vmeshctl", version, after_help = EXIT_CODES)]
struct Cli {
    /// The control plane's API: `http://HOST:PORT` or `unix:PATH`.
    #[arg(long, global = true, env = "VMESH_API", default_value = "http://127.0.0.1:15014")]
    api: Api,

    /// Print the API's JSON instead of text.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 all is well; 1 could not ask; 3 something wants attention; \
                          4 no such service, node, source or endpoint; 64 wrong command line";

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Api(ApiCommand),
    /// Show which connections of this host go through Envoy, and why others do not (on the host itself).
    Capture(host::capture::CaptureArgs),
    /// Take this host out of the mesh, and put it back (on the host itself).
    Bypass(host::capture::BypassArgs),
    /// Make this host's resolver forward names of the mesh to the agent (on the host itself).
    Dns(host::dns::DnsArgs),
    /// Diagnose this host: each problem with its effect and its fix (on the host itself).
    Doctor(host::doctor::DoctorArgs),
}

/// The subcommands that query a control plane.
#[derive(Debug, Subcommand)]
enum ApiCommand {
    /// Summarise the mesh: revision, sources, services, nodes, problems.
    Status,
    /// List all services, or the endpoints of one.
    Services { service: Option<String> },
    /// List all nodes: in sync, pushing, REJECTED with Envoy's reason, or offline.
    Nodes,
    /// List the problems of the configuration and their places.
    Problems,
    /// Explain how requests from a node reach a service: port, routes, clusters, endpoints, and the origin of each setting.
    Explain(ExplainArgs),
    /// List the discovery sources: their state, their held removals with the reason, and the command that accepts each.
    Discovery {
        #[command(subcommand)]
        action: Option<DiscoveryAction>,
    },
    /// Initialise and inspect the certificate authority of the mesh.
    #[command(subcommand)]
    Ca(identity::CaCommand),
    /// Create, list and revoke join tokens (only through the API's Unix socket).
    #[command(subcommand)]
    Token(identity::TokenCommand),
    /// Ban a node, or lift a ban (only through the API's Unix socket).
    #[command(subcommand)]
    Node(identity::NodeCommand),
    /// Remove an offline node for good, or all nodes that have been offline for long (only through the API's Unix socket).
    Forget {
        #[arg(required_unless_present = "offline_for")]
        node: Option<String>,
        /// Remove every node that has been offline for this long: `1h`, `7d`.
        #[arg(long, value_name = "DURATION", conflicts_with = "node", value_parser = vmesh_model::text::parse_duration)]
        offline_for: Option<Duration>,
    },
}

/// The actions on discovery. Those that change something work only through the API's Unix socket.
#[derive(Debug, Subcommand)]
enum DiscoveryAction {
    /// List the events of the sources, the latest at the end.
    Events,
    /// Accept the held removals of a service, or all of a source.
    Accept { source: String, service: Option<ServiceName> },
    /// Stop using an endpoint, whichever source lists it.
    Evict {
        service: ServiceName,
        /// The endpoint's address as `services` prints it, or its host name and port.
        #[arg(value_name = "ADDRESS", value_parser = endpoint)]
        endpoint: String,
    },
    /// Use an evicted endpoint again.
    Admit {
        service: ServiceName,
        /// The endpoint's address as `discovery` prints it.
        #[arg(value_name = "ADDRESS", value_parser = endpoint)]
        endpoint: String,
    },
    /// Ignore all changes of a source, or of all sources, including new endpoints.
    Freeze { source: Option<String> },
    /// Apply the changes of a source, or of all sources, again.
    Thaw { source: Option<String> },
}

#[derive(Debug, Args)]
struct ExplainArgs {
    service: String,
    /// The node that sends the requests.
    #[arg(long, value_name = "NODE")]
    from: String,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            _ = error.print();
            let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return if asked_for { ExitCode::SUCCESS } else { report::USAGE.into() };
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report::failed(&error),
    };
    match runtime.block_on(run(&cli)) {
        Ok(shown) => {
            print!("{}", shown.text);
            ExitCode::from(shown.code)
        }
        Err(CtlError::Api(ApiError::Unknown(message))) => {
            eprintln!("{}", print::printable(&message));
            UNKNOWN.into()
        }
        Err(error) => {
            eprintln!("{}", print::terminal(&report::Chain(&error).to_string()));
            report::FAILURE.into()
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum CtlError {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Host(#[from] host::HostError),
}

/// The output of a command, and its exit code.
struct RenderedOutput {
    text: String,
    code: u8,
}

async fn run(cli: &Cli) -> Result<RenderedOutput, CtlError> {
    match &cli.command {
        Command::Capture(ask) => {
            let (text, json, attention) = host::capture::capture(ask).await?;
            Ok(render_host(cli, text, &json, attention)?)
        }
        Command::Bypass(ask) => {
            Ok(RenderedOutput { text: print::terminal(&host::capture::bypass(ask)?), code: 0 })
        }
        Command::Doctor(ask) => {
            let (text, json, attention) = host::doctor::doctor(ask).await?;
            Ok(render_host(cli, text, &json, attention)?)
        }
        Command::Dns(ask) => {
            Ok(RenderedOutput { text: print::terminal(&host::dns::dns(ask).await?), code: 0 })
        }
        Command::Api(command) => Ok(answer(cli, command).await?),
    }
}

async fn answer(cli: &Cli, command: &ApiCommand) -> Result<RenderedOutput, ApiError> {
    let api = &cli.api;
    match command {
        ApiCommand::Status => {
            let evicted = api.discovery().await?.evicted;
            render(cli, api.status().await?, |status| show::status(status, &evicted))
        }
        ApiCommand::Services { service: None } => {
            let evicted = api.discovery().await?.evicted;
            render(cli, api.services().await?, |services| show::services(services, &evicted))
        }
        ApiCommand::Services { service: Some(name) } => {
            let mut evicted = api.discovery().await?.evicted;
            evicted.retain(|evicted| evicted.service.as_str() == name);
            let mut answer = api.services().await?;
            answer.services.retain(|service| service.name.as_str() == name);
            if answer.services.is_empty() {
                return Err(ApiError::Unknown(format!(
                    "there is no service `{name}`: `vmeshctl services` lists those that there are"
                )));
            }
            render(cli, answer, |services| show::service(services, &evicted))
        }
        ApiCommand::Nodes => render(cli, api.nodes().await?, show::nodes),
        ApiCommand::Problems => render(cli, api.problems().await?, show::problems),
        ApiCommand::Explain(ExplainArgs { service, from }) => {
            render(cli, api.explain(service, from).await?, show::explanation)
        }
        ApiCommand::Discovery { action: None } => render(cli, api.discovery().await?, show::discovery),
        ApiCommand::Discovery { action: Some(action) } => discovery(cli, action).await,
        ApiCommand::Ca(command) => identity::ca(cli, api, command).await,
        ApiCommand::Token(command) => identity::token(cli, api, command).await,
        ApiCommand::Node(command) => identity::node(cli, api, command).await,
        ApiCommand::Forget { offline_for: Some(longer), .. } => {
            render(cli, api.forget_offline_for(*longer).await?, action_output)
        }
        ApiCommand::Forget { node, .. } => {
            let node = node.as_deref().unwrap_or_default();
            match api.forget(node).await {
                // A control plane may give the same answer for an unknown node and for a connected one.
                Err(ApiError::Refused { status: StatusCode::CONFLICT, .. })
                    if !api.nodes().await?.nodes.iter().any(|known| known.name.as_str() == node) =>
                {
                    Err(ApiError::Unknown(format!("there is no node `{node}`: `vmeshctl nodes` lists them")))
                }
                answer => render(cli, answer?, action_output),
            }
        }
    }
}

async fn discovery(cli: &Cli, action: &DiscoveryAction) -> Result<RenderedOutput, ApiError> {
    let api = &cli.api;
    let answer = match action {
        DiscoveryAction::Events => return render(cli, api.discovery_events().await?, show::events),
        DiscoveryAction::Accept { source, service } => {
            api.accept(&AcceptRequest { source: source.clone(), service: service.clone() }).await?
        }
        DiscoveryAction::Evict { service, endpoint } => {
            let mut messages = Vec::new();
            for address in addresses(api, service, endpoint).await? {
                messages.push(api.evict(&EndpointRequest { service: service.clone(), address }).await?.done);
            }
            ActionResult { done: messages.join("\n") }
        }
        DiscoveryAction::Admit { service, endpoint } => {
            let mut messages = Vec::new();
            for address in addresses(api, service, endpoint).await? {
                messages.push(api.admit(&EndpointRequest { service: service.clone(), address }).await?.done);
            }
            ActionResult { done: messages.join("\n") }
        }
        DiscoveryAction::Freeze { source } => api.freeze(&SourceSelector { source: source.clone() }).await?,
        DiscoveryAction::Thaw { source } => api.thaw(&SourceSelector { source: source.clone() }).await?,
    };
    render(cli, answer, action_output)
}

/// Returns the addresses for `endpoint`, which is one address, or the host name of endpoints with their port.
async fn addresses(api: &Api, service: &ServiceName, endpoint: &str) -> Result<Vec<SocketAddr>, ApiError> {
    if let Some(address) = parse_address(endpoint) {
        return Ok(vec![address]);
    }
    let services = api.services().await?.services;
    let of = services.iter().filter(|known| known.name == *service).flat_map(|known| &known.endpoints);
    let (host, port) = endpoint.rsplit_once(':').unwrap_or((endpoint, ""));
    let named = of.filter(|known| {
        known.hostname.as_deref().is_some_and(|name| name.eq_ignore_ascii_case(host))
            && known.address.port().to_string() == port
    });
    let found: Vec<SocketAddr> = named.map(|known| known.address).collect();
    match found.is_empty() {
        true => Err(ApiError::Unknown(format!(
            "`{endpoint}` is no endpoint of `{service}`: `vmeshctl services {service}` lists them, as 10.0.0.1:8080 or [fd00::1]:8080"
        ))),
        false => Ok(found),
    }
}

/// Parses an address as `services` and Envoy print it. An IPv4-mapped IPv6 address becomes the IPv4 address.
fn parse_address(endpoint: &str) -> Option<SocketAddr> {
    let address = endpoint.trim().parse::<SocketAddr>().ok()?;
    Some(match address.ip().to_canonical() {
        ip if ip == address.ip() => address,
        ip => SocketAddr::new(ip, address.port()),
    })
}

/// Parses an endpoint argument: an address with a port, or a host name with a port.
fn endpoint(text: &str) -> Result<String, String> {
    let is_named = |(host, port): (&str, &str)| {
        !host.is_empty() && host.parse::<IpAddr>().is_err() && port.parse::<NonZeroU16>().is_ok()
    };
    match parse_address(text).is_some() || text.trim().rsplit_once(':').is_some_and(is_named) {
        true => Ok(text.to_owned()),
        false => {
            Err("invalid socket address: an address or a host name, with a port, as `services` prints it"
                .to_owned())
        }
    }
}

fn action_output(done: &ActionResult) -> (String, bool) {
    // Each line is sanitised on its own, so that the line breaks stay.
    (done.done.lines().map(|line| format!("{line}\n")).collect(), false)
}

/// Shows `answer` as text or as the original JSON. The exit code does not depend on the format.
fn render<T: Serialize + DeserializeOwned>(
    cli: &Cli,
    answer: T,
    show: impl Fn(&T) -> (String, bool),
) -> Result<RenderedOutput, ApiError> {
    let (text, attention) = show(&print::printable_answer(&answer).map_err(ApiError::Print)?);
    render_host(cli, text, &answer, attention)
}

/// Shows `text`, or `json` if `--json` is given.
fn render_host(
    cli: &Cli,
    text: String,
    json: &impl Serialize,
    attention: bool,
) -> Result<RenderedOutput, ApiError> {
    let text = match cli.json {
        true => print::json(&format!("{}\n", serde_json::to_string_pretty(json).map_err(ApiError::Print)?)),
        false => print::terminal(&text),
    };
    Ok(RenderedOutput { text, code: if attention { ATTENTION } else { 0 } })
}
