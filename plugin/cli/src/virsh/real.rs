//! The real virsh: where it is, becoming it, and asking it what a domain is called.

use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where it is: moved aside by the Debian package, or where every distribution has it.
const PLACES: [&str; 2] = ["/usr/bin/virsh.libvirt", "/usr/bin/virsh"];
/// The end of the path of this program, which may be linked to where the real one was.
const THIS_PROGRAM: &str = "vmgang/virsh";

/// The exec call itself, which returns only if there is nothing to become.
pub fn become_it(arguments: &[OsString]) -> String {
    let virsh = match find() {
        Ok(virsh) => virsh,
        Err(error) => return error,
    };
    let c_string = |bytes: Vec<u8>| CString::new(bytes).unwrap_or_default();
    let words: Vec<CString> = arguments
        .iter()
        .map(|word| c_string(word.clone().into_vec()))
        .collect();
    // Not by the standard library, which resets signals that the caller may have ignored or blocked.
    let path = c_string(virsh.as_os_str().as_bytes().to_vec());
    let Err(error) = nix::unistd::execv(&path, &words);
    format!("virsh: cannot start {}: {error}", virsh.display())
}

fn find() -> Result<PathBuf, String> {
    find_in(Path::new("/"))
}

fn find_in(root: &Path) -> Result<PathBuf, String> {
    for place in PLACES {
        let path = root.join(place.trim_start_matches('/'));
        // Where it leads to, or this program would become itself for ever.
        match path.canonicalize() {
            Ok(end) if !end.ends_with(THIS_PROGRAM) => return Ok(path),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("virsh: {}: {error}", path.display())),
        }
    }
    Err("virsh: this is only vmgang's front end of virsh, and the real virsh is not installed; its package is libvirt-clients or libvirt-client".into())
}

/// The UUID of what a user calls a domain: a name, an id or a UUID. virsh knows in which order to look.
pub fn uuid_of(domain: &str) -> anyhow::Result<String> {
    let output = Command::new(find().map_err(anyhow::Error::msg)?)
        .args(["-r", "-q", "-c", "qemu:///system", "domuuid", "--", domain])
        .output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::bail!("{}", said.trim().trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_real_one_is_never_this_program() -> io::Result<()> {
        let root = tempfile::tempdir()?;
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("usr/bin"))?;
        fs::create_dir_all(at("usr/libexec/vmgang"))?;
        fs::write(at("usr/libexec/vmgang/virsh"), "")?;
        let error = find_in(root.path()).expect_err("nothing is there");
        assert!(error.contains("libvirt-clients"), "{error}");

        fs::write(at("usr/bin/virsh"), "")?;
        assert_eq!(find_in(root.path()), Ok(at("usr/bin/virsh")));

        // As the Debian package has it.
        fs::rename(at("usr/bin/virsh"), at("usr/bin/virsh.libvirt"))?;
        symlink("../libexec/vmgang/virsh", at("usr/bin/virsh"))?;
        assert_eq!(find_in(root.path()), Ok(at("usr/bin/virsh.libvirt")));
        fs::remove_file(at("usr/bin/virsh.libvirt"))?;
        assert!(find_in(root.path()).is_err());
        Ok(())
    }
}
