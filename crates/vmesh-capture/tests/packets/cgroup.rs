//! Control groups for tests.

use std::net::SocketAddr;

use vmesh_capture::host::Cgroup;

use crate::vm::{Vm, printed};

/// A control group like that of a unit in a slice.
pub(crate) struct TestCgroup {
    slice: std::path::PathBuf,
    root: std::path::PathBuf,
}

impl TestCgroup {
    pub(crate) fn new() -> TestCgroup {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let root = std::path::PathBuf::from(root.split(' ').nth(1).unwrap());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let slice = root.join(format!("vmeshtest{}x{number}.slice", std::process::id()));
        std::fs::create_dir_all(slice.join("app.service")).unwrap();
        TestCgroup { slice, root }
    }

    pub(crate) fn id(path: &std::path::Path) -> u64 {
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
    }

    pub(crate) fn slice(&self) -> String {
        self.slice.strip_prefix(&self.root).unwrap().to_str().unwrap().to_owned()
    }

    pub(crate) fn slice_id(&self) -> u64 {
        TestCgroup::id(&self.slice)
    }

    pub(crate) fn cgroup(&self) -> Cgroup {
        Cgroup {
            path: format!("{}/app.service", self.slice()).parse().unwrap(),
            id: TestCgroup::id(&self.slice.join("app.service")),
        }
    }

    /// Removes and creates the control group, as a restart of the unit does.
    pub(crate) fn make_anew(&self) {
        let path = self.slice.join("app.service");
        std::fs::remove_dir(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
    }

    pub(crate) fn child(&self, name: &str) -> Cgroup {
        let path = self.slice.join(name);
        std::fs::create_dir_all(&path).unwrap();
        Cgroup { path: format!("{}/{name}", self.slice()).parse().unwrap(), id: TestCgroup::id(&path) }
    }

    /// Returns the name of the server that answers a caller in the control group.
    pub(crate) fn call(&self, vm: &Vm, to: SocketAddr) -> String {
        self.call_in("app.service", vm, to)
    }

    pub(crate) fn call_in(&self, name: &str, vm: &Vm, to: SocketAddr) -> String {
        let script = format!(
            "echo $$ >{}/{name}/cgroup.procs && exec 3<>/dev/tcp/{}/{} && read -r who rest <&3 && echo $who; \
             echo $$ >{}/cgroup.procs",
            self.slice.display(),
            to.ip(),
            to.port(),
            self.root.display(),
        );
        printed(vm.a.command("bash").args(["-c", &script])).trim().to_owned()
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        for name in ["app.service", "other.service", "new.service"] {
            _ = std::fs::remove_dir(self.slice.join(name));
        }
        _ = std::fs::remove_dir(&self.slice);
    }
}
