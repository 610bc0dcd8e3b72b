use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use vmesh_model::{Endpoint, Health, Labels, Place, Registration, State, Weight};
use vmesh_testkit::place::{TempDir, tempdir};

use super::*;
use crate::persist::Disk;

const SOURCE: &str = "file:/etc/vmesh/services.d";

fn seen(name: &ServiceName, port: u16) -> ServiceView {
    let endpoint = Endpoint {
        address: ([10, 0, 0, 1], port).into(),
        hostname: None,
        weight: Weight::ONE,
        health: Health::Unknown,
        zone: None,
        version: None,
        labels: Labels::new(),
        source: SOURCE.into(),
    };
    ServiceView::fresh(Arc::new(Registration {
        service: name.clone(),
        protocol: None,
        port: None,
        endpoints: [endpoint].into(),
        place: Place::file("services.d"),
    }))
}

fn view(services: impl IntoIterator<Item = (ServiceName, u16)>) -> Arc<Registrations> {
    let services = services.into_iter().map(|(name, port)| (name.clone(), seen(&name, port))).collect();
    Arc::new(Registrations { services, ..Registrations::default() })
}

fn names(count: usize) -> Vec<ServiceName> {
    (0..count).map(|number| format!("service-{number}").parse().unwrap()).collect()
}

fn open(dir: &TempDir) -> Disk {
    Disk::open(&dir.join("state")).unwrap()
}

fn load(disk: &Disk) -> Option<Arc<Registrations>> {
    disk.load_source(SOURCE).unwrap().map(|loaded| loaded.value)
}

fn files(dir: &TempDir) -> BTreeMap<String, u64> {
    let entries = std::fs::read_dir(SourcePaths::of(&dir.join("state"), SOURCE).dir).unwrap();
    let file = |entry: std::fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().ino())
    };
    entries.map(|entry| file(entry.unwrap())).collect()
}

fn single(dir: &TempDir) -> PathBuf {
    SourcePaths::of(&dir.join("state"), SOURCE).single
}

#[test]
fn a_changed_service_writes_one_file_also_after_a_restart() {
    let dir = tempdir().unwrap();
    let names = names(1_000);
    let mut ports: BTreeMap<ServiceName, u16> = names.iter().map(|name| (name.clone(), 80)).collect();
    let disk = open(&dir);
    disk.save_source(SOURCE, &view(ports.clone())).unwrap();
    let first = files(&dir);
    assert!(first.len() > 240, "{first:?}");
    let replaced = |before: &BTreeMap<String, u64>| -> Vec<String> {
        files(&dir).into_iter().filter(|(name, inode)| before.get(name) != Some(inode)).map(|f| f.0).collect()
    };
    // Equal content at another address in memory causes no write.
    disk.save_source(SOURCE, &view(ports.clone())).unwrap();
    assert_eq!(replaced(&first), [""; 0]);
    ports.insert(names[7].clone(), 81);
    disk.save_source(SOURCE, &view(ports.clone())).unwrap();
    let own = file_of(bucket_of(&names[7]));
    assert_eq!(replaced(&first), [own]);

    drop(disk);
    let disk = open(&dir);
    assert_eq!(load(&disk), Some(view(ports.clone())));
    let second = files(&dir);
    ports.insert(names[8].clone(), 81);
    disk.save_source(SOURCE, &view(ports.clone())).unwrap();
    assert_eq!(replaced(&second), [file_of(bucket_of(&names[8]))]);
    // A bucket without services leaves no file.
    disk.save_source(SOURCE, &Arc::default()).unwrap();
    assert_eq!(files(&dir).into_keys().collect::<Vec<_>>(), ["head.json"]);
    assert_eq!(load(&disk), Some(Arc::default()));
}

#[test]
fn all_that_is_known_of_a_service_comes_back() {
    let dir = tempdir().unwrap();
    let name = names(1).remove(0);
    let because = Some("`file` names no endpoint of it".into());
    let held = ServiceView { state: State::Held, because, empty_on_purpose: true, ..seen(&name, 80) };
    let problem = Problem::new(Place::at("a.yaml", 1, 2), "orders", "no such port");
    let problems = vec![problem];
    let known = Registrations { services: [(name, held)].into(), problems, ..Registrations::default() };
    open(&dir).save_source(SOURCE, &Arc::new(known.clone())).unwrap();
    assert_eq!(load(&open(&dir)).as_deref(), Some(&known));
    let solved = Registrations { problems: Vec::new(), ..known };
    let disk = open(&dir);
    load(&disk);
    disk.save_source(SOURCE, &Arc::new(solved.clone())).unwrap();
    assert_eq!(load(&disk).as_deref(), Some(&solved));
}

#[test]
fn a_damaged_file_costs_the_services_in_it_and_is_written_again() {
    let dir = tempdir().unwrap();
    let all = view(names(500).into_iter().map(|name| (name, 80)));
    open(&dir).save_source(SOURCE, &all).unwrap();
    let lost = bucket_of(all.services.keys().next().unwrap());
    let path = SourcePaths::of(&dir.join("state"), SOURCE).dir.join(file_of(lost));
    std::fs::write(&path, "garbage").unwrap();
    let disk = open(&dir);
    let left = load(&disk).unwrap();
    assert!(left.services.len() > 480);
    assert!(all.services.keys().all(|name| left.services.contains_key(name) == (bucket_of(name) != lost)));
    assert!(path.with_extension("damaged").is_file());
    disk.save_source(SOURCE, &left).unwrap();
    disk.save_source(SOURCE, &all).unwrap();
    assert_eq!(load(&open_again(disk, &dir)), Some(all.clone()));

    // The head contains no service, so all services survive its damage.
    std::fs::write(path.with_file_name("head.json"), "garbage").unwrap();
    let disk = open(&dir);
    assert_eq!(load(&disk), Some(all.clone()));
    disk.save_source(SOURCE, &all).unwrap();
    assert!(path.with_file_name("head.json").is_file());
}

fn open_again(disk: Disk, dir: &TempDir) -> Disk {
    drop(disk);
    open(dir)
}

#[test]
fn a_service_in_the_file_of_others_is_left_out() {
    let dir = tempdir().unwrap();
    let names = names(2);
    let disk = open(&dir);
    disk.save_source(SOURCE, &view([(names[0].clone(), 80), (names[1].clone(), 80)])).unwrap();
    let place = |name| SourcePaths::of(&dir.join("state"), SOURCE).dir.join(file_of(bucket_of(name)));
    std::fs::copy(place(&names[0]), place(&names[1])).unwrap();
    assert_eq!(load(&disk), Some(view([(names[0].clone(), 80)])));
}

#[test]
fn large_files_and_no_files_are_not_read() {
    let dir = tempdir().unwrap();
    let names = names(1);
    let disk = open(&dir);
    disk.save_source(SOURCE, &view([(names[0].clone(), 80)])).unwrap();
    let path = SourcePaths::of(&dir.join("state"), SOURCE).dir;
    std::fs::File::create(path.join("00.json")).unwrap().set_len(MAX_BYTES + 1).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, path.join("01.json"), rustix::fs::Mode::RWXU).unwrap();
    assert_eq!(load(&disk), Some(view([(names[0].clone(), 80)])));
}

#[test]
fn what_a_killed_writer_left_beside_a_source_is_swept() {
    let dir = tempdir().unwrap();
    open(&dir).save_source(SOURCE, &Arc::default()).unwrap();
    let left = SourcePaths::of(&dir.join("state"), SOURCE).dir.join(".00.json.1-0.vmesh-tmp");
    std::fs::write(&left, "half").unwrap();
    open(&dir);
    assert!(!left.exists());
}

#[test]
fn a_source_is_kept_in_a_directory_of_its_own_whatever_its_name() {
    for source in ["..", "a/b", "file:/etc/../x", "head.json"] {
        let paths = SourcePaths::of(Path::new("/state"), source);
        assert_eq!(paths.dir.parent(), Some(Path::new("/state/sources")), "{source}");
        assert_eq!(paths.dir.file_name().unwrap().to_str().unwrap(), source_part(source));
    }
}

/// A file written by the previous version from real service files.
const OF_ONE_FILE: &[u8] = include_bytes!("../../../testdata/source-of-one-file.json");

#[test]
fn the_one_file_of_earlier_versions_is_read_and_replaced() {
    let dir = tempdir().unwrap();
    let disk = open(&dir);
    std::fs::write(single(&dir), OF_ONE_FILE).unwrap();
    let before: Registrations = state::decode(OF_ONE_FILE).unwrap();
    assert!(before.services.len() > 3 && !before.problems.is_empty(), "{before:?}");
    let restored = load(&disk).unwrap();
    assert_eq!(*restored, before);
    // The single file stays until the source has answered.
    assert_eq!(load(&open_again(disk, &dir)).as_deref(), Some(&before));
    let disk = open(&dir);
    load(&disk);
    disk.save_source(SOURCE, &restored).unwrap();
    assert!(!single(&dir).exists());
    assert_eq!(load(&open_again(disk, &dir)).as_deref(), Some(&before));
}

#[test]
fn what_an_earlier_version_wrote_in_between_is_newer() {
    let dir = tempdir().unwrap();
    let names = names(2);
    let disk = open(&dir);
    disk.save_source(SOURCE, &view([(names[0].clone(), 80), (names[1].clone(), 80)])).unwrap();
    let between = view([(names[0].clone(), 81)]);
    std::fs::write(single(&dir), state::encode(&between).unwrap()).unwrap();
    let later = SystemTime::now() + std::time::Duration::from_secs(5);
    std::fs::File::options().write(true).open(single(&dir)).unwrap().set_modified(later).unwrap();
    let disk = open_again(disk, &dir);
    assert_eq!(load(&disk), Some(between.clone()));
    disk.save_source(SOURCE, &between).unwrap();
    assert_eq!(load(&open_again(disk, &dir)), Some(between));
    assert!(!single(&dir).exists());
}

/// A step of the property test.
#[derive(Debug, Clone)]
enum Step {
    /// Saves a view with these ports, `None` for an absent service. The write is cut off after `cut` file
    /// names.
    Save {
        ports: Vec<Option<u16>>,
        cut: Option<usize>,
    },
    Restart,
}

const SERVICES: usize = 12;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ports = || proptest::collection::vec(proptest::option::weighted(0.7, 1..4u16), SERVICES);
    // The first save writes or removes 256 bucket files, and then the head.
    let cut = proptest::option::weighted(0.4, prop_oneof![0..8usize, 0..260usize]);
    let save = (ports(), cut).prop_map(|(ports, cut)| Step::Save { ports, cut });
    proptest::collection::vec(prop_oneof![3 => save, 2 => Just(Step::Restart)], 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Some cases begin with a single file of an earlier version.
    #[test]
    fn after_any_crash_each_service_is_as_it_was_or_as_it_was_to_be(
        steps in steps(),
        before in proptest::option::of(proptest::collection::vec(proptest::option::of(1..4u16), SERVICES)),
    ) {
        let dir = tempdir().unwrap();
        // Several services share a file.
        let names: Vec<ServiceName> =
            names(4_000).into_iter().filter(|name| bucket_of(name) < 4).take(SERVICES).collect();
        let of = |ports: &[Option<u16>]| -> BTreeMap<ServiceName, u16> {
            names.iter().cloned().zip(ports).filter_map(|(name, port)| Some((name, (*port)?))).collect()
        };
        let mut disk = open(&dir);
        if let Some(before) = &before {
            std::fs::write(single(&dir), state::encode(&view(of(before))).unwrap()).unwrap();
        }
        // For each service, the entries that may be on disk.
        let first = |at: usize| before.as_ref().and_then(|before| before[at]);
        let mut may_be: Vec<BTreeSet<Option<u16>>> = (0..SERVICES).map(|at| [first(at)].into()).collect();
        for step in steps.into_iter().chain([Step::Restart]) {
            match step {
                Step::Save { ports, cut } => {
                    *disk.sources.cut_off_after.lock().unwrap() = cut;
                    let saved = disk.save_source(SOURCE, &view(of(&ports)));
                    for (may_be, port) in may_be.iter_mut().zip(ports) {
                        if saved.is_ok() {
                            may_be.clear();
                        }
                        may_be.insert(port);
                    }
                }
                Step::Restart => {
                    disk = open_again(disk, &dir);
                    let known = load(&disk).unwrap_or_default();
                    for (name, may_be) in names.iter().zip(&mut may_be) {
                        let seen = known.services.get(name);
                        let port = seen.map(|seen| seen.registration.endpoints[0].address.port());
                        prop_assert!(may_be.contains(&port), "{name} is {port:?} and not one of {may_be:?}");
                        *may_be = [port].into();
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_saved_after_two_saves_at_once_is_what_is_there() {
    let dir = tempdir().unwrap();
    let disk = open(&dir);
    let names = names(40);
    let of_port = |port: u16| view(names.iter().map(|name| (name.clone(), port)));
    disk.save_source(SOURCE, &of_port(1)).unwrap();
    // The first save is in progress while the second begins and ends.
    let mut taken = disk.sources.written().remove(SOURCE).unwrap();
    disk.save_source(SOURCE, &of_port(2)).unwrap();
    let last = view(names.iter().map(|name| (name.clone(), if *name == names[0] { 3 } else { 1 })));
    disk.sources.save_known(&disk.dir, SOURCE, &last, &mut taken).unwrap();
    disk.sources.put_back(SOURCE, taken);
    disk.save_source(SOURCE, &last).unwrap();
    drop(disk);
    assert_eq!(load(&open(&dir)).unwrap(), last);
}
