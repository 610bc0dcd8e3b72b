//! Failures in the middle of a change: of a tool, of a disk, of one of Envoy's listeners.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use vmesh_net::client;
use vmesh_net::protocol::{RedirectState, Request, Response, State};
use vmesh_testkit::wait_for;

use crate::vm::{self, FakeAgent, OPEN, RulesBackend, SOON, Vm, is_well, status};

/// The limit of tool runs that are sabotaged one by one, which is more than any of these scenarios needs.
const RUNS: usize = 60;

/// Wrappers of a host's tools, which make one chosen run fail.
struct Saboteur(PathBuf);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The tool does nothing, and reports a failure.
    Undone,
    /// The tool does its work, and reports a failure.
    Done,
}

impl Saboteur {
    fn new(vm: &Vm) -> Saboteur {
        let dir = vm.state_dir().parent().unwrap().join("saboteur");
        fs::create_dir_all(&dir).unwrap();
        for tool in ["nft", "iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore"] {
            let (real, dir) = (vm.tools.dir.join(tool), dir.display());
            vm.script(
                tool,
                &format!(
                    "exec 9>>{dir}/lock; flock 9\nruns=$(cat {dir}/runs 2>/dev/null || echo 0); runs=$((runs + 1)); \
                     echo $runs >{dir}/runs\n\
                     if [ \"$runs\" = \"$(cat {dir}/fail 2>/dev/null)\" ]; then\n\
                     [ -e {dir}/done ] && {real} \"$@\" >/dev/null\n: >{dir}/failed\necho sabotaged >&2; exit 1\nfi\n\
                     exec 9>&-\nexec {real} \"$@\"",
                    real = real.display(),
                ),
            );
        }
        Saboteur(dir)
    }

    fn arm(&self, run: usize, failure: Failure) {
        self.disarm();
        for name in ["runs", "failed", "done"] {
            _ = fs::remove_file(self.0.join(name));
        }
        if failure == Failure::Done {
            fs::write(self.0.join("done"), "").unwrap();
        }
        fs::write(self.0.join("fail"), run.to_string()).unwrap();
    }

    fn disarm(&self) {
        _ = fs::remove_file(self.0.join("fail"));
    }

    fn has_struck(&self) -> bool {
        self.0.join("failed").exists()
    }
}

/// `off` restores the rules from before vmesh, whichever tool run failed before.
async fn off_means_off(rules: RulesBackend, failure: Failure) {
    let mut vm = Vm::new(rules).await;
    let saboteur = Saboteur::new(&vm);
    vm.net.take().unwrap().kill().unwrap();
    vm.start_net().await;
    let before = vm.ruleset();
    let mut missed = 0;
    for run in 1..=RUNS {
        client::ask(&vm.socket(), &Request::Retry).await.unwrap();
        let mut agent = FakeAgent::new(&vm, OPEN).await;
        saboteur.arm(run, failure);
        // These requests may be refused, because one of the tools fails.
        if let Response::Status(tried) = agent.want().await
            && let Some(trial) = tried.trial
        {
            agent.confirm(trial).await;
        }
        let status = vm.status().await;
        if status.state == State::Off {
            assert_eq!(vm.ruleset(), before, "{rules:?}, run {run} {failure:?}: {status:?}");
        }
        agent.want.spec.outbound.vips.insert("240.1.2.3:80".parse().unwrap());
        agent.want().await;
        agent.want.spec = Default::default();
        agent.want().await;
        let status = vm.status().await;
        if status.state == State::Off {
            assert_eq!(vm.ruleset(), before, "{rules:?}, run {run} {failure:?}: {status:?}");
        }
        saboteur.disarm();
        vm.until("the rules to go", |status| status.state == State::Off && status.error.is_none()).await;
        assert_eq!(vm.ruleset(), before, "{rules:?}, run {run} {failure:?}");
        if !saboteur.has_struck() {
            missed += 1;
            if missed > 3 {
                assert!(run > 8, "so few runs: {run}");
                vm.terminate_net().await;
                return;
            }
        }
    }
    panic!("more than {RUNS} runs of tools");
}

#[tokio::test]
async fn off_leaves_nothing_whichever_run_of_nft_failed_without_doing_anything() {
    off_means_off(RulesBackend::Nft, Failure::Undone).await;
}

#[tokio::test]
async fn off_leaves_nothing_whichever_run_of_nft_did_its_work_and_failed() {
    off_means_off(RulesBackend::Nft, Failure::Done).await;
}

#[tokio::test]
async fn off_leaves_nothing_whichever_run_of_iptables_did_its_work_and_failed() {
    off_means_off(RulesBackend::Iptables, Failure::Done).await;
}

/// The bypass script runs while vmesh-net reads its rules: vmesh-net has seen no flag, and finds no rules.
#[tokio::test]
async fn a_bypass_amid_a_look_at_the_rules_is_not_mended() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    let (real, armed) = (vm.tools.dir.join("nft"), vm.state_dir().join("armed"));
    let (flag, real, armed_path) = (vm.state_dir().join("bypass"), real.display(), armed.display());
    fs::write(&armed, "").unwrap();
    vm.script(
        "nft",
        &format!(
            "if [ \"$2\" = list ] && rm {armed_path} 2>/dev/null; then\n\
             : >{flag}; {real} delete table inet vmesh\nfi\nexec {real} \"$@\"",
            flag = flag.display(),
        ),
    );
    vm.nft(&["add", "table", "inet", "somebody"]);
    let bypassed = vm.until("the bypass to be seen", |status| status.state == State::Bypassed).await;
    assert!(!armed.exists());
    assert_eq!(bypassed.drift, Default::default());
    assert!(!vm.nft(&["list", "tables"]).contains("inet vmesh"));

    fs::remove_file(&flag).unwrap();
    vm.until("the host to be captured again", |status| status.state == State::Confirmed).await;
    agent.well_until("the redirects to hold again", is_well).await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

/// The process is told to stop after a failed change.
#[tokio::test]
async fn a_stop_after_a_failed_change_leaves_nothing() {
    for rules in [RulesBackend::Nft, RulesBackend::Iptables] {
        let mut vm = Vm::new(rules).await;
        let saboteur = Saboteur::new(&vm);
        let before = vm.ruleset();
        for run in 1..=RUNS {
            _ = fs::remove_file(vm.state_dir().join("state.json"));
            vm.net.take().unwrap().kill().unwrap();
            saboteur.arm(run, Failure::Done);
            vm.start_net().await;
            let mut agent = FakeAgent::new(&vm, OPEN).await;
            agent.want().await;
            saboteur.disarm();
            vm.terminate_net().await;
            assert_eq!(vm.ruleset(), before, "{rules:?}, run {run}");
            vm.start_net().await;
            if !saboteur.has_struck() {
                assert!(run > 3, "so few runs: {run}");
                break;
            }
        }
    }
}

/// A file system in the place of the state directory, which can be made to hang.
struct Disk {
    at: PathBuf,
    image: PathBuf,
}

impl Disk {
    fn mount(at: &Path) -> Disk {
        let image = at.with_extension("img");
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        run(Command::new("mkfs.ext4").arg("-q").arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(at));
        Disk { at: at.to_owned(), image }
    }

    /// Blocks all writes until [`Disk::thaw`].
    fn freeze(&self) {
        run(Command::new("fsfreeze").arg("-f").arg(&self.at));
    }

    fn thaw(&self) -> bool {
        Command::new("fsfreeze").arg("-u").arg(&self.at).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.thaw();
        _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
        _ = fs::remove_file(&self.image);
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The heartbeat neither writes to a disk nor counts sockets.
#[tokio::test]
async fn a_disk_that_hangs_and_eight_who_ask_let_no_redirect_lapse() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    vm.net.take().unwrap().kill().unwrap();
    let disk = Disk::mount(&vm.state_dir());
    vm.start_net().await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    agent.well_until("the redirects to hold", is_well).await;
    disk.freeze();
    // The keeper waits for the disk, and the agent for the keeper.
    agent.want.ports.insert(15_999);
    let wants = agent.want();
    let looks = async {
        // The loop lasts three times as long as redirects hold without a heartbeat.
        for _ in 0..50 {
            let askers: Vec<_> = (0..8).map(|_| vm.status()).collect();
            for asker in askers {
                assert_eq!(asker.await.redirects, RedirectState::Hold);
            }
            assert_eq!(vm.get(8080).unwrap(), "mesh");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert!(disk.thaw());
    };
    let (answer, ()) = tokio::join!(wants, looks);
    assert_eq!(status(answer).state, State::Confirmed);
    assert_eq!(vm.get(8080).unwrap(), "mesh");
    drop(disk);
}

/// Envoy has a listener for each direction; this one has the outbound listener only.
#[tokio::test]
async fn a_listener_that_is_missing_costs_its_own_direction_only() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    agent.want.spec.inbound.capture = vmesh_capture::spec::InboundCapture::Redirect;
    agent.want.spec.inbound.ports.insert("8081".parse().unwrap());
    assert_eq!(status(agent.want().await).state, State::Trial);
    // The loop lasts longer than redirects hold without a heartbeat.
    for _ in 0..25 {
        let now = agent.well().await;
        assert_eq!(now.redirects, RedirectState::Hold, "{now:?}");
        assert_eq!(vm.get(8080).unwrap(), "mesh");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let now = agent.well().await;
    assert!(now.notes.iter().any(|note| note.contains("inbound redirects have lapsed")), "{now:?}");
    let Response::Refused(why) = agent.confirm(now.trial.unwrap()).await else { panic!("it was confirmed") };
    assert!(why.contains("15006"), "{why}");
}

/// A change that removes inbound capture is rolled back. Inbound capture does not return, because Envoy no
/// longer has the listener for it.
#[tokio::test]
async fn what_is_taken_back_brings_back_no_rule_that_leads_nowhere() {
    const BOTH: &str = "{outbound: {capture: addresses, addresses: {\"SERVER\": {}}}, \
        inbound: {capture: redirect, on_loss: closed, ports: [8081]}, dead_man: {timeout: 3s}}";
    let mut vm = Vm::new(RulesBackend::Nft).await;
    // The confirmed spec on the disk is from when Envoy had that listener.
    vm.net.take().unwrap().kill().unwrap();
    let confirmed = serde_json::json!({"commit": {"confirmed": vm::want(&vm, BOTH).spec}});
    fs::write(vm.state_dir().join("state.json"), confirmed.to_string()).unwrap();
    vm.start_net().await;
    let table = || vm.nft(&["list", "table", "inet", "vmesh"]);
    assert!(table().contains("redirect to :15006"), "{}", table());

    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.want.spec.outbound.percent = vmesh_capture::spec::Percent::new(99).unwrap();
    agent.want.confirm_within = 5;
    assert_eq!(status(agent.want().await).state, State::Trial);
    let back = agent.well_until("the trial to end", |status| status.trial.is_none()).await;
    assert!(back.reverted.is_some(), "{back:?}");
    let look = async || if table().contains(":15006") { Err(table()) } else { Ok(()) };
    wait_for("the inbound rules to stay away", SOON, look).await.unwrap();
    agent.well_until("outbound capture to go on", is_well).await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");

    // The rules do not return after a restart either.
    vm.net.take().unwrap().kill().unwrap();
    vm.start_net().await;
    assert!(!vm.nft(&["list", "table", "inet", "vmesh"]).contains(":15006"));
    // The agent asks for the confirmed configuration again, which needs no trial.
    let mut agent = FakeAgent::new(&vm, BOTH).await;
    let again = status(agent.want().await);
    assert_eq!((again.state, again.trial), (State::Confirmed, None), "{again:?}");
    assert!(vm.nft(&["list", "table", "inet", "vmesh"]).contains("redirect to :15006"));
}

/// After the state file is damaged, only the kernel knows what was captured, until the agent connects. No
/// process may save that nothing was captured.
#[tokio::test]
async fn a_state_that_cannot_be_read_is_not_replaced_before_the_agent_speaks() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    FakeAgent::new(&vm, vm::CLOSED).await.capture().await;
    vm.net.take().unwrap().kill().unwrap();
    fs::write(vm.state_dir().join("state.json"), "{\"commit\": 7").unwrap();
    vm.start_net().await;
    // An upgrade happens before the agent has connected.
    vm.net.as_ref().unwrap().signal(rustix::process::Signal::HUP).unwrap();
    let starts = async || {
        let log = vm.net.as_ref().unwrap().output();
        let starts = log.matches("state.json, so no rule changes until the agent connects").count();
        if starts == 2 { Ok(()) } else { Err(log) }
    };
    wait_for("the next process to read the state", SOON, starts).await.unwrap();
    vm.status().await;
    assert_eq!(vm.get(8080).unwrap(), "mesh", "what is closed stays so");

    // The agent asks for no capture, so the unknown rules are removed at once.
    let mut agent = FakeAgent::new(&vm, "{}").await;
    agent.want().await;
    let table = || vm.nft(&["list", "tables"]);
    assert!(!vm.ruleset().contains("redirect to :15001"), "{}", vm.ruleset());
    let look = async || if table().contains("inet vmesh") { Err(table()) } else { Ok(()) };
    wait_for("the table to go", SOON, look).await.unwrap();
}

/// netfilter-persistent or an operator loads a ruleset that was saved during capture.
#[tokio::test]
async fn rules_of_ours_that_somebody_loads_again_after_off_are_taken_away() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, vm::CLOSED).await;
    agent.capture().await;
    let saved = vm.state_dir().join("saved.nft");
    fs::write(&saved, vm.nft(&["list", "table", "inet", "vmesh"])).unwrap();
    agent.want.spec = Default::default();
    agent.want().await;
    vm.until("the rules to go", |status| status.state == State::Off).await;
    vm.nft(&["-f", saved.to_str().unwrap()]);
    let look = async || match vm.nft(&["list", "tables"]) {
        tables if tables.contains("inet vmesh") => Err(tables),
        _ => Ok(()),
    };
    wait_for("the table to go again", Duration::from_secs(20), look).await.unwrap();
    assert_eq!(vm.status().await.state, State::Off);
}

/// Makes the iptables tools with this suffix fail while the file `broken` exists.
fn break_iptables(vm: &Vm, broken: &Path, end: &str) {
    for tool in fs::read_dir(&vm.tools.dir).unwrap().flatten() {
        let name = tool.file_name().into_string().unwrap();
        if name.starts_with("ip") && name.ends_with(end) {
            let (broken, real) = (broken.display(), vm.tools.dir.join(&name));
            let real = real.display();
            vm.script(
                &name,
                &format!("[ -e {broken} ] && {{ echo broken >&2; exit 4; }}\nexec {real} \"$@\""),
            );
        }
    }
}

#[tokio::test]
async fn rules_of_an_earlier_backend_whose_tools_fail_at_first_are_taken_away_later() {
    for (end, is_told) in [("-save", false), ("-restore", true)] {
        let mut vm = Vm::new(RulesBackend::Iptables).await;
        FakeAgent::new(&vm, OPEN).await.capture().await;
        vm.net.take().unwrap().kill().unwrap();
        let broken = vm.state_dir().join("broken");
        break_iptables(&vm, &broken, end);
        fs::write(&broken, "").unwrap();
        vm.rules = RulesBackend::Nft;
        vm.start_net().await;
        let mut agent = FakeAgent::new(&vm, OPEN).await;
        agent.want().await;
        let status =
            agent.well_until("capture to go on by nft", |_| vm.ruleset().contains("table inet vmesh")).await;
        assert!(vm.ruleset().contains("VMESH_"), "{end}: nothing was left to be removed: {status:?}");
        if is_told {
            agent
                .well_until("the failure to be told", |status| {
                    status.error.as_ref().is_some_and(|error| error.contains("broken"))
                })
                .await;
        }
        assert_eq!(vm.get(8080).unwrap(), "mesh");
        fs::remove_file(&broken).unwrap();
        // A change of rules by any program makes vmesh-net check again.
        vm.nft(&["add", "table", "inet", "another"]);
        let is_done =
            |status: &vmesh_net::protocol::Status| status.error.is_none() && !vm.ruleset().contains("VMESH_");
        agent.well_until("the earlier rules to go", is_done).await;
        assert_eq!(vm.get(8080).unwrap(), "mesh");
    }
}

/// In another pid namespace, the kernel reports vmesh's programs by ids that are unknown there.
#[tokio::test]
async fn in_a_namespace_of_processes_own_changes_are_not_taken_for_those_of_others() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let lists = vm.state_dir().join("lists");
    let (real, log) = (vm.tools.nft.display().to_string(), lists.display().to_string());
    vm.script("nft", &format!("case \"$*\" in *list*) echo \"$*\" >>{log};; esac\nexec {real} \"$@\""));
    vm.net.take().unwrap().kill().unwrap();
    vm.start_net_by(&["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.capture().await;
    agent.well_until("the redirects to hold", is_well).await;
    fs::write(&lists, "").unwrap();
    // The heartbeat makes a transaction every 600 ms.
    let began = std::time::Instant::now();
    agent.well_until("some refreshes", |_| began.elapsed() > Duration::from_secs(6)).await;
    let listings = fs::read_to_string(&lists).unwrap();
    assert!(listings.lines().count() <= 2, "rules were listed:\n{listings}");
    // A change by another program is still noticed at once.
    vm.nft(&["delete", "table", "inet", "vmesh"]);
    agent.well_until("the rules to be mended", |status| status.drift.count == 1).await;
}
