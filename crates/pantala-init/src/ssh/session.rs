//! One connection: who it is, and the channels that it opens.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use nix::sys::signal::Signal;
use russh::keys::Certificate;
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, Session};
use russh::{Channel, ChannelId, ChannelOpenFailure, Pty, Sig};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::House;
use super::certificate::Permits;
use super::input::{Input, queue};
use super::program::{self, Asked, Kind, Reply, Running};
use super::terminal::Size;
use crate::guest::command::{CODE_CANNOT_RUN, CannotRun};

const CHANNELS_MAX: usize = 16;
const VARIABLES_MAX: usize = 32;
const VARIABLE_BYTES_MAX: usize = 4096;
/// What a client may set: nothing that changes what a program is.
const VARIABLES: [&str; 5] = ["LANG", "TERM", "COLORTERM", "FLY_SSH_CONTAINER", "FLY_SSH_MACHINE"];
const CONTAINER: &str = "FLY_SSH_CONTAINER";

pub struct Login {
    house: Arc<House>,
    user: String,
    permits: Option<Permits>,
    logged_in: Option<oneshot::Sender<()>>,
    channels: HashMap<ChannelId, Opened>,
}

enum Opened {
    /// Nothing runs yet.
    Waiting {
        channel: Channel<Msg>,
        env: BTreeMap<String, String>,
        terminal: Option<(String, Size)>,
    },
    Running(Running),
    /// A connection to somewhere that the machine reaches; dropping it ends it.
    Forwarded {
        input: Option<Input>,
        present: oneshot::Sender<()>,
    },
}

impl Opened {
    /// Nobody is at its other end any more: we closed it, and are not told that the client agrees.
    fn is_over(&self) -> bool {
        match self {
            Opened::Waiting { .. } => false,
            Opened::Running(running) => running.present.is_closed(),
            Opened::Forwarded { present, .. } => present.is_closed(),
        }
    }
}

impl Login {
    /// With the word that somebody has logged in.
    pub fn new(house: Arc<House>) -> (Self, oneshot::Receiver<()>) {
        let (sender, receiver) = oneshot::channel();
        let login = Login {
            house,
            user: String::new(),
            permits: None,
            logged_in: Some(sender),
            channels: HashMap::new(),
        };
        (login, receiver)
    }

    fn has_room(&mut self) -> bool {
        self.channels.retain(|_, opened| !opened.is_over());
        self.channels.len() < CHANNELS_MAX
    }

    fn run(&mut self, id: ChannelId, kind: Kind, session: &mut Session) -> Result<(), russh::Error> {
        let Some(Opened::Waiting { .. }) = self.channels.get(&id) else {
            return session.channel_failure(id);
        };
        let Some(Opened::Waiting { channel, env, terminal }) = self.channels.remove(&id) else {
            return session.channel_failure(id);
        };
        session.channel_success(id)?;
        let forced = self.permits.as_ref().and_then(|permits| permits.command.clone());
        let container = env.get(CONTAINER).filter(|name| !name.is_empty()).cloned();
        // What comes in, comes to `data`; unread messages of the other half would hold up the connection.
        let (_, writer) = channel.split();
        let reply = Reply {
            handle: session.handle(),
            channel: id,
            writer,
        };
        let place = match container
            .as_ref()
            .map(|name| self.house.containers.get(name).ok_or(name))
        {
            None => None,
            Some(Ok(place)) => Some(place),
            Some(Err(name)) => {
                let error = CannotRun::new(CODE_CANNOT_RUN, format!("this machine has no container {name}"));
                tokio::spawn(program::apologize(error, reply));
                return Ok(());
            }
        };
        let base = place.map_or(&self.house.env, |place| &place.env);
        let asked = Asked {
            kind: forced.map_or(kind, Kind::Command),
            login: &self.user,
            root: place.map(|place| place.root.as_str()),
            env: base.clone().into_iter().chain(env).collect(),
            terminal,
        };
        match program::begin(asked, reply) {
            Ok(running) => drop(self.channels.insert(id, Opened::Running(running))),
            Err((error, reply)) => drop(tokio::spawn(program::apologize(error, reply))),
        }
        Ok(())
    }
}

impl Handler for Login {
    type Error = russh::Error;

    async fn auth_openssh_certificate(&mut self, user: &str, certificate: &Certificate) -> Result<Auth, Self::Error> {
        let now_s = crate::guest::unix_ns() / 1_000_000_000;
        match self.house.policy.check(certificate, user, now_s) {
            Ok(permits) => {
                self.permits = Some(permits);
                user.clone_into(&mut self.user);
                Ok(Auth::Accept)
            }
            Err(_) => Ok(Auth::reject()),
        }
    }

    async fn auth_succeeded(&mut self, _: &mut Session) -> Result<(), Self::Error> {
        if let Some(sender) = self.logged_in.take() {
            let _ = sender.send(());
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        if !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let waiting = Opened::Waiting {
            env: BTreeMap::new(),
            terminal: None,
            channel,
        };
        if let Opened::Waiting { channel, .. } = &waiting {
            let id = channel.id();
            self.channels.insert(id, waiting);
        }
        reply.accept().await;
        Ok(())
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let known = VARIABLES.contains(&name) || name.starts_with("LC_");
        match self.channels.get_mut(&id) {
            Some(Opened::Waiting { env, .. })
                if known && env.len() < VARIABLES_MAX && name.len() + value.len() <= VARIABLE_BYTES_MAX =>
            {
                env.insert(name.to_owned(), value.to_owned());
                session.channel_success(id)
            }
            _ => session.channel_failure(id),
        }
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        term: &str,
        columns: u32,
        rows: u32,
        _: u32,
        _: u32,
        _: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let permitted = self.permits.as_ref().is_some_and(|permits| permits.terminal);
        match self.channels.get_mut(&id) {
            Some(Opened::Waiting { terminal, .. }) if permitted && term.len() <= VARIABLE_BYTES_MAX => {
                *terminal = Some((term.to_owned(), Size { columns, rows }));
                session.channel_success(id)
            }
            _ => session.channel_failure(id),
        }
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        self.run(id, Kind::Shell, session)
    }

    async fn exec_request(&mut self, id: ChannelId, data: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        match std::str::from_utf8(data) {
            Ok(text) if !text.contains('\0') => self.run(id, Kind::Command(text.to_owned()), session),
            _ => session.channel_failure(id),
        }
    }

    async fn subsystem_request(&mut self, id: ChannelId, name: &str, session: &mut Session) -> Result<(), Self::Error> {
        match name {
            "sftp" => self.run(id, Kind::Files, session),
            _ => session.channel_failure(id),
        }
    }

    async fn window_change_request(
        &mut self,
        id: ChannelId,
        columns: u32,
        rows: u32,
        _: u32,
        _: u32,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        if let Some(Opened::Running(Running {
            terminal: Some(terminal),
            ..
        })) = self.channels.get(&id)
        {
            let _ = terminal.resize(Size { columns, rows });
        }
        Ok(())
    }

    async fn signal(&mut self, id: ChannelId, signal: Sig, _: &mut Session) -> Result<(), Self::Error> {
        let name = match &signal {
            Sig::Custom(name) => name.clone(),
            known => format!("{known:?}"),
        };
        if let (Some(Opened::Running(running)), Ok(signal)) =
            (self.channels.get(&id), format!("SIG{name}").parse::<Signal>())
        {
            program::signal_group(running.pid, signal);
        }
        Ok(())
    }

    async fn data(&mut self, id: ChannelId, data: &[u8], _: &mut Session) -> Result<(), Self::Error> {
        let input = match self.channels.get(&id) {
            Some(Opened::Running(Running { input, .. }) | Opened::Forwarded { input, .. }) => input,
            _ => &None,
        };
        match input {
            Some(input) if !input.push(data).await => Err(russh::Error::Disconnect),
            _ => Ok(()),
        }
    }

    async fn channel_eof(&mut self, id: ChannelId, _: &mut Session) -> Result<(), Self::Error> {
        if let Some(Opened::Running(Running { input, .. }) | Opened::Forwarded { input, .. }) =
            self.channels.get_mut(&id)
        {
            *input = None;
        }
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _: &mut Session) -> Result<(), Self::Error> {
        self.channels.remove(&id);
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        let permitted = self
            .permits
            .as_ref()
            .is_some_and(|permits| permits.forwarding && permits.command.is_none());
        // Names would be looked up by the C library, which a static program does not have at hand.
        let address: Option<IpAddr> = if host == "localhost" {
            Some([127, 0, 0, 1].into())
        } else {
            host.parse().ok()
        };
        let (Some(address), Ok(port), true) = (address, u16::try_from(port), permitted) else {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
            return Ok(());
        };
        if !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let (input, source) = queue();
        let (present, mut gone) = oneshot::channel();
        let opened = Opened::Forwarded {
            input: Some(input),
            present,
        };
        self.channels.insert(channel.id(), opened);
        let (_, writer) = channel.split();
        tokio::spawn(async move {
            let Ok(stream) = TcpStream::connect((address, port)).await else {
                reply.reject(ChannelOpenFailure::ConnectFailed).await;
                return;
            };
            reply.accept().await;
            let gauge = source.gauge.clone();
            let (from, to) = stream.into_split();
            let both = async {
                tokio::join!(source.feed(to, b""), async {
                    gauge.say(from, writer.make_writer()).await;
                    let _ = writer.eof().await;
                });
            };
            tokio::select! {
                _ = &mut gone => {}
                () = both => {}
            }
            let _ = writer.close().await;
        });
        Ok(())
    }
}
