//! `pantala-init sftp`: the file server of one SSH session, as the user that logged in; SFTP version 3 on its input and
//! output. A process of its own, so that the kernel judges what it may touch, and a slow disk holds up nobody else.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions, ReadDir};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use russh_sftp::protocol::{
    Attrs, Data, File as Entry, FileAttributes, Handle, Name, OpenFlags, Packet, Status, StatusCode, Version,
};
use russh_sftp::server::{Handler, StatusReply};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

const HANDLES_MAX: usize = 64;
/// A packet of the usual clients.
const READ_BYTES_MAX: u32 = 64 * 1024;
const NAMES_AT_ONCE: usize = 100;
const RENAME_OVER: &str = "posix-rename@openssh.com";

pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sftp: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        // SAFETY: this process was begun with pipes there (`ssh/program.rs`), and nothing else in it owns them.
        let (input, output) = unsafe { (OwnedFd::from_raw_fd(0), OwnedFd::from_raw_fd(1)) };
        let stream = tokio::io::join(
            pipe::Receiver::from_owned_fd(input)?,
            pipe::Sender::from_owned_fd(output)?,
        );
        let (done, ended) = oneshot::channel();
        russh_sftp::server::run(stream, Files::new(done)).await;
        let _ = ended.await; // its sender goes with the handler, at the end of the input
        Ok(())
    })
}

struct Files {
    open: HashMap<String, Opened>,
    last: u64,
    _done: oneshot::Sender<()>,
}

enum Opened {
    File(File),
    Folder(ReadDir),
}

type Answer<T> = Result<T, StatusReply>;

impl Files {
    fn new(done: oneshot::Sender<()>) -> Self {
        Files {
            open: HashMap::new(),
            last: 0,
            _done: done,
        }
    }

    fn keep(&mut self, id: u32, opened: Opened) -> Answer<Handle> {
        if self.open.len() >= HANDLES_MAX {
            return Err(StatusCode::Failure.with_message(format!("{HANDLES_MAX} files are open already")));
        }
        self.last += 1;
        let handle = self.last.to_string();
        self.open.insert(handle.clone(), opened);
        Ok(Handle { id, handle })
    }

    fn file(&self, handle: &str) -> Answer<&File> {
        match self.open.get(handle) {
            Some(Opened::File(file)) => Ok(file),
            _ => Err(StatusCode::Failure.with_message("there is no such open file")),
        }
    }
}

impl Handler for Files {
    type Error = StatusReply;

    fn unimplemented(&self) -> StatusReply {
        StatusCode::OpUnsupported.into()
    }

    async fn init(&mut self, _: u32, _: HashMap<String, String>) -> Answer<Version> {
        let mut version = Version::new();
        version.extensions.insert(RENAME_OVER.to_owned(), "1".to_owned());
        Ok(version)
    }

    async fn open(&mut self, id: u32, filename: String, flags: OpenFlags, attrs: FileAttributes) -> Answer<Handle> {
        let create = flags.contains(OpenFlags::CREATE);
        let mut options = OpenOptions::new();
        options
            .read(flags.contains(OpenFlags::READ))
            .write(flags.contains(OpenFlags::WRITE) && !flags.contains(OpenFlags::APPEND))
            .append(flags.contains(OpenFlags::APPEND))
            .create(create && !flags.contains(OpenFlags::EXCLUDE))
            .create_new(create && flags.contains(OpenFlags::EXCLUDE))
            .truncate(flags.contains(OpenFlags::TRUNCATE))
            // A pipe without a writer would hold us up for ever.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        if let Some(mode) = attrs.permissions {
            options.mode(mode & 0o7777);
        }
        let file = options.open(filename).map_err(told)?;
        if !file.metadata().map_err(told)?.is_file() {
            return Err(StatusCode::Failure.with_message("it is no plain file"));
        }
        self.keep(id, Opened::File(file))
    }

    async fn close(&mut self, id: u32, handle: String) -> Answer<Status> {
        match self.open.remove(&handle) {
            Some(_) => Ok(fine(id)),
            None => Err(StatusCode::Failure.with_message("there is no such open file")),
        }
    }

    async fn read(&mut self, id: u32, handle: String, offset: u64, len: u32) -> Answer<Data> {
        let mut data = vec![0; len.min(READ_BYTES_MAX) as usize];
        let length = self.file(&handle)?.read_at(&mut data, offset).map_err(told)?;
        if length == 0 && len > 0 {
            return Err(StatusCode::Eof.into());
        }
        data.truncate(length);
        Ok(Data { id, data })
    }

    async fn write(&mut self, id: u32, handle: String, offset: u64, data: Vec<u8>) -> Answer<Status> {
        self.file(&handle)?.write_all_at(&data, offset).map_err(told)?;
        Ok(fine(id))
    }

    async fn lstat(&mut self, id: u32, path: String) -> Answer<Attrs> {
        Ok(attrs(id, &fs::symlink_metadata(path).map_err(told)?))
    }

    async fn stat(&mut self, id: u32, path: String) -> Answer<Attrs> {
        Ok(attrs(id, &fs::metadata(path).map_err(told)?))
    }

    async fn fstat(&mut self, id: u32, handle: String) -> Answer<Attrs> {
        Ok(attrs(id, &self.file(&handle)?.metadata().map_err(told)?))
    }

    async fn setstat(&mut self, id: u32, path: String, wanted: FileAttributes) -> Answer<Status> {
        let path = Path::new(&path);
        if let Some(size) = wanted.size {
            let file = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .map_err(told)?;
            file.set_len(size).map_err(told)?;
        }
        if let Some(mode) = wanted.permissions {
            fs::set_permissions(path, Permissions::from_mode(mode & 0o7777)).map_err(told)?;
        }
        if wanted.uid.is_some() || wanted.gid.is_some() {
            chown(path, wanted.uid, wanted.gid).map_err(told)?;
        }
        if wanted.mtime.is_some() || wanted.atime.is_some() {
            let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
            options.and_then(|file| file.set_times(times(&wanted))).map_err(told)?;
        }
        Ok(fine(id))
    }

    async fn fsetstat(&mut self, id: u32, handle: String, wanted: FileAttributes) -> Answer<Status> {
        let file = self.file(&handle)?;
        if let Some(size) = wanted.size {
            file.set_len(size).map_err(told)?;
        }
        if let Some(mode) = wanted.permissions {
            file.set_permissions(Permissions::from_mode(mode & 0o7777))
                .map_err(told)?;
        }
        if wanted.uid.is_some() || wanted.gid.is_some() {
            std::os::unix::fs::fchown(file, wanted.uid, wanted.gid).map_err(told)?;
        }
        if wanted.mtime.is_some() || wanted.atime.is_some() {
            file.set_times(times(&wanted)).map_err(told)?;
        }
        Ok(fine(id))
    }

    async fn opendir(&mut self, id: u32, path: String) -> Answer<Handle> {
        let entries = fs::read_dir(path).map_err(told)?;
        self.keep(id, Opened::Folder(entries))
    }

    async fn readdir(&mut self, id: u32, handle: String) -> Answer<Name> {
        let Some(Opened::Folder(entries)) = self.open.get_mut(&handle) else {
            return Err(StatusCode::Failure.with_message("there is no such open folder"));
        };
        let mut files = Vec::new();
        for entry in entries.by_ref().take(NAMES_AT_ONCE) {
            let entry = entry.map_err(told)?;
            // One that went away meanwhile is left out.
            if let Ok(metadata) = entry.metadata() {
                files.push(Entry::new(shown(entry.file_name()), attributes(&metadata)));
            }
        }
        if files.is_empty() {
            return Err(StatusCode::Eof.into());
        }
        Ok(Name { id, files })
    }

    async fn remove(&mut self, id: u32, filename: String) -> Answer<Status> {
        fs::remove_file(filename).map_err(told)?;
        Ok(fine(id))
    }

    async fn mkdir(&mut self, id: u32, path: String, wanted: FileAttributes) -> Answer<Status> {
        fs::create_dir(&path).map_err(told)?;
        if let Some(mode) = wanted.permissions {
            fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777)).map_err(told)?;
        }
        Ok(fine(id))
    }

    async fn rmdir(&mut self, id: u32, path: String) -> Answer<Status> {
        fs::remove_dir(path).map_err(told)?;
        Ok(fine(id))
    }

    /// Of what is not there yet, as far as it is there.
    async fn realpath(&mut self, id: u32, path: String) -> Answer<Name> {
        let path = std::path::absolute(if path.is_empty() { "." } else { &path }).map_err(told)?;
        let found = fs::canonicalize(&path).or_else(|error| match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => Ok(fs::canonicalize(parent)?.join(name)),
            _ => Err(error),
        });
        let files = vec![Entry::dummy(shown(found.map_err(told)?.into()))];
        Ok(Name { id, files })
    }

    async fn rename(&mut self, id: u32, oldpath: String, newpath: String) -> Answer<Status> {
        // Version 3 says that nothing is overwritten; the extension below does.
        if fs::symlink_metadata(&newpath).is_ok() {
            return Err(StatusCode::Failure.with_message("the new name is taken"));
        }
        fs::rename(oldpath, newpath).map_err(told)?;
        Ok(fine(id))
    }

    async fn readlink(&mut self, id: u32, path: String) -> Answer<Name> {
        let target = fs::read_link(path).map_err(told)?;
        Ok(Name {
            id,
            files: vec![Entry::dummy(shown(target.into()))],
        })
    }

    /// Clients follow OpenSSH, which has the two paths the other way round than the draft: the target comes first.
    async fn symlink(&mut self, id: u32, first: String, second: String) -> Answer<Status> {
        symlink(first, second).map_err(told)?;
        Ok(fine(id))
    }

    async fn extended(&mut self, id: u32, request: String, data: Vec<u8>) -> Answer<Packet> {
        if request != RENAME_OVER {
            return Err(StatusCode::OpUnsupported.into());
        }
        let mut rest = data.as_slice();
        let (Some(from), Some(to)) = (text(&mut rest), text(&mut rest)) else {
            return Err(StatusCode::BadMessage.into());
        };
        fs::rename(from, to).map_err(told)?;
        Ok(Packet::Status(fine(id)))
    }
}

/// A string of the protocol: its length, then its bytes.
fn text(rest: &mut &[u8]) -> Option<String> {
    let (length, tail) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (text, tail) = tail.split_at_checked(length)?;
    *rest = tail;
    String::from_utf8(text.to_vec()).ok()
}

fn shown(name: OsString) -> String {
    name.to_string_lossy().into_owned()
}

fn fine(id: u32) -> Status {
    Status {
        id,
        status_code: StatusCode::Ok,
        error_message: "Ok".to_owned(),
        language_tag: "en-US".to_owned(),
    }
}

fn told(error: io::Error) -> StatusReply {
    let code = match error.kind() {
        io::ErrorKind::NotFound => StatusCode::NoSuchFile,
        io::ErrorKind::PermissionDenied => StatusCode::PermissionDenied,
        _ => StatusCode::Failure,
    };
    code.with_message(error.to_string())
}

fn attrs(id: u32, metadata: &Metadata) -> Attrs {
    Attrs {
        id,
        attrs: attributes(metadata),
    }
}

/// Times are of 32 bits here.
fn attributes(metadata: &Metadata) -> FileAttributes {
    FileAttributes {
        size: Some(metadata.len()),
        uid: Some(metadata.uid()),
        gid: Some(metadata.gid()),
        permissions: Some(metadata.mode()),
        atime: Some(u32::try_from(metadata.atime()).unwrap_or(0)),
        mtime: Some(u32::try_from(metadata.mtime()).unwrap_or(0)),
        ..FileAttributes::empty()
    }
}

fn times(wanted: &FileAttributes) -> fs::FileTimes {
    let at = |seconds: u32| UNIX_EPOCH + Duration::from_secs(seconds.into());
    let mut times = fs::FileTimes::new();
    if let Some(seconds) = wanted.atime {
        times = times.set_accessed(at(seconds));
    }
    if let Some(seconds) = wanted.mtime {
        times = times.set_modified(at(seconds));
    }
    times
}
