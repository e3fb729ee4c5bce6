//! Roots of a machine's containers, made beside its own: each an overlay of its image with a writable layer on the
//! machine's disk; volumes are made beside them. The runtime binds them below `/.pantala/containers` and lets
//! `furnish` do the rest.

use std::fs::{self, DirBuilder, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::Deserialize;

use super::{Doing, HostError, Result, mounts};

/// Of the machine's root: `domain/containers.py`.
const CONTAINERS: &str = ".pantala/containers";

/// How whatever a machine writes to is mounted.
pub const ON_DISK: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOATIME);

#[derive(Deserialize)]
pub struct ContainerPlan {
    name: String,
    /// Lowest first.
    pub layers: Vec<PathBuf>,
}

/// A directory on the machine's disk, unless it has a `disk` of its own (an ext4 image), is one in memory, or the files
/// of an image.
#[derive(Deserialize)]
pub struct VolumePlan {
    name: String,
    memory_mib: Option<u64>,
    #[serde(default)]
    pub disk: Option<PathBuf>,
    pub layers: Vec<PathBuf>,
}

/// Whose the writable layers of a machine are. One that `is_kept` may hold what an earlier run left, over other layers of
/// an image than these, and has to be whole after a power cut.
#[derive(Clone, Copy)]
pub struct Upper {
    pub owner: u32,
    pub is_kept: bool,
}

/// Below the enclosure (the current directory): `volumes/NAME` and `containers/NAME`.
/// `layers` are the detached mounts of all volumes and then of all containers, `nodes` the devices over the disks of
/// volumes, both in the order of the plans.
pub fn build(
    volumes: &[VolumePlan],
    containers: &[ContainerPlan],
    layers: (&[Vec<OwnedFd>], &[Vec<OwnedFd>]),
    mut nodes: impl Iterator<Item = PathBuf>,
    upper: Upper,
) -> Result<()> {
    let owner = upper.owner;
    for (index, (volume, layers)) in volumes.iter().zip(layers.0).enumerate() {
        let target = format!("volumes/{}", volume.name);
        folder(&target)?;
        if let Some(size_mib) = volume.memory_mib {
            let options = format!("mode=1777,size={size_mib}m,uid={owner},gid={owner}");
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount(
                Some("tmpfs"),
                target.as_str(),
                Some("tmpfs"),
                flags,
                Some(options.as_str()),
            )
            .doing(|| format!("mount the volume {}", volume.name))?;
        } else if volume.layers.is_empty() {
            let base = if volume.disk.is_some() {
                let base = format!("disks/{}", volume.name);
                folder(&base)?;
                let node = nodes
                    .next()
                    .ok_or_else(|| HostError::Runtime(format!("no device for {base}")))?;
                fleeting(&node, &base)?;
                base
            } else {
                format!("disk/volumes/{}", volume.name)
            };
            // Not the disk's own root, in which ext4 has a folder of its own.
            let kept = format!("{base}/files");
            folder(&kept)?;
            chown(&kept, Some(owner), Some(owner)).doing(|| format!("give {kept} to the machine"))?;
            fs::set_permissions(&kept, fs::Permissions::from_mode(0o1777)).doing(|| format!("open {kept} to all"))?;
            copy_mount(Path::new(&kept), Path::new(&target)).doing(|| format!("mount the volume {}", volume.name))?;
        } else {
            // An overlay without a writable layer wants two lower ones.
            folder("lower/none")?;
            let lower = format!("{}:lower/none", attach(layers, &format!("lower/v{index}"))?);
            overlay(&target, &format!("lowerdir={lower},xino=off"), MsFlags::MS_RDONLY)?;
        }
    }
    for (index, (container, layers)) in containers.iter().zip(layers.1).enumerate() {
        let name = &container.name;
        let (target, kept) = (format!("containers/{name}"), format!("disk/containers/{name}"));
        folder(&target)?;
        writable(layers, &target, &kept, &format!("lower/c{index}"), upper)?;
    }
    Ok(())
}

/// Mount an image of which nothing outlives its machine: neither tables to be prepared nor barriers are worth their cost.
pub fn fleeting(node: &Path, target: &str) -> Result<()> {
    let options = Some("noinit_itable,nobarrier,errors=continue");
    mount(Some(node), target, Some("ext4"), ON_DISK, options).doing(|| format!("mount the disk at {target}"))
}

/// Mount `layers` at `target` under a writable layer in `kept`.
pub fn writable(layers: &[OwnedFd], target: &str, kept: &str, at: &str, upper: Upper) -> Result<()> {
    let lower = attach(layers, at)?;
    let (above, work) = (format!("{kept}/upper"), format!("{kept}/work"));
    for path in [&above, &work] {
        folder(path)?;
        let made = fs::metadata(path).doing(|| format!("look at {path}"))?;
        if made.uid() != 0 {
            continue; // whose `/` is, its machine may have said since
        }
        chown(path, Some(upper.owner), Some(upper.owner)).doing(|| format!("give {path} to the machine"))?;
    }
    // What ties a writable layer to the very layers that it was made over is not for one that may meet others.
    let durability = if upper.is_kept {
        "index=off,redirect_dir=nofollow,metacopy=off"
    } else {
        "volatile"
    };
    let options = format!("lowerdir={lower},upperdir={above},workdir={work},{durability},xino=off");
    overlay(target, &options, MsFlags::empty())
}

/// Of a disk that is kept: what belongs to containers that the machine has no more, and to volumes, which begin empty.
pub fn tidy(containers: &[ContainerPlan]) -> Result<()> {
    remove_all("disk/volumes")?;
    let Ok(kept) = fs::read_dir("disk/containers") else {
        return Ok(());
    };
    for entry in kept {
        let entry = entry.doing(|| "read disk/containers".to_owned())?;
        if !containers.iter().any(|one| *one.name == *entry.file_name()) {
            remove_all(entry.path())?;
        }
    }
    Ok(())
}

/// Links are removed, not followed.
fn remove_all(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.doing(|| format!("remove {}", path.display())),
    }
}

fn overlay(target: &str, options: &str, flags: MsFlags) -> Result<()> {
    let flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("overlay"), target, Some("overlay"), flags, Some(options))
        .doing(|| format!("mount the root filesystem at {target}"))
}

/// Attach layers below `at`; their paths as an overlay takes them, highest first.
fn attach(layers: &[OwnedFd], at: &str) -> Result<String> {
    let mut lower = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        let path = format!("{at}/{index}");
        folder(&path)?;
        mounts::attach(layer, Path::new(&path)).doing(|| format!("attach {path}"))?;
        lower.insert(0, path);
    }
    Ok(lower.join(":"))
}

fn folder(path: &str) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.doing(|| format!("create {path}"))
}

fn copy_mount(source: &Path, target: &Path) -> std::io::Result<()> {
    mounts::attach(&mounts::clone(File::open(source)?.as_fd())?, target)
}

/// A way to a descriptor's folder that a mount may take.
fn of(folder: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/.", folder.as_raw_fd()))
}

fn inside(flags: OFlag) -> OpenHow {
    OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(Mode::from_bits_truncate(if flags.contains(OFlag::O_CREAT) {
            0o644
        } else {
            0
        }))
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

/// The folder at `path` of a root, made where it is missing. Links of the image lead where they would lead inside.
fn folder_inside(root: &OwnedFd, path: &Path) -> std::io::Result<OwnedFd> {
    let how = inside(OFlag::O_PATH | OFlag::O_DIRECTORY);
    let mut at = PathBuf::from("/");
    let mut here = openat2(root, "/", how)?;
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        at.push(name);
        here = match openat2(root, &at, how) {
            Err(Errno::ENOENT) => {
                mkdirat(&here, name, Mode::from_bits_truncate(0o755))?;
                openat2(root, &at, how)?
            }
            opened => opened?,
        };
    }
    Ok(here)
}

/// The file at `path` of a root, made where it is missing; a link that leads nowhere is replaced.
fn file_inside(root: &OwnedFd, path: &Path) -> std::io::Result<OwnedFd> {
    let parent = folder_inside(root, path.parent().unwrap_or(Path::new("/")))?;
    let create = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    if openat2(root, path, inside(OFlag::O_PATH)).is_err() && openat2(root, path, inside(create)).is_err() {
        let name = path.file_name().unwrap_or_default();
        unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir)?;
        openat2(root, path, inside(create | OFlag::O_EXCL))?;
    }
    Ok(openat2(root, path, inside(OFlag::O_PATH))?)
}

/// `pantala-init furnish ENCLOSURE PATH... -- CONTAINER [VOLUME=PATH]... [CONTAINER ...]`, called by the runtime in the
/// machine's namespaces before it goes into the machine's root: what the platform has mounted there at each PATH
/// (processes, devices, names) is mounted in the containers' roots too, and then their volumes. Only the owner of those
/// namespaces can, and PID 1 may not mount.
pub fn furnish(arguments: &[String]) -> Result<()> {
    let mut halves = arguments.splitn(2, |word| word == "--");
    let ([enclosure, paths @ ..], Some(words)) = (halves.next().unwrap_or_default(), halves.next()) else {
        return Err(HostError::Runtime(
            "furnish ENCLOSURE PATH... -- CONTAINER...".to_owned(),
        ));
    };
    // The runtime describes the machine there, and fails if nobody reads it.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).doing(|| "read what the runtime says".to_owned())?;
    let enclosure = Path::new(enclosure);
    let root: OwnedFd = File::open(enclosure.join("root"))
        .doing(|| "open the root".to_owned())?
        .into();
    let mut container = None;
    for word in words {
        if let Some((volume, path)) = word.split_once('=') {
            let container = container
                .as_ref()
                .ok_or_else(|| HostError::Runtime(format!("whose is {word}?")))?;
            let source = File::open(enclosure.join("volumes").join(volume)).map(OwnedFd::from);
            let source = source.doing(|| format!("open the volume {volume}"))?;
            furnish_one(&source, container, Path::new(path))
                .doing(|| format!("mount the volume {volume} at {path}"))?;
            continue;
        }
        // What lies in the machine's root is the image's to say: nothing there may lead out of it.
        let at = Path::new(CONTAINERS).join(word);
        let opened = openat2(&root, &at, inside(OFlag::O_PATH | OFlag::O_DIRECTORY)).map_err(std::io::Error::from);
        let container = container.insert(opened.doing(|| format!("open {}", at.display()))?);
        for path in paths {
            let source = openat2(&root, Path::new(path), inside(OFlag::O_PATH))
                .or_else(|_| folder_inside(&root, Path::new(path)).map_err(|_| Errno::ENOENT));
            let source = source.map_err(std::io::Error::from).doing(|| format!("open {path}"))?;
            furnish_one(&source, container, Path::new(path)).doing(|| format!("mount {path} in container {word}"))?;
        }
    }
    Ok(())
}

fn furnish_one(source: &OwnedFd, container: &OwnedFd, path: &Path) -> std::io::Result<()> {
    let tree = mounts::clone_all(source.as_fd())?;
    if SFlag::from_bits_truncate(fstat(source)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR {
        return mounts::attach(&tree, &of(&folder_inside(container, path)?));
    }
    mounts::attach_to(&tree, &file_inside(container, path)?)
}

/// What a plan may not ask for, whoever wrote it: its names become paths.
pub fn check_names(volumes: &[VolumePlan], containers: &[ContainerPlan]) -> Result<()> {
    let names = volumes
        .iter()
        .map(|volume| &volume.name)
        .chain(containers.iter().map(|one| &one.name));
    for name in names {
        if name.is_empty() || name.contains(['/', ':', ',']) || name.starts_with('.') {
            return Err(HostError::Runtime(format!(
                "{name:?} cannot name a container or a volume"
            )));
        }
    }
    Ok(())
}
