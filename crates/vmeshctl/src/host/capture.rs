//! `vmeshctl capture` and `vmeshctl bypass`: which connections of this host go through Envoy.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, Subcommand};
use vmesh_capture::spec::OutboundCapture;
use vmesh_net::client;
use vmesh_net::protocol::{EnvoyHealth, RedirectState, Request, Response, State, Status, would_change};

use super::HostError;
use crate::print::printable;

#[derive(Debug, Args)]
pub(crate) struct CaptureArgs {
    /// The socket of vmesh-net.
    #[arg(long, global = true, value_name = "PATH", default_value = vmesh_net::SOCKET, env = "VMESH_NET")]
    socket: PathBuf,
    #[command(subcommand)]
    action: Option<CaptureAction>,
}

#[derive(Debug, Subcommand)]
enum CaptureAction {
    /// Show how the host's rules would change now. The output is empty if the rules are as desired.
    Plan,
    /// Confirm the change that is on trial: it stays.
    Confirm,
    /// Roll back the change that is on trial, at once.
    Revert,
    /// Try a change again that was rolled back.
    Retry,
}

#[derive(Debug, Args)]
pub(crate) struct BypassArgs {
    /// The bypass script, which works without any other part of vmesh.
    #[arg(long, value_name = "PATH", default_value = "/usr/lib/vmesh/bypass", env = "VMESH_BYPASS")]
    script: PathBuf,
    #[command(subcommand)]
    switch: BypassSwitch,
}

#[derive(Debug, Subcommand)]
enum BypassSwitch {
    /// Take this host out of the mesh immediately.
    On {
        /// Stop capturing new connections, but keep open ones.
        #[arg(long)]
        keep_connections: bool,
    },
    /// Put the host back into the mesh, as configured.
    Off,
}

/// Returns the answer as text and as JSON, and whether something needs attention.
pub(crate) async fn capture(args: &CaptureArgs) -> Result<(String, serde_json::Value, bool), HostError> {
    let question = match &args.action {
        None => Request::Status,
        Some(CaptureAction::Plan) => Request::Plan { want: None },
        Some(CaptureAction::Retry) => Request::Retry,
        Some(CaptureAction::Confirm) => Request::Confirm { trial: trial(&args.socket).await? },
        Some(CaptureAction::Revert) => Request::Revert {
            trial: trial(&args.socket).await?,
            why: "an operator said that it does not work".to_owned(),
        },
    };
    match client::ask(&args.socket, &question).await? {
        Response::Status(status) => {
            let (text, attention) = show(&status);
            Ok((text, serde_json::json!(status), attention))
        }
        Response::Plan(text) => {
            let attention = would_change(&text);
            Ok((text.clone(), serde_json::json!({ "plan": text }), attention))
        }
        Response::Refused(why) => Err(HostError::Refused(why)),
    }
}

async fn trial(socket: &Path) -> Result<u64, HostError> {
    match client::ask(socket, &Request::Status).await? {
        Response::Status(status) => {
            status.trial.ok_or_else(|| HostError::Cannot("nothing is on trial on this host".to_owned()))
        }
        Response::Refused(why) => Err(HostError::Refused(why)),
        Response::Plan(_) => Err(HostError::Refused("it answered something else".to_owned())),
    }
}

pub(crate) fn show(status: &Status) -> (String, bool) {
    let mut text = String::new();
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<14}{}\n", printable(&value)));
    let trial = match (status.trial_ends_in, status.trial) {
        (Some(seconds), Some(_)) => {
            format!(", taken back in {seconds} s unless it is confirmed (`vmeshctl capture confirm`)")
        }
        _ => String::new(),
    };
    line("capture", format!("{}{trial}", status.state));
    if status.state == State::Bypassed {
        line("", "`vmeshctl bypass off` takes the host back into the mesh".to_owned());
    }
    let json = |value: serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let (outbound, inbound) = (&status.spec.outbound, &status.spec.inbound);
    let (out, inward) = (json(serde_json::json!(outbound.capture)), json(serde_json::json!(inbound.capture)));
    let shares = format!(
        "{out}: {} virtual and {} real addresses, {} % of new connections",
        status.virtual_addresses,
        status.real_addresses,
        outbound.percent.get()
    );
    line("outbound", if outbound.capture == OutboundCapture::Off { out } else { shares });
    let ports: Vec<_> = inbound.ports.iter().map(ToString::to_string).collect();
    line("inbound", format!("{inward}{}{}", if ports.is_empty() { "" } else { ": " }, ports.join(", ")));
    line("rules by", status.backend.clone().unwrap_or_else(|| "nothing that works here".to_owned()));
    line("envoy", describe_envoy(status.envoy).to_owned());
    line("redirects", describe_redirects(status.redirects).to_owned());
    line("connections", format!("{} open through a redirect", status.connections));
    let silent = status.agent_silent_for;
    line(
        "agent",
        silent.map_or_else(
            || "has not been heard of".to_owned(),
            |seconds| format!("heard of {seconds} s ago"),
        ),
    );
    if let Some(seconds) = status.drift.seconds_ago {
        let by = status.drift.by.as_deref().unwrap_or("somebody");
        let what = status.drift.what.join("; ");
        line(
            "drift",
            format!("mended {} times, the last {seconds} s ago: {by} changed {what}", status.drift.count),
        );
    }
    if let Some(why) = &status.reverted {
        line("TAKEN BACK", format!("{why}; `vmeshctl capture retry` tries it again"));
    }
    for note in &status.notes {
        line("note", note.clone());
    }
    if let Some(error) = &status.error {
        line("ERROR", error.clone());
    }
    let attention = status.error.is_some()
        || status.reverted.is_some()
        || status.redirects == RedirectState::Lapsed
        || matches!(status.envoy, EnvoyHealth::Gone | EnvoyHealth::WrongUser | EnvoyHealth::Hangs)
        || matches!(status.state, State::Bypassed | State::Trial);
    (text, attention)
}

fn describe_envoy(health: EnvoyHealth) -> &'static str {
    match health {
        EnvoyHealth::Unknown => "not looked at: nothing is captured",
        EnvoyHealth::Other => "in a way that this version does not know",
        EnvoyHealth::Well => "takes what is captured",
        EnvoyHealth::Gone => "GONE: nobody listens at its capture ports",
        EnvoyHealth::WrongUser => "GONE: another user's program listens at its capture ports",
        EnvoyHealth::Hangs => "HANGS: its capture ports are open, and nobody serves them",
    }
}

fn describe_redirects(state: RedirectState) -> &'static str {
    match state {
        RedirectState::None => "none that could lapse",
        RedirectState::Other => "in a way that this version does not know",
        RedirectState::Hold => "hold",
        RedirectState::Lapsed => "LAPSED: new connections go past Envoy where `on_loss: open` allows it",
    }
}

/// Runs the bypass script and returns its output.
pub(crate) fn bypass(args: &BypassArgs) -> Result<String, HostError> {
    let mut command = Command::new("/bin/sh");
    command.arg(&args.script);
    match args.switch {
        BypassSwitch::On { keep_connections: true } => _ = command.arg("--keep-connections"),
        BypassSwitch::On { keep_connections: false } => {}
        BypassSwitch::Off => _ = command.arg("--lift"),
    }
    run(&mut command)
}

/// Runs a command. Returns its output, or why it failed.
pub(crate) fn run(command: &mut Command) -> Result<String, HostError> {
    let shown = || {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    };
    let name = shown();
    let output = command.output().map_err(|cause| HostError::Run { command: name.clone(), cause })?;
    let (printed, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match output.status.success() {
        true => Ok(printed.into_owned()),
        false => {
            Err(HostError::Failed { command: name, output: format!("{wrong}{printed}").trim().to_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_host_that_is_well_fits_a_screen_and_wants_nothing() {
        let mut status = Status {
            backend: Some("nft".to_owned()),
            state: State::Confirmed,
            envoy: EnvoyHealth::Well,
            redirects: RedirectState::Hold,
            virtual_addresses: 4,
            agent_silent_for: Some(0),
            ..Status::default()
        };
        status.spec.outbound.capture = OutboundCapture::Vip;
        let (text, attention) = show(&status);
        expect![[r#"
            capture       confirmed
            outbound      vip: 4 virtual and 0 real addresses, 100 % of new connections
            inbound       off
            rules by      nft
            envoy         takes what is captured
            redirects     hold
            connections   0 open through a redirect
            agent         heard of 0 s ago
        "#]]
        .assert_eq(&text);
        assert!(!attention);
    }

    #[test]
    fn what_is_wrong_stands_out_with_what_to_do() {
        let mut status = Status {
            state: State::Trial,
            trial: Some(1),
            trial_ends_in: Some(12),
            envoy: EnvoyHealth::Hangs,
            redirects: RedirectState::Lapsed,
            reverted: Some("dns: 127.0.0.1:15053 does not answer".to_owned()),
            notes: vec!["outbound.include.units: app.service does not run".to_owned()],
            error: Some("could not run `nft`".to_owned()),
            ..Status::default()
        };
        status.drift.count = 2;
        status.drift.seconds_ago = Some(41);
        status.drift.by = Some("firewalld (pid 812)".to_owned());
        status.drift.what = vec!["+ outbound/vips4".to_owned()];
        let (text, attention) = show(&status);
        expect![[r#"
            capture       on trial, taken back in 12 s unless it is confirmed (`vmeshctl capture confirm`)
            outbound      off
            inbound       off
            rules by      nothing that works here
            envoy         HANGS: its capture ports are open, and nobody serves them
            redirects     LAPSED: new connections go past Envoy where `on_loss: open` allows it
            connections   0 open through a redirect
            agent         has not been heard of
            drift         mended 2 times, the last 41 s ago: firewalld (pid 812) changed + outbound/vips4
            TAKEN BACK    dns: 127.0.0.1:15053 does not answer; `vmeshctl capture retry` tries it again
            note          outbound.include.units: app.service does not run
            ERROR         could not run `nft`
        "#]]
        .assert_eq(&text);
        assert!(attention);
    }
}
