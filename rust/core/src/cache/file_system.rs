//! What the file system under a cache can do.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Linux's numbers of file systems whose files other machines may change too (`statfs(2)`, `magic.h`).
///
/// A write-ahead log needs memory that all its users share, which two machines do not. FUSE is absent:
/// most of what is mounted so is local.
const NETWORK_FILE_SYSTEMS: &[(u64, &str)] = &[
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x0bd0_0bd0, "Lustre"),
    (0x00c3_6400, "Ceph"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x7461_636f, "OCFS2"),
    (0x0116_1970, "GFS2"),
    (0x0102_1997, "9P"),
];

/// Refuses a path on a network file system.
pub(super) fn refuse_network(path: &Path) -> Result<()> {
    refuse_kind(path, kind(folder_of(path)))
}

fn refuse_kind(path: &Path, kind: Option<u64>) -> Result<()> {
    match kind.and_then(network_name) {
        Some(file_system) => Err(Error::CacheOnNetwork {
            path: path.to_owned(),
            file_system,
        }),
        None => Ok(()),
    }
}

/// Bytes that an ordinary user can still write beside `path`.
#[cfg(target_os = "linux")]
pub(super) fn free_bytes(path: &Path) -> Option<u64> {
    let status = rustix::fs::statvfs(folder_of(path)).ok()?;
    Some(status.f_bavail.saturating_mul(status.f_frsize))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn free_bytes(_path: &Path) -> Option<u64> {
    None
}

/// Makes the name of a new file in the folder of `path` survive a power cut.
pub(super) fn sync_folder(path: &Path) -> std::io::Result<()> {
    if cfg!(unix) {
        File::open(folder_of(path))?.sync_all()?;
    }
    Ok(())
}

/// The file beside `path` with `suffix` after its name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

fn folder_of(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

#[cfg(target_os = "linux")]
fn kind(folder: &Path) -> Option<u64> {
    let status = rustix::fs::statfs(folder).ok()?;
    // Signed on some platforms and wide on most; the number itself has 32 bits.
    #[expect(clippy::cast_sign_loss, reason = "bits, not a number")]
    let kind = status.f_type as u64;
    Some(kind & 0xffff_ffff)
}

#[cfg(not(target_os = "linux"))]
fn kind(_folder: &Path) -> Option<u64> {
    None
}

fn network_name(kind: u64) -> Option<&'static str> {
    NETWORK_FILE_SYSTEMS
        .iter()
        .find_map(|&(known, name)| (known == kind).then_some(name))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn network_file_systems_are_known_by_number() {
        assert_eq!(network_name(0x6969), Some("NFS"));
        assert_eq!(network_name(0xff53_4d42), Some("CIFS"));
        for local in [0xef53, 0x0102_1994, 0x5846_5342, 0x9123_683e, 0x794c_7630] {
            assert_eq!(network_name(local), None);
        }
    }

    #[test]
    fn a_network_file_system_is_refused_by_name_with_the_way_out() {
        let path = Path::new("/home/me/teacher.cache");
        for &(kind, name) in NETWORK_FILE_SYSTEMS {
            let message = refuse_kind(path, Some(kind)).unwrap_err().to_string();
            let expected = format!(
                "the cache /home/me/teacher.cache is on {name}, where a write-ahead log can lose rows \
                 (keep the cache on a local disk, and share an export of it)"
            );
            assert_eq!(message, expected);
        }
        refuse_kind(path, Some(0xef53)).unwrap();
        refuse_kind(path, None).unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_temporary_folder_is_local_and_has_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        refuse_network(&path).unwrap();
        assert!(free_bytes(&path).unwrap() > 0);
        assert!(kind(folder.path()).unwrap() > 0);
    }

    #[test]
    fn a_bare_name_is_in_the_current_folder() {
        assert_eq!(folder_of(Path::new("cache")), Path::new("."));
        assert_eq!(beside(Path::new("a/b"), "-lock"), Path::new("a/b-lock"));
    }
}
