//! Unix sockets of the daemons' APIs.

use std::fs::Permissions;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use tokio::net::UnixListener;

/// Listens at `path` for this user and the group of the directory. An existing socket is replaced: the caller must know that no other
/// process serves it.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        // This user can only set a group that it is a member of. Otherwise the group gets no access, and clients report that.
        _ = chown(path, None, Some(std::fs::metadata(dir)?.gid()));
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o660))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_was_left_is_replaced_and_what_is_no_socket_of_ours_is_an_error() {
        let dir = std::env::temp_dir().join(format!("vmesh-sockets-{}", std::process::id()));
        _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("taken/by")).unwrap();
        let path = dir.join("a.sock");
        drop(listen(&path).unwrap());
        let _listener = listen(&path).unwrap();
        tokio::net::UnixStream::connect(&path).await.unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(
            (metadata.mode() & 0o777, metadata.gid()),
            (0o660, std::fs::metadata(&dir).unwrap().gid())
        );
        assert!(listen(&dir.join("taken")).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
