//! End-to-end tests of vmesh-net: the program runs as root in a network namespace, with a real Envoy and with
//! the rules of nftables and of iptables.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod failures;
mod firewalls;
mod hostile;
mod rules;
mod units;
mod vm;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use vm::{CLOSED, FakeAgent, OPEN, RulesBackend, Vm, is_well, status};
use vmesh_net::client;
use vmesh_net::protocol::{EnvoyHealth, MAX_LINE, RedirectState, Request, Response, State};

async fn tried_confirmed_and_left(rules: RulesBackend) {
    let mut vm = Vm::new(rules).await;
    let before = vm.ruleset();
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    let trial = status(agent.want().await);
    assert_eq!((trial.state, trial.trial), (State::Trial, Some(1)), "{trial:?}");
    assert_eq!(vm.get(8080).unwrap(), "mesh", "a trial captures");
    assert!(matches!(agent.confirm(7).await, Response::Refused(_)), "another trial");
    assert_eq!(status(agent.confirm(1).await).state, State::Confirmed);
    assert_eq!(vm.get(8080).unwrap(), "mesh");
    assert_eq!(vm.get(9999).unwrap(), "mesh", "who is not captured is not touched");
    let again = status(agent.want().await);
    assert_eq!((again.state, again.drift.count), (State::Confirmed, 0), "the same again changes nothing");
    vm.terminate_net().await;
    assert_eq!(vm.ruleset(), before);
    assert_eq!(vm.get(8080).unwrap(), "direct");
}

#[tokio::test]
async fn a_change_is_tried_confirmed_and_left_without_a_trace_by_nftables() {
    tried_confirmed_and_left(RulesBackend::Nft).await;
}

#[tokio::test]
async fn a_change_is_tried_confirmed_and_left_without_a_trace_by_iptables() {
    tried_confirmed_and_left(RulesBackend::Iptables).await;
}

#[tokio::test]
async fn what_nobody_confirms_is_taken_back_and_not_tried_again_unasked() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let before = vm.ruleset();
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.want.confirm_within = 5;
    assert_eq!(status(agent.want().await).state, State::Trial);
    let reverted = agent.well_until("the trial to end", |status| status.trial.is_none()).await;
    assert!(reverted.reverted.as_ref().unwrap().contains("no client confirmed"), "{reverted:?}");
    vm.until("the rules to go", |status| status.state == State::Off).await;
    assert_eq!(vm.ruleset(), before);
    // The agent repeats its request.
    let still = status(agent.want().await);
    assert_eq!((still.state, still.trial), (State::Off, None), "{still:?}");
    // A different spec may be tried, and after an operator's retry also the old one.
    client::ask(&vm.socket(), &Request::Retry).await.unwrap();
    agent.want.confirm_within = 60;
    agent.capture().await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

#[tokio::test]
async fn a_process_that_is_killed_in_a_trial_takes_it_back_at_its_next_start() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let before = vm.ruleset();
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    assert_eq!(status(agent.want().await).state, State::Trial);
    vm.net.take().unwrap().kill().unwrap();
    assert_ne!(vm.ruleset(), before, "a crash takes nothing away");
    // The kernel's clock ends the trial while no vmesh-net runs.
    vm.answers_without_net("direct").await;
    vm.start_net().await;
    vm.until("the rules to go", |status| status.state == State::Off).await;
    assert_eq!(vm.ruleset(), before);
    // The trial may be the reason why the process died. So each later process waits for an operator's retry.
    for _ in 0..2 {
        let mut agent = FakeAgent::new(&vm, OPEN).await;
        let off = status(agent.want().await);
        assert_eq!((off.state, off.trial), (State::Off, None), "{off:?}");
        assert!(off.reverted.as_ref().unwrap().contains("ended during the trial"), "{off:?}");
        vm.net.take().unwrap().kill().unwrap();
        vm.start_net().await;
    }
    client::ask(&vm.socket(), &Request::Retry).await.unwrap();
    FakeAgent::new(&vm, OPEN).await.capture().await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

#[tokio::test]
async fn a_process_that_is_told_to_end_in_a_trial_tries_it_again_at_its_next_start() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let before = vm.ruleset();
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    assert_eq!(status(agent.want().await).state, State::Trial);
    vm.net.as_ref().unwrap().signal(Signal::HUP).unwrap();
    vm.begun_anew().await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    assert_eq!(status(agent.want().await).state, State::Trial);
    vm.terminate_net().await;
    assert_eq!(vm.ruleset(), before);
    vm.start_net().await;
    FakeAgent::new(&vm, OPEN).await.capture().await;
}

#[tokio::test]
async fn an_envoy_that_dies_or_hangs_is_gone_past_and_taken_up_again() {
    for rules in [RulesBackend::Nft, RulesBackend::Iptables] {
        let mut vm = Vm::new(rules).await;
        let mut agent = FakeAgent::new(&vm, OPEN).await;
        agent.capture().await;
        vm.envoy.take().unwrap().kill().unwrap();
        let gone =
            agent.well_until("Envoy to be missed", |status| status.redirects == RedirectState::Lapsed).await;
        assert_eq!(gone.envoy, EnvoyHealth::Gone);
        assert_eq!(vm.get(8080).unwrap(), "direct");
        vm.start_envoy().await;
        agent.well_until("Envoy to be seen", is_well).await;
        assert_eq!(vm.get(8080).unwrap(), "mesh");
        vm.envoy.as_ref().unwrap().freeze().unwrap();
        agent.well_until("Envoy to be missed", |status| status.redirects == RedirectState::Lapsed).await;
        assert_eq!(vm.get(8080).unwrap(), "direct");
        vm.envoy.as_ref().unwrap().thaw().unwrap();
        agent.well_until("Envoy to be seen", is_well).await;
        assert_eq!(vm.get(8080).unwrap(), "mesh");
    }
}

#[tokio::test]
async fn a_program_that_takes_envoys_port_while_it_is_away_is_not_taken_for_envoy() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    vm.envoy.take().unwrap().kill().unwrap();
    // The program closes connections, as Envoy does on its capture port.
    let listener =
        vm.a.within_as(vm::APP, || std::net::TcpListener::bind("127.0.0.1:15001")).unwrap().unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    agent.well_until("it to be seen", |status| status.envoy == EnvoyHealth::WrongUser).await;
    agent.well_until("it to be gone past", |status| status.redirects == RedirectState::Lapsed).await;
    assert_eq!(vm.get(8080).unwrap(), "direct");
}

#[tokio::test]
async fn who_says_that_envoy_has_ended_is_not_believed_and_makes_it_be_seen_at_once() {
    for rules in [RulesBackend::Nft, RulesBackend::Iptables] {
        let mut vm = Vm::new(rules).await;
        let mut agent = FakeAgent::new(&vm, OPEN).await;
        agent.capture().await;
        let look = async || status(client::ask(&vm.socket(), &Request::Look).await.unwrap());
        assert_eq!(look().await.redirects, RedirectState::Hold);
        assert_eq!(vm.get(8080).unwrap(), "mesh");
        vm.envoy.take().unwrap().kill().unwrap();
        let socket = vm.socket();
        assert_eq!(
            status(client::ask(&socket, &Request::Look).await.unwrap()).redirects,
            RedirectState::Lapsed
        );
        assert_eq!(vm.get(8080).unwrap(), "direct", "the next call already");
        // The probe's results from before Envoy's end have no effect.
        for _ in 0..15 {
            agent.well().await;
            assert_eq!(vm.get(8080).unwrap(), "direct");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        vm.start_envoy().await;
        agent.well_until("Envoy to be seen", is_well).await;
        assert_eq!(vm.get(8080).unwrap(), "mesh");
    }
}

#[tokio::test]
async fn what_is_to_fail_closed_does() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, CLOSED).await;
    agent.capture().await;
    vm.envoy.take().unwrap().kill().unwrap();
    agent.well_until("Envoy to be missed", |status| status.envoy == EnvoyHealth::Gone).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(vm.get(8080).unwrap_err().contains("refused"));
}

#[tokio::test]
async fn an_agent_that_says_nothing_lets_redirects_lapse_and_one_that_speaks_again_holds_them() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    agent.well_until("the redirects to hold", is_well).await;
    vm.answers("direct").await;
    // The kernel lets the redirects lapse by itself, and vmesh-net reports it after its next check.
    vm.until("the lapse to be told", |status| status.redirects == RedirectState::Lapsed).await;
    agent.well_until("the redirects to hold", is_well).await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

#[tokio::test]
async fn rules_that_somebody_changes_are_mended_at_once_and_it_is_told_who_it_was() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    for (round, change) in
        [&["delete", "table", "inet", "vmesh"][..], &["flush", "ruleset"]].into_iter().enumerate()
    {
        vm.nft(change);
        let mended =
            vm.until("the rules to be mended", |status| status.drift.count == round as u64 + 1).await;
        assert!(mended.drift.by.as_ref().unwrap().starts_with("nft (pid "), "{mended:?}");
        agent.well_until("the redirects to hold", is_well).await;
        assert_eq!(vm.get(8080).unwrap(), "mesh");
    }
    // Rules of other programs stay.
    vm.nft(&["add", "table", "inet", "foreign"]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(vm.nft(&["list", "tables"]).contains("foreign"));
    assert_eq!(vm.status().await.drift.count, 2);
}

#[tokio::test]
async fn the_bypass_outlasts_a_restart_and_is_lifted() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let before = vm.ruleset();
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    let path = vm.tools.path();
    let script = |argument: &[&str]| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../vmesh-capture/bypass.sh");
        let done = Command::new("/bin/sh")
            .arg(script)
            .args(argument)
            .env("PATH", &path)
            .env("VMESH_BYPASS_FLAG", vm.state_dir().join("bypass"))
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    script(&[]);
    assert_eq!(vm.get(8080).unwrap(), "direct");
    let bypassed = vm.until("the bypass to be seen", |status| status.state == State::Bypassed).await;
    assert!(!bypassed.captures());
    assert_eq!(vm.ruleset(), before);
    assert_eq!(status(agent.want().await).state, State::Bypassed, "an agent does not lift it");
    script(&["--lift"]);
    agent.well_until("the bypass to be lifted", |status| status.state == State::Confirmed).await;
    agent.well_until("the redirects to hold", is_well).await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");
    script(&[]);
    vm.net.take().unwrap().kill().unwrap();
    vm.start_net().await;
    assert_eq!(vm.status().await.state, State::Bypassed);
    assert_eq!(vm.get(8080).unwrap(), "direct");
}

#[tokio::test]
async fn what_is_proposed_while_bypassed_is_not_confirmed_and_is_tried_once_the_bypass_is_lifted() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    let flag = vm.state_dir().join("bypass");
    std::fs::write(&flag, "").unwrap();
    vm.until("the bypass to be seen", |status| status.state == State::Bypassed).await;
    agent.want.confirm_within = 5;
    let trial = status(agent.want().await).trial.unwrap();
    let refused = agent.confirm(trial).await;
    assert!(matches!(&refused, Response::Refused(why) if why.contains("bypass")), "{refused:?}");
    // The pause is longer than the limit of the trial.
    tokio::time::sleep(Duration::from_secs(7)).await;
    let still = vm.status().await;
    assert_eq!((still.trial, still.reverted), (Some(trial), None), "it was never tried");
    std::fs::remove_file(&flag).unwrap();
    agent.well_until("the trial to begin", |status| status.state == State::Trial).await;
    assert_eq!(status(agent.confirm(trial).await).state, State::Confirmed);
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

#[tokio::test]
async fn an_upgrade_in_place_takes_no_rule_away_and_cuts_no_connection() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    let handle = || vm.nft(&["-a", "list", "table", "inet", "vmesh"]);
    let table = handle();
    let pid = vm.net.as_ref().unwrap().pid();
    vm.net.as_ref().unwrap().signal(Signal::HUP).unwrap();
    vm.begun_anew().await;
    assert_eq!(vm.net.as_ref().unwrap().pid(), pid);
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    assert_eq!(status(agent.want().await).state, State::Confirmed, "no second trial");
    agent.well_until("the redirects to hold", is_well).await;
    let names = |table: &str| {
        table.lines().filter(|line| line.contains("chain")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(names(&handle()), names(&table), "the chains are the same, by their handles");
}

#[tokio::test]
async fn captured_connections_are_left_to_end_before_the_rules_go() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let before = vm.ruleset();
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    // The server behind Envoy sends its name and waits for the client to close.
    vm.stay(true);
    let to = std::net::SocketAddr::from((vm.b.v4, 8080));
    let mut client = vm.a.within_as(vm::APP, || TcpStream::connect(to)).unwrap().unwrap();
    let mut name = [0; 4];
    client.read_exact(&mut name).unwrap();
    assert_eq!(&name, b"mesh");
    agent.want.spec.outbound.capture = vmesh_capture::spec::OutboundCapture::Off;
    let leaving = status(agent.want().await);
    assert_eq!(leaving.state, State::Leaving, "{leaving:?}");
    client.write_all(b"still there?").unwrap();
    let mut echo = [0; 12];
    client.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"still there?");
    vm.stay(false);
    assert_eq!(vm.get(8080).unwrap(), "direct", "nothing new is captured");
    drop(client);
    vm.until("the rules to go", |status| status.state == State::Off).await;
    assert_eq!(vm.ruleset(), before);
    vm.terminate_net().await;
}

#[tokio::test]
async fn strangers_may_look_and_nonsense_costs_its_connection_only() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    std::fs::set_permissions(vm.socket(), std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let socket = vm.socket();
    let ask = |line: Vec<u8>| {
        let socket = socket.clone();
        vm.a.within_as(vm::APP, move || {
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // The server may close the connection before all is sent.
            _ = stream.write_all(&line);
            let mut answer = [0; 4096];
            let len = stream.read(&mut answer).unwrap_or(0);
            String::from_utf8_lossy(answer.get(..len).unwrap()).into_owned()
        })
        .unwrap()
    };
    assert!(ask(b"{\"ask\":\"status\"}\n".to_vec()).contains("\"confirmed\""));
    for change in [
        "{\"ask\":\"retry\"}\n",
        "{\"ask\":\"plan\"}\n",
        "{\"ask\":\"well\"}\n",
        "{\"ask\":\"want\",\"spec\":{}}\n",
    ] {
        let answer = ask(change.as_bytes().to_vec());
        assert!(answer.contains("may read the status only"), "{change}: {answer}");
    }
    vm.says("a user without permission").await;
    let logged = vm.net.as_ref().unwrap().output().matches("a user without permission").count();
    assert_eq!(logged, 1, "a user without permission cannot fill the log");
    assert!(ask(b"rm -rf /\n".to_vec()).contains("could not parse the request"));
    let unknown = "{\"ask\":\"want\",\"spec\":{\"outbound\":{\"rules\":[\"accept\"]}}}\n";
    assert!(ask(unknown.as_bytes().to_vec()).contains("unknown field `rules`"));
    assert_eq!(ask(vec![b'a'; MAX_LINE + 10]), "");
    // Many connections of other local users block nobody.
    let _many: Vec<_> = (0..40).map(|_| vm.a.within_as(vm::APP, || UnixStream::connect(&socket))).collect();
    assert_eq!(status(agent.want().await).state, State::Confirmed);
}

#[tokio::test]
async fn of_two_agents_the_second_is_told_so_until_the_first_is_gone() {
    const FIRST: &str = "import socket, sys, time\n\
        s = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\nf = s.makefile('rw')\n\
        while True:\n  f.write('{\"ask\": \"well\"}\\n'); f.flush(); f.readline(); print('spoke', flush=True); time.sleep(0.5)\n";
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut first = Command::new("python3");
    first.args(["-c", FIRST]).arg(vm.socket());
    let mut first = vmesh_testkit::process::Daemon::spawn("the first agent", first).unwrap();
    first.wait_line("spoke", vm::SOON).await.unwrap();
    let mut second = FakeAgent::new(&vm, OPEN).await;
    let Response::Refused(why) = second.want().await else { panic!("both are heard") };
    assert!(why.contains(&format!("another agent (pid {})", first.pid())), "{why}");
    assert_eq!(vm.status().await.state, State::Off, "looking is for both");
    first.kill().unwrap();
    second.capture().await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

#[tokio::test]
async fn a_state_that_cannot_be_read_leaves_the_rules_as_they_are_until_the_agent_speaks() {
    for rules in [RulesBackend::Nft, RulesBackend::Iptables] {
        let mut vm = Vm::new(rules).await;
        let before = vm.ruleset();
        let mut agent = FakeAgent::new(&vm, CLOSED).await;
        agent.capture().await;
        let path = vm.state_dir().join("state.json");
        let of_a_newer_version =
            std::fs::read_to_string(&path).unwrap().replace("\"on_loss\"", "\"on_loss_of\"");
        // With iptables, a lost state file also loses the list of chains from before the first rule.
        let garbage = (rules == RulesBackend::Nft).then_some("{\"commit\": 7");
        for text in garbage.into_iter().chain([of_a_newer_version.as_str()]) {
            vm.net.take().unwrap().kill().unwrap();
            std::fs::write(&path, text).unwrap();
            vm.start_net().await;
            assert_eq!(vm.get(8080).unwrap(), "mesh", "what is closed stays so");
            vm.says("state.json, so no rule changes until the agent connects").await;
            // The process cannot know that this spec was confirmed.
            FakeAgent::new(&vm, CLOSED).await.capture().await;
            assert_eq!(vm.get(8080).unwrap(), "mesh");
        }
        vm.terminate_net().await;
        assert_eq!(vm.ruleset(), before);
    }
}

#[tokio::test]
async fn rules_of_an_earlier_backend_give_way_to_those_of_the_next_and_cost_no_connection() {
    for (first, next) in
        [(RulesBackend::Iptables, RulesBackend::Nft), (RulesBackend::Nft, RulesBackend::Iptables)]
    {
        let mut vm = Vm::new(first).await;
        let before = vm.ruleset();
        vm.stay(true);
        FakeAgent::new(&vm, OPEN).await.capture().await;
        let to = std::net::SocketAddr::from((vm.b.v4, 8080));
        let mut open = vm.a.within_as(vm::APP, || TcpStream::connect(to)).unwrap().unwrap();
        let mut who = [0; 4];
        open.read_exact(&mut who).unwrap();
        assert_eq!(&who, b"mesh");
        let mut echoes = |message: &[u8; 4]| {
            open.write_all(message).unwrap();
            open.read_exact(&mut who).unwrap();
            assert_eq!(&who, message);
        };
        echoes(b"once");

        vm.net.take().unwrap().kill().unwrap();
        vm.rules = next;
        vm.start_net().await;
        vm.stay(false);
        let mut agent = FakeAgent::new(&vm, OPEN).await;
        agent.want().await;
        agent.well_until("capture to go on", is_well).await;
        assert_eq!(vm.get(8080).unwrap(), "mesh");
        echoes(b"more");
        let table = vm.ruleset().contains("table inet vmesh");
        let chains = vm.ruleset().contains("VMESH_");
        assert_eq!(
            (table, chains),
            (next == RulesBackend::Nft, next == RulesBackend::Iptables),
            "{}",
            vm.ruleset()
        );
        vm.terminate_net().await;
        assert_eq!(vm.ruleset(), before, "{first:?}, then {next:?}");
        assert_eq!(vm.get(8080).unwrap(), "direct");

        // Capture is switched off before a process with the other backend starts.
        vm.rules = first;
        vm.start_net().await;
        let mut agent = FakeAgent::new(&vm, OPEN).await;
        agent.want().await;
        agent.well_until("capture to go on", is_well).await;
        vm.net.take().unwrap().kill().unwrap();
        std::fs::remove_file(vm.state_dir().join("state.json")).unwrap();
        vm.rules = next;
        vm.start_net().await;
        vm.until("the rules to go", |status| status.state == State::Off).await;
        assert!(!vm.ruleset().contains("VMESH_") && !vm.ruleset().contains("inet vmesh"), "{}", vm.ruleset());
    }
}

/// A real user directory cannot be made to hang at will, so scripts take the place of `getent` and
/// `systemctl`.
#[tokio::test]
async fn a_directory_of_users_that_hangs_captures_nobody_who_is_left_out_and_lets_nothing_lapse() {
    const OTHER: u32 = 5999;
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let hangs = vm.state_dir().join("hangs");
    let with_hang = |text: &str| format!("[ -e {} ] && exec sleep 600\n{text}", hangs.display());
    let users: String =
        (0..8).map(|n| format!("app{n}) echo app{n}:x:{}:1::/:/bin/sh;;\n", vm::APP + n)).collect();
    vm.script("getent", &with_hang(&format!("case $2 in\n{users}*) exit 2;;\nesac")));
    vm.script("systemctl", &with_hang("echo 'Listen=[::]:2244 (Stream)'"));
    let spec = "{outbound: {capture: addresses, addresses: {\"SERVER\": {}}, \
        exclude: {users: [app0, app1, app2, app3, app4, app5, app6, app7]}}, dead_man: {timeout: 10s}}";
    let mut agent = FakeAgent::new(&vm, spec).await;
    agent.capture().await;
    assert_eq!((vm.get(8080).unwrap(), vm.get_as(OTHER, 8080).unwrap()), ("direct".into(), "mesh".into()));

    std::fs::write(&hangs, "").unwrap();
    agent.want.spec.outbound.exclude.ports.insert("9".parse().unwrap());
    agent.capture().await;
    for _ in 0..20 {
        let status = agent.well().await;
        assert_ne!(status.redirects, RedirectState::Lapsed, "{status:?}");
        assert_eq!(
            (vm.get(8080).unwrap(), vm.get_as(OTHER, 8080).unwrap()),
            ("direct".into(), "mesh".into())
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(vm.ruleset().contains("2244"), "what systemd held for SSH is kept");

    // The known ids survive a restart.
    vm.net.take().unwrap().kill().unwrap();
    vm.start_net().await;
    let mut agent = FakeAgent { want: agent.want, ..FakeAgent::new(&vm, spec).await };
    agent.want().await;
    let again = agent.well_until("capture to go on", is_well).await;
    assert!(again.notes.iter().any(|note| note.contains("`app0`") && note.contains("5000")), "{again:?}");
    assert_eq!((vm.get(8080).unwrap(), vm.get_as(OTHER, 8080).unwrap()), ("direct".into(), "mesh".into()));
    assert!(vm.ruleset().contains("2244"));

    // A new user whose id is not known.
    agent.want.spec.outbound.exclude.users.insert("new".parse().unwrap());
    let Response::Refused(why) = agent.want().await else { panic!("it was not refused") };
    assert!(why.contains("check that `getent passwd new` answers"), "{why}");
    assert_eq!((vm.get(8080).unwrap(), vm.get_as(OTHER, 8080).unwrap()), ("direct".into(), "mesh".into()));
}

#[tokio::test]
async fn what_would_be_done_is_shown_and_not_done() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let before = vm.ruleset();
    let want = vm::want(&vm, OPEN);
    let answer = client::ask(&vm.socket(), &Request::Plan { want: Some(want) }).await.unwrap();
    let Response::Plan(text) = answer else { panic!("{answer:?}") };
    assert!(text.contains("nft -f - <<'.'") && text.contains("redirect to :15001"), "{text}");
    assert_eq!(vm.ruleset(), before);
}

#[tokio::test]
async fn an_open_connection_lives_through_the_end_of_capture() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    // This connection is older than the first rule.
    let to = std::net::SocketAddr::from((vm.b.v4, 22));
    let listener = vm.b.within(|| std::net::TcpListener::bind(to)).unwrap().unwrap();
    let mut client = vm.a.within_as(vm::APP, || TcpStream::connect(to)).unwrap().unwrap();
    let (mut server, _) = listener.accept().unwrap();
    agent.capture().await;
    agent.want.spec.outbound.capture = vmesh_capture::spec::OutboundCapture::Off;
    agent.want().await;
    vm.until("the rules to go", |status| status.state == State::Off).await;
    server.write_all(b"still here").unwrap();
    let mut greeting = [0; 10];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"still here");
}
