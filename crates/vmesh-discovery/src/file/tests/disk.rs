//! Scans of the disk, without a task.

use super::*;

/// Scans the disk as if all files had been closed long ago.
pub(super) fn scan(disk: &mut Disk, whole: &[PathBuf], verify: bool) -> Scan {
    let look = ScanRequest { whole: whole.iter().cloned().collect(), ..ScanRequest::default() };
    disk.scan(&look, verify).unwrap()
}

fn age(path: &Path) {
    let long_ago = SystemTime::now() - Duration::from_secs(60);
    fs::File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
}

fn age_all(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match fs::symlink_metadata(&path).unwrap().file_type() {
            kind if kind.is_dir() => age_all(&path),
            kind if kind.is_file() => age(&path),
            _ => {}
        }
    }
}

#[test]
fn of_a_thousand_files_the_one_that_changed_is_parsed() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let text = |service: usize, first: usize| {
        let endpoints = (first..first + 10).map(|i| {
            format!("  - {{address: \"10.{}.{}.{i}:80\", zone: a}}\n", service / 250, service % 250)
        });
        format!("service: s{service}\nprotocol: http\nendpoints:\n{}", endpoints.collect::<String>())
    };
    for service in 0..1000 {
        let path = dir.join(format!("s{service}.yaml"));
        fs::write(&path, text(service, 1)).unwrap();
        age(&path);
    }
    let mut disk = Disk::new(FileConfig { watch: false, ..FileConfig::of(&*dir) }, Arc::default(), None);
    let first = scan(&mut disk, &[], true);
    assert_eq!((first.parsed, first.statement.services.len()), (1000, 1000));
    let same = scan(&mut disk, &[], true);
    assert_eq!(same.parsed, 0);
    let path = dir.join("s500.yaml");
    fs::write(&path, text(500, 2)).unwrap();
    let changed = scan(&mut disk, &[path], false);
    assert_eq!(changed.parsed, 1);
    for (name, reported) in &changed.statement.services {
        let (ServiceContent::Parsed(before), ServiceContent::Parsed(now)) =
            (&first.statement.services[name].content, &reported.content)
        else {
            panic!()
        };
        assert_eq!(Arc::ptr_eq(before, now), name.as_str() != "s500", "{name}");
    }
}

#[test]
fn only_the_files_are_looked_at_of_which_the_kernel_told() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        write(&dir, &[(name, text)]);
        age(&dir.join(name));
    };
    (0..100).for_each(|service| file(&format!("s{service}"), "10.0.0.1 80\n"));
    let mut disk = Disk::new(config(&dir), Arc::default(), None);
    assert_eq!(scan(&mut disk, &[], false).statement.services.len(), 100);
    file("s7", "10.0.0.2 80\n");
    // The kernel does not report this change.
    file("s8", "10.0.0.2 80\n");
    let names = |scan: &Scan| -> Vec<String> {
        scan.only.iter().flatten().map(|name| name.as_str().to_owned()).collect()
    };
    let one = scan(&mut disk, &[dir.join("s7")], false);
    assert_eq!((one.read, names(&one), one.statement.services.len()), (1, vec!["s7".to_owned()], 1));
    // Writing the same content again is no change.
    assert_eq!(names(&scan(&mut disk, &[dir.join("s7")], false)), [""; 0]);
    file("new", "10.0.0.1 80\n");
    file("ignored.tmp", "10.0.0.1 80\n");
    let new = scan(&mut disk, &[dir.join("new"), dir.join("ignored.tmp")], false);
    assert_eq!((names(&new), new.statement.services.len()), (vec!["new".to_owned()], 1));
    // A removed file is looked at again, since it may be being replaced.
    fs::remove_file(dir.join("new")).unwrap();
    assert!(scan(&mut disk, &[dir.join("new")], false).again.is_some());
    let until = std::time::Instant::now() + BOUND;
    let gone = loop {
        let gone = scan(&mut disk, &[], false);
        if gone.again.is_none() {
            break gone;
        }
        assert!(std::time::Instant::now() < until);
    };
    assert_eq!((names(&gone), gone.statement.services.len()), (vec!["new".to_owned()], 0));
    // A directory, lost events and the poll timer each lead to a scan of everything.
    fs::create_dir(dir.join("team")).unwrap();
    for (whole, everything, verify) in
        [(vec![dir.join("team")], false, false), (vec![], true, false), (vec![], false, true)]
    {
        let look = ScanRequest { whole: whole.into_iter().collect(), everything, ..ScanRequest::default() };
        let all = disk.scan(&look, verify).unwrap();
        assert_eq!((&all.only, all.statement.services.len()), (&None, 100));
        let ServiceContent::Parsed(service) = &all.statement.services["s8"].content else { panic!() };
        assert_eq!(service.endpoints[0].address.to_string(), "10.0.0.2:80");
    }
}

/// A change of the files.
#[derive(Debug, Clone, Copy)]
enum FileChange {
    Write {
        file: usize,
        text: usize,
    },
    Replace {
        file: usize,
        text: usize,
    },
    Remove {
        file: usize,
    },
    Rename {
        from: usize,
        to: usize,
    },
    RemoveDirectory,
    MoveDirectory,
    /// Replaces the linked directory or the linked file.
    Swap {
        link: usize,
        to: usize,
    },
    /// Writes into a possible target of a link.
    WriteBehind {
        link: usize,
        to: usize,
        text: usize,
    },
}

/// Files in the directory, below it, with the same service name, of an ignored extension, and of a skipped
/// kind.
const FILES: [&str; 9] = ["a", "b.yaml", "b.json", "x/a", "x/b.yaml", "x.a", "readme.txt", "c.tmp", "x/y/a"];

/// The contents are of one format and valid, so that earlier contents make no difference.
const TEXTS: [&str; 4] = [
    "endpoints: [10.0.0.1:80]\n",
    "endpoints: [10.0.0.2:80]\n",
    "service: named\nendpoints: [10.0.0.3:80]\n",
    "[]\n",
];

impl FileChange {
    fn make(self, dir: &Path) {
        let path = |file: usize| dir.join("d").join(FILES[file]);
        // Errors of the file system are ignored, for example if the path is a directory.
        match self {
            FileChange::Write { file, text } => {
                _ = fs::create_dir_all(path(file).parent().unwrap());
                _ = fs::write(path(file), TEXTS[text]);
            }
            FileChange::Replace { file, text } => {
                _ = fs::create_dir_all(path(file).parent().unwrap());
                let temporary = path(file).with_file_name(".tmp");
                fs::write(&temporary, TEXTS[text]).unwrap();
                _ = fs::rename(&temporary, path(file));
            }
            FileChange::Remove { file } => _ = fs::remove_file(path(file)),
            FileChange::Rename { from, to } => _ = fs::rename(path(from), path(to)),
            FileChange::RemoveDirectory => _ = fs::remove_dir_all(dir.join("d/x")),
            FileChange::MoveDirectory => {
                _ = fs::rename(dir.join("d/x"), dir.join("d/z"));
            }
            FileChange::Swap { link, to } => {
                let (name, target) = [("team", "dirs"), ("linked", "files")][link];
                _ = fs::remove_file(dir.join("next"));
                symlink(dir.join(target).join(to.to_string()), dir.join("next")).unwrap();
                fs::rename(dir.join("next"), dir.join("d").join(name)).unwrap();
            }
            FileChange::WriteBehind { link, to, text } => {
                let behind = [format!("dirs/{to}/w"), format!("files/{to}")];
                fs::write(dir.join(&behind[link]), TEXTS[text]).unwrap();
            }
        }
    }
}

fn any_change() -> impl Strategy<Value = FileChange> {
    let (file, text, to, link) = (0..FILES.len(), 0..TEXTS.len(), 0..2usize, 0..2usize);
    prop_oneof![
        3 => (file.clone(), text.clone()).prop_map(|(file, text)| FileChange::Write { file, text }),
        3 => (file.clone(), text.clone()).prop_map(|(file, text)| FileChange::Replace { file, text }),
        2 => file.clone().prop_map(|file| FileChange::Remove { file }),
        2 => (file.clone(), file).prop_map(|(from, to)| FileChange::Rename { from, to }),
        1 => Just(FileChange::RemoveDirectory),
        1 => Just(FileChange::MoveDirectory),
        2 => (link.clone(), to.clone()).prop_map(|(link, to)| FileChange::Swap { link, to }),
        2 => (link, to, text).prop_map(|(link, to, text)| FileChange::WriteBehind { link, to, text }),
    ]
}

/// Returns the statement about each service, and the subjects that have problems.
fn summary(statement: &Statement) -> (Vec<String>, BTreeSet<String>) {
    let service =
        |(name, reported): (&ServiceName, &crate::assemble::ServiceStatement)| match &reported.content {
            ServiceContent::Parsed(service) => {
                let addresses: Vec<_> = service.endpoints.iter().map(|e| e.address.to_string()).collect();
                format!(
                    "{name} {addresses:?} of {} stale {}",
                    service.place.file,
                    reported.stale_because.is_some()
                )
            }
            ServiceContent::Restored(_) => format!("{name} restored"),
        };
    let problems = statement.problems.iter().map(|p| format!("{} {}", p.place.file, p.subject));
    (statement.services.iter().map(service).collect(), problems.collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// With real events of the kernel: incremental scans of the reported files give the same result as a
    /// final scan of everything.
    #[test]
    fn looks_at_what_the_kernel_told_of_find_what_there_is(
        steps in proptest::collection::vec(proptest::collection::vec(any_change(), 1..4), 1..8),
    ) {
        let dir = vmesh_testkit::tempdir().unwrap();
        let dir = fs::canonicalize(&dir).unwrap();
        write(&dir, &[("dirs/0/w", TEXTS[0]), ("dirs/1/w", TEXTS[1]), ("files/0", TEXTS[0])]);
        write(&dir, &[("files/1", TEXTS[1]), ("d/last", TEXTS[0]), ("d/a", TEXTS[0]), ("d/x/a", TEXTS[1])]);
        [0, 1].into_iter().for_each(|link| FileChange::Swap { link, to: 0 }.make(&dir));
        let hints = Arc::new(Hints::below(&dir.join("d")));
        let mut disk = Disk::new(config(&dir.join("d")), hints.clone(), None);
        let last = dir.join("d/last");
        // Events arrive in order: once the event of the last file is there, all are.
        let heard = || {
            fs::write(&last, TEXTS[0]).unwrap();
            let until = std::time::Instant::now() + BOUND;
            let mut all = ScanRequest::default();
            while !all.whole.contains(&last) {
                assert!(std::time::Instant::now() < until, "no event comes");
                let look = hints.take(std::time::Instant::now());
                all.whole.extend(look.whole);
                all.busy = look.busy;
                all.everything |= look.everything;
            }
            all
        };
        let mut statement = Statement::default();
        let mut take = |scan: Scan| match scan.only {
            Some(only) => statement.replace(only, scan.statement),
            None => statement = scan.statement,
        };
        take(disk.scan(&ScanRequest::default(), true).unwrap());
        for changes in steps {
            changes.into_iter().for_each(|change| change.make(&dir));
            take(disk.scan(&heard(), false).unwrap());
        }
        let until = std::time::Instant::now() + BOUND;
        loop {
            let scan = disk.scan(&heard(), false).unwrap();
            let is_settled = scan.again.is_none();
            take(scan);
            if is_settled {
                break;
            }
            assert!(std::time::Instant::now() < until);
        }
        // A disk state that has read nothing and only knows which file counts for each service.
        age_all(&dir);
        let all = disk.fresh_copy().scan(&ScanRequest::default(), true).unwrap();
        prop_assert_eq!(all.again, None);
        let all = all.statement;
        prop_assert_eq!(summary(&statement), summary(&all));
    }
}

#[test]
fn a_directory_that_cannot_be_read_keeps_all_that_is_below_it() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("team/orders", "10.0.0.1 80\n"), ("web", "10.0.1.1 80\n")]);
    age(&dir.join("team/orders"));
    age(&dir.join("web"));
    let mut disk = Disk::new(config(&dir), Arc::default(), None);
    let first = scan(&mut disk, &[], true);
    assert_eq!(first.statement.services.len(), 2);
    // Permissions do not restrict root, so the directory is moved away instead, which has the same effect on
    // the code under test.
    fs::rename(dir.join("team"), dir.join(".team")).unwrap();
    disk.keep_unreadable(&[(dir.join("team"), "permission denied".to_owned())]);
    let mut kept = Scan::default();
    disk.forget_missing(
        &BTreeSet::from([dir.join("web")]),
        &[(dir.join("team"), String::new())],
        std::time::Instant::now(),
        &mut kept,
    );
    disk.merge(&mut kept);
    assert_eq!(kept.statement.services.len(), 2);
    assert!(
        kept.statement.services["team.orders"]
            .stale_because
            .as_ref()
            .unwrap()
            .ends_with("team: permission denied")
    );
    // The directory is read again once it is readable.
    fs::rename(dir.join(".team"), dir.join("team")).unwrap();
    let again = disk.scan(&ScanRequest { everything: true, ..ScanRequest::default() }, false).unwrap();
    assert!(again.statement.services["team.orders"].stale_because.is_none());
}

#[test]
fn a_format_that_is_given_is_not_guessed() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("web.example.com", "10.0.0.1 80\n"), ("pay.txt", "10.0.0.2:80\n")]);
    fs::read_dir(&dir).unwrap().for_each(|entry| age(&entry.unwrap().path()));
    let linkerd = FileConfig { format: Format::Linkerd, ..config(&dir) };
    let found = scan(&mut Disk::new(linkerd, Arc::default(), None), &[], true);
    assert_eq!(
        found.statement.services.keys().map(ServiceName::as_str).collect::<Vec<_>>(),
        ["pay.txt", "web.example.com"]
    );
}

#[test]
fn errors_of_the_file_system_are_said_in_plain_words() {
    use rustix::io::Errno;
    let errors = [Errno::ACCESS, Errno::LOOP, Errno::NOENT, Errno::STALE, Errno::IO, Errno::MFILE];
    let summary: String = errors
        .into_iter()
        .map(|errno| format!("{}\n", crate::file::disk::explain_error(&errno.into())))
        .collect();
    expect![[r#"
        permission denied: the control plane's user has to be able to read it
        a symbolic link that leads back to itself
        it does not exist
        its file system is no longer mounted or reachable
        input/output error
        too many open files
    "#]]
    .assert_eq(&summary);
}

#[test]
fn what_a_file_says_that_not_everybody_may_read_is_not_shown_to_everybody() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    const SECRET: &str = "s3cr3t-t0k3n";
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let (dir, elsewhere) = (vmesh_testkit::tempdir().unwrap(), vmesh_testkit::tempdir().unwrap());
    fs::write(elsewhere.join("token"), SECRET).unwrap();
    mode(&elsewhere.join("token"), 0o600);
    // Every user may read this file but cannot reach it.
    fs::create_dir(elsewhere.join("private")).unwrap();
    for (name, text) in [("list", format!("10.0.0.1 {SECRET}")), ("yaml", format!("endpoints: [{SECRET}]"))] {
        fs::write(elsewhere.join("private").join(name), text).unwrap();
        mode(&elsewhere.join("private").join(name), 0o644);
    }
    mode(&elsewhere.join("private"), 0o700);
    symlink(elsewhere.join("token"), dir.join("a.yaml")).unwrap();
    symlink(elsewhere.join("private/list"), dir.join("b")).unwrap();
    symlink(elsewhere.join("private/yaml"), dir.join("c.yaml")).unwrap();
    write(&dir, &[("d.yaml", &format!("service: \"{SECRET} \"\nendpoints: [{SECRET}:x]\n"))]);
    mode(&dir.join("d.yaml"), 0o640);
    write(&dir, &[("open.yaml", "endpoints: [everybody-may-see-this]\n")]);
    mode(&dir.join("open.yaml"), 0o644);
    for quotes in [false, true] {
        let config = FileConfig { quotes_private_files: quotes, ..config(&dir) };
        let mut disk = Disk::new(config, Arc::default(), None);
        let all = ["a.yaml", "b", "c.yaml", "d.yaml", "open.yaml"].map(|file| dir.join(file));
        let scan = scan(&mut disk, &all, true);
        let summary = format!("{:?} {:?}", scan.statement.problems, scan.statement.unusable);
        assert_eq!(summary.contains(SECRET), quotes, "{summary}");
        assert!(summary.contains("everybody-may-see-this"), "{summary}");
        for file in ["a.yaml", "b", "c.yaml", "d.yaml"] {
            let place = dir.join(file).display().to_string();
            assert!(
                scan.statement.problems.iter().any(|problem| *problem.place.file == *place),
                "{file}: {summary}"
            );
        }
    }
}
