use proptest::prelude::*;

use super::*;

const LIFETIME: Duration = Duration::from_secs(3600);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn trust(name: &str, has_bundle: bool, leaf: Generation) -> NodeTrust {
    NodeTrust {
        node: name.parse().unwrap(),
        is_connected: true,
        has_bundle,
        leaf,
        leaf_expires: now() + LIFETIME,
    }
}

fn stage(rotation: &Rotation, fleet: &[NodeTrust]) -> Rotation {
    match rotation.next(fleet, now()) {
        Ok(Progress::Stage(next)) => next,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_step_waits_for_live_nodes_and_names_them() {
    let distributing = stage(&Rotation::prepare(now()), &[]);
    let mut fleet = vec![trust("web-1", true, Generation::Old), trust("web-2", false, Generation::Old)];
    let blocked = distributing.next(&fleet, now()).unwrap_err();
    assert_eq!(
        blocked.to_string(),
        "these nodes have not acknowledged the bundle with both roots: web-2. Bring them back, wait until their certificates expire, or \
         exempt them with `--exempt NODE`"
    );
    // A node that no control plane reaches is waited for as long as its leaf is valid.
    fleet[1].is_connected = false;
    assert!(distributing.next(&fleet, now() + LIFETIME).is_err());
    assert!(distributing.next(&fleet, now() + LIFETIME + CLOCK_TOLERANCE).is_ok());

    let mut exempting = distributing.clone();
    exempting.exempt("web-2".parse().unwrap());
    let active = stage(&exempting, &fleet);
    assert_eq!((active.stage(), active.issuer()), (Stage::Active, Generation::New));
    let blocked = active.next(&fleet, now()).unwrap_err();
    assert!(
        blocked.to_string().starts_with("these nodes still use certificates of the old authority: web-1.")
    );
    fleet[0].leaf = Generation::New;
    assert_eq!(active.next(&fleet, now()), Ok(Progress::Finished));
}

#[test]
fn a_rotation_is_aborted_before_it_is_active_and_stepped_back_after() {
    let prepared = Rotation::prepare(now());
    let distributing = stage(&prepared, &[]);
    let active = stage(&distributing, &[]);
    assert_eq!(prepared.step_back(LIFETIME, now()), None);
    assert_eq!(distributing.step_back(LIFETIME, now()), None);
    // Leaves of the new authority exist, whatever nodes have reported of them.
    let back = active.step_back(LIFETIME, now()).unwrap();
    assert_eq!((back.stage(), back.issuer()), (Stage::Distributing, Generation::Old));
    let expired = now() + LIFETIME + CLOCK_TOLERANCE;
    assert_eq!(back.step_back(LIFETIME, expired - Duration::from_secs(1)), Some(back.clone()));
    assert_eq!(back.step_back(LIFETIME, expired), None);
}

/// A node of the model: what it has, which the control plane knows from the last time they spoke.
#[derive(Debug, Clone)]
struct ModelNode {
    trusts: BTreeSet<u32>,
    leaf: u32,
    expires: SystemTime,
    is_connected: bool,
}

/// A mesh of the model. Authorities are numbers.
#[derive(Debug)]
struct ModelMesh {
    now: SystemTime,
    /// The number of the current authority; during a rotation, of the old authority. The new authority has the next number.
    authority: u32,
    rotation: Option<Rotation>,
    nodes: Vec<ModelNode>,
}

#[derive(Debug, Clone)]
enum Step {
    Rotate,
    Back,
    /// The control plane is killed, and reads its disk.
    Restart,
    Connect(usize),
    Disconnect(usize),
    /// A connected node takes the bundle.
    TakeBundle(usize),
    /// A connected node renews its leaf.
    Renew(usize),
    Wait(u64),
}

impl ModelMesh {
    fn new(nodes: usize) -> ModelMesh {
        let node =
            ModelNode { trusts: BTreeSet::from([1]), leaf: 1, expires: now() + LIFETIME, is_connected: true };
        ModelMesh { now: now(), authority: 1, rotation: None, nodes: vec![node; nodes] }
    }

    fn bundle(&self) -> BTreeSet<u32> {
        let trusts_new = self.rotation.as_ref().is_some_and(|rotation| rotation.trusts(Generation::New));
        let new = trusts_new.then_some(self.authority + 1);
        std::iter::once(self.authority).chain(new).collect()
    }

    fn issuer(&self) -> u32 {
        let issues_new = self.rotation.as_ref().is_some_and(|rotation| rotation.issuer() == Generation::New);
        self.authority + u32::from(issues_new)
    }

    fn fleet(&self) -> Vec<NodeTrust> {
        let node = |(at, node): (usize, &ModelNode)| NodeTrust {
            node: format!("n{at}").parse().unwrap(),
            is_connected: node.is_connected,
            has_bundle: node.trusts == BTreeSet::from([self.authority, self.authority + 1]),
            leaf: if node.leaf > self.authority { Generation::New } else { Generation::Old },
            leaf_expires: node.expires,
        };
        self.nodes.iter().enumerate().map(node).collect()
    }

    fn step(&mut self, step: &Step) {
        let (bundle, issuer, time) = (self.bundle(), self.issuer(), self.now);
        let is_valid = |node: &ModelNode| node.expires > time;
        match step {
            Step::Rotate => match &self.rotation {
                None => self.rotation = Some(Rotation::prepare(self.now)),
                Some(rotation) => match rotation.next(&self.fleet(), self.now) {
                    Ok(Progress::Stage(next)) => self.rotation = Some(next),
                    Ok(Progress::Finished) => {
                        self.rotation = None;
                        self.authority += 1;
                    }
                    Err(_) => {}
                },
            },
            Step::Back => {
                if let Some(rotation) = &self.rotation {
                    self.rotation = rotation.step_back(LIFETIME, self.now);
                }
            }
            Step::Restart => {
                let disk = serde_json::to_string(&self.rotation).unwrap();
                self.rotation = serde_json::from_str(&disk).unwrap();
            }
            // A node whose leaf has expired joins again, by a token: it gets the bundle and a leaf.
            Step::Connect(at) => {
                let node = &mut self.nodes[*at];
                if !is_valid(node) {
                    (node.trusts, node.leaf, node.expires) = (bundle, issuer, time + LIFETIME);
                }
                node.is_connected = true;
            }
            Step::Disconnect(at) => self.nodes[*at].is_connected = false,
            Step::TakeBundle(at) => {
                let node = &mut self.nodes[*at];
                if node.is_connected {
                    node.trusts = bundle;
                }
            }
            Step::Renew(at) => {
                let node = &mut self.nodes[*at];
                if node.is_connected && is_valid(node) {
                    // The trust bundle goes out before the leaf.
                    (node.trusts, node.leaf, node.expires) = (bundle, issuer, time + LIFETIME);
                }
            }
            Step::Wait(seconds) => {
                self.now += Duration::from_secs(*seconds);
                // A connected node renews in time.
                for at in 0..self.nodes.len() {
                    let node = &mut self.nodes[at];
                    if node.is_connected && node.expires <= self.now + LIFETIME / 3 {
                        (node.trusts, node.leaf, node.expires) =
                            (bundle.clone(), issuer, self.now + LIFETIME);
                    }
                }
            }
        }
    }

    fn check(&self) {
        for (a, caller) in self.nodes.iter().enumerate() {
            for (b, called) in self.nodes.iter().enumerate() {
                if caller.expires > self.now && called.expires > self.now {
                    assert!(caller.trusts.contains(&called.leaf), "n{a} does not trust n{b}: {self:?}");
                }
            }
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0..4_usize;
    prop_oneof![
        4 => Just(Step::Rotate),
        1 => Just(Step::Back),
        1 => Just(Step::Restart),
        1 => node.clone().prop_map(Step::Connect),
        1 => node.clone().prop_map(Step::Disconnect),
        3 => node.clone().prop_map(Step::TakeBundle),
        3 => node.prop_map(Step::Renew),
        1 => (1..5000_u64).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_interleaved_every_two_nodes_with_valid_leaves_trust_each_other(
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut mesh = ModelMesh::new(4);
        for step in &steps {
            mesh.step(step);
            mesh.check();
        }
        // However it began, a rotation comes to its end once all nodes are there.
        for at in 0..4 {
            mesh.step(&Step::Connect(at));
        }
        for _ in 0..4 {
            for at in 0..4 {
                mesh.step(&Step::Renew(at));
            }
            mesh.step(&Step::Rotate);
            mesh.check();
            if mesh.rotation.is_none() {
                return Ok(());
            }
        }
        prop_assert!(false, "the rotation does not end: {mesh:?}");
    }
}
