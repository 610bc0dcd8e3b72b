//! The guard and a small model of it do the same, whatever the source reports.

use super::*;

const SERVICES: [&str; 3] = ["a", "b", "c"];

#[derive(Debug, Clone)]
enum Step {
    /// The source lists these endpoints of each service; `None` if the service is absent.
    Says([Option<BTreeSet<u16>>; 3]),
    Fails,
    CanBeReadAgain(bool),
    Accept(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let service = || prop::option::weighted(0.9, prop::collection::btree_set(1u16..20, 0..20));
    prop_oneof![
        8 => [service(), service(), service()].prop_map(Step::Says),
        1 => Just(Step::Fails),
        1 => any::<bool>().prop_map(Step::CanBeReadAgain),
        1 => (0..SERVICES.len()).prop_map(Step::Accept),
    ]
}

/// A simple model of the rules: it decides by looking back at the complete history.
#[derive(Default)]
struct Model {
    /// The listed endpoints of each service over time. A failing source adds no entry.
    reports: [Vec<(Option<Instant>, BTreeSet<u16>)>; 3],
    /// The history of the total number of endpoints.
    totals: Vec<(Instant, usize)>,
    /// Set while the source lists less than 65 % of this number, which it listed throughout the window
    /// before.
    fleet: Option<usize>,
    /// The largest number of listed endpoints of each service since a served endpoint went missing.
    most: [usize; 3],
    /// Set while a service lists less than half of at least five earlier endpoints: the start time, and the
    /// earlier number.
    few: [Option<(Instant, usize)>; 3],
    failing: bool,
}

impl Model {
    fn says(&mut self, says: &[Option<BTreeSet<u16>>; 3], before: &Registrations, now: Instant) {
        let again = std::mem::take(&mut self.failing);
        for (at, says) in says.iter().enumerate() {
            let reports = self.reports[at].last().map(|(_, reports)| reports.clone()).unwrap_or_default();
            let is_all_named = shown(before, at) == reports;
            self.most[at] = if is_all_named { reports.len() } else { self.most[at].max(reports.len()) };
            let before = self.most[at];
            let says = says.clone().unwrap_or_default();
            if again {
                self.reports[at].iter_mut().for_each(|(since, _)| *since = since.map(|_| now));
            }
            self.few[at] = match self.few[at] {
                Some((_, of)) if says.len() * 2 >= of => None,
                Some((since, of)) => Some((if again { now } else { since }, of)),
                None if before >= 5 && says.len() * 2 < before => Some((now, before)),
                None => None,
            };
            self.reports[at].push((Some(now), says));
        }
        let total = says.iter().flatten().map(BTreeSet::len).sum();
        let window = Duration::from_secs(60);
        let begin = self.totals.iter().rposition(|(since, _)| *since + window <= now).unwrap_or(0);
        let least = self.totals[begin..].iter().map(|(_, total)| *total).min().unwrap_or(0);
        let is_little = |of: usize| total * 100 < of * 65;
        self.fleet = match self.fleet {
            Some(of) if is_little(of) => Some(of),
            _ => (least >= 20 && is_little(least)).then_some(least),
        };
        self.totals.push((now, total));
    }

    /// Returns `Ok` if `port` of a service may be removed at `now`.
    fn allows(&mut self, at: usize, port: u16, read: &[Instant], now: Instant) -> Result<(), String> {
        let reports = &self.reports[at];
        // Returns since when `holds` has been true of every entry up to the latest.
        let since = |holds: &dyn Fn(&BTreeSet<u16>) -> bool| {
            let last = reports.iter().rposition(|(_, reports)| !holds(reports)).map_or(0, |at| at + 1);
            reports.get(last).and_then(|(since, _)| *since)
        };
        let reads_since = |since: Instant| read.iter().filter(|at| **at >= since).count();
        let Some(unnamed) = since(&|reports| !reports.contains(&port)) else {
            return Err("it is named".into());
        };
        if now < unnamed + Duration::from_secs(10) {
            return Err("it is not named for less than 10 s".into());
        }
        if self.failing {
            return Err("the source does not answer".into());
        }
        if self.fleet.is_some() {
            return Err("too much of all is gone".into());
        }
        if let Some(empty) = since(&|reports| reports.is_empty()) {
            return match now >= empty + Duration::from_secs(30) && reads_since(empty) >= 2 {
                true => Ok(()),
                false => Err("nothing is named of it, and that is not confirmed".into()),
            };
        }
        if let Some((few, _)) = self.few[at]
            && (now < few + Duration::from_secs(60) || reads_since(few) < 2)
        {
            return Err("little is named of it, and that is not confirmed".into());
        }
        Ok(())
    }
}

fn shown(believed: &Registrations, at: usize) -> BTreeSet<u16> {
    let service_view = believed.services.get(SERVICES[at]);
    service_view
        .into_iter()
        .flat_map(|service_view| service_view.registration.endpoints.iter())
        .map(|e| e.address.port())
        .collect()
}

proptest! {
    /// For any history of a source: an addition is served at once, no endpoint is removed earlier than the
    /// rules allow, and once the source has been quiet for a while, the served endpoints are the listed ones.
    #[test]
    fn the_guard_only_ever_delays_and_never_takes_away_what_it_may_not(
        steps in prop::collection::vec((0u64..50, step()), 1..40),
    ) {
        let mut sim = Sim::of(GuardConfig::default());
        let mut model = Model::default();
        let mut now = Instant::now();
        let mut before = Registrations::default();
        let mut reported: [Option<BTreeSet<u16>>; 3] = Default::default();
        for (wait, step) in steps {
            now += Duration::from_secs(wait);
            sim.until(now);
            let mut accepted = None;
            let waited = sim.believed.len();
            check(&mut sim.believed, &sim.read, &mut model, &mut before, None)?;
            prop_assert!(waited < 1000, "it never comes to rest");
            match step {
                Step::Says(says) => {
                    let mut view = Registrations::default();
                    for (name, ports) in SERVICES.iter().zip(&says) {
                        let Some(ports) = ports else { continue };
                        let text: String = ports.iter().map(|port| format!("{port} ")).collect();
                        view.services.insert(name.parse().unwrap(), service_view(name, &text));
                    }
                    sim.observe(view, now);
                    model.says(&says, &before, now);
                    reported = says;
                }
                Step::Fails => {
                    sim.guard.source_failed(now);
                    model.failing = true;
                }
                Step::CanBeReadAgain(can) => sim.unreadable = !can,
                Step::Accept(at) => {
                    let name = SERVICES[at].parse().unwrap();
                    if sim.guard.accept(Some(&name)).is_ok() {
                        accepted = Some(at);
                        model.fleet = None;
                        model.few[at] = None;
                    }
                }
            }
            let believed = sim.judge(now);
            for (at, reported) in reported.iter().enumerate() {
                let reported = reported.clone().unwrap_or_default();
                prop_assert!(shown(&believed, at).is_superset(&reported), "told and not shown");
            }
            check(&mut sim.believed, &sim.read, &mut model, &mut before, accepted)?;
        }
        // The source answers, does not change and is readable again. This ends every hold, except a fleet
        // hold, which only the operator ends.
        sim.unreadable = false;
        let last = sim.reported.clone();
        sim.observe(last, now);
        for _ in 0..100 {
            let Some(deadline) = sim.guard.deadline() else { break };
            // A confirming read may be overdue, if it was useless while the service was held for another
            // reason.
            now = now.max(deadline);
            sim.until(now);
        }
        prop_assert!(sim.guard.deadline().is_none());
        let mut believed = sim.judge(now);
        if sim.guard.held_changes().iter().any(|held| held.kind == HoldKind::Fleet) {
            sim.guard.accept(None).unwrap();
            believed = sim.judge(now);
        }
        prop_assert!(sim.guard.held_changes().is_empty() && sim.guard.missing_endpoints() == 0);
        for (at, reported) in reported.iter().enumerate() {
            prop_assert_eq!(shown(&believed, at), reported.clone().unwrap_or_default());
        }
    }
}

/// Checks that the model allows every removal between consecutive views in `believed`.
fn check(
    believed: &mut Vec<(Instant, Registrations)>,
    read: &[Instant],
    model: &mut Model,
    before: &mut Registrations,
    accepted: Option<usize>,
) -> Result<(), TestCaseError> {
    for (now, believed) in believed.drain(..) {
        for (at, name) in SERVICES.iter().enumerate() {
            let (old, new) = (shown(before, at), shown(&believed, at));
            for port in old.difference(&new).filter(|_| accepted != Some(at)) {
                let allowed = model.allows(at, *port, read, now);
                prop_assert!(allowed.is_ok(), "{port} of {name} went: {}", allowed.unwrap_err());
            }
            if old.difference(&new).next().is_some() && model.few[at].take().is_some() {
                // The smaller number of endpoints is believed from now on.
                model.most[at] = model.reports[at].last().map_or(0, |(_, reports)| reports.len());
            }
        }
        *before = believed;
    }
    Ok(())
}
