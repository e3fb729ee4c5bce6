//! What an app says when a request should be answered elsewhere (Fly.io: dynamic request routing, `fly-replay`), and the
//! rules that hold for it. [`header`] and [`json`] read the two forms in which it is said; the proxy sends the request.

pub mod header;
pub mod json;

use std::time::Duration;

use crate::prefer::Wishes;
use crate::snapshot::{App, Snapshot};

/// Replays of one request, as Fly Proxy documents them.
pub const REPLAYS_MAX: u32 = 10;
const REGIONS_MAX: usize = 40;
const STATE_BYTES_MAX: usize = 4096;
const TRANSFORMED_MAX: usize = 64;

/// How far a request has come; it ends, whatever apps say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Course {
    replays: u32,
    fell_back: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// it came back to who asked for the replay, who must answer
    FellBack,
    TooMany,
}

impl Course {
    /// A machine asks for a replay.
    pub fn follow(&mut self) -> Result<(), Ended> {
        if self.fell_back {
            return Err(Ended::FellBack);
        }
        if self.replays >= REPLAYS_MAX {
            return Err(Ended::TooMany);
        }
        self.replays += 1;
        Ok(())
    }

    /// A replay came to nothing and goes back, once.
    pub fn fall_back(&mut self) -> bool {
        !std::mem::replace(&mut self.fell_back, true)
    }
}

/// The app's wish, read and found consistent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// codes and aliases, in order of preference; no other will do
    pub regions: Vec<String>,
    pub instance: Option<String>,
    pub prefer_instance: Option<String>,
    pub app: Option<String>,
    /// opaque, told to the next machine
    pub state: Option<String>,
    /// not the machine that said it
    pub elsewhere: bool,
    pub timeout: Option<Duration>,
    pub fallback: Option<Fallback>,
    pub transform: Transform,
    pub cache: Option<Caching>,
}

/// Who gets the request when the replay comes to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// the machine that asked for the replay
    ForceSelf,
    /// the same if it can, else another of its app
    PreferSelf,
}

/// Changes to the request on its way to the next machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transform {
    pub path: Option<String>,
    pub delete_headers: Vec<String>,
    pub set_headers: Vec<(String, String)>,
}

/// What is to be remembered for requests like this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caching {
    Keep(Keep),
    Invalidate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keep {
    /// `[host]/path/*`
    pub pattern: String,
    pub ttl_s: Option<u64>,
    pub allow_bypass: bool,
}

/// A replay that cannot be carried out: PA03, with the field and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

pub(crate) fn invalid(why: impl Into<String>) -> Invalid {
    Invalid(why.into())
}

/// Why a replay may not reach its app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    SourceApp,
    SourceOrg,
    TargetApp,
    Network,
    Org,
}

impl Denied {
    pub fn code(self) -> &'static str {
        match self {
            Denied::SourceApp => "PE01",
            Denied::SourceOrg => "PE02",
            Denied::TargetApp => "PA04",
            Denied::Network | Denied::Org => "PA05",
        }
    }
}

/// One app's requests reach another's machines in the same network of the same org; across networks when the org allows it,
/// across orgs when the target's org names the source's.
pub fn authorise(source: &str, target: &str, view: &Snapshot) -> Result<(), Denied> {
    if source == target {
        return Ok(());
    }
    let source = view.apps.get(source).ok_or(Denied::SourceApp)?;
    let source_org = source.org.as_deref().ok_or(Denied::SourceOrg)?;
    let target: &App = view.apps.get(target).ok_or(Denied::TargetApp)?;
    let target_org = target.org.as_deref().ok_or(Denied::TargetApp)?;
    let allowed = view.orgs.get(target_org);
    if source_org != target_org {
        let listed = allowed.is_some_and(|row| row.replay_from.iter().any(|slug| slug == source_org));
        return if listed { Ok(()) } else { Err(Denied::Org) };
    }
    if source.network == target.network || allowed.is_some_and(|row| row.cross_network) {
        Ok(())
    } else {
        Err(Denied::Network)
    }
}

impl Replay {
    /// Both forms end here.
    pub(crate) fn checked(self) -> Result<Replay, Invalid> {
        let nowhere = self.regions.is_empty()
            && self.instance.is_none()
            && self.prefer_instance.is_none()
            && self.app.is_none()
            && !self.elsewhere;
        if nowhere {
            return Err(invalid(
                "it names no target: set region, instance, prefer_instance, app or elsewhere=true",
            ));
        }
        if self.instance.is_some() && self.prefer_instance.is_some() {
            return Err(invalid("instance and prefer_instance exclude each other: set one"));
        }
        if self.instance.is_some() && self.elsewhere {
            return Err(invalid("instance and elsewhere exclude each other: set one"));
        }
        if self.regions.len() > REGIONS_MAX {
            return Err(invalid(format!("region: at most {REGIONS_MAX}")));
        }
        if let Some(state) = &self.state {
            if state.len() > STATE_BYTES_MAX {
                return Err(invalid(format!("state: at most {STATE_BYTES_MAX} bytes")));
            }
            printable("state", state)?;
        }
        self.transform.check()?;
        Ok(self)
    }

    /// What the machine must be. `from` said it.
    pub fn wishes(&self, from: &str) -> Wishes {
        Wishes {
            prefer_instance: self.prefer_instance.clone(),
            force_instance: self.instance.clone(),
            force_region: self.regions.clone(),
            exclude: self.elsewhere.then(|| from.to_owned()),
            ..Wishes::default()
        }
    }

    /// A remembered replay is the same for every request; none of these would be.
    pub fn uncacheable(&self) -> Option<&'static str> {
        match () {
            () if self.state.is_some() => Some("state"),
            () if self.timeout.is_some() => Some("timeout"),
            () if self.fallback.is_some() => Some("fallback"),
            () if self.transform != Transform::default() => Some("transform"),
            () => None,
        }
    }
}

impl Fallback {
    pub fn wishes(self, issuer: &str) -> Wishes {
        let machine = Some(issuer.to_owned());
        match self {
            Fallback::ForceSelf => Wishes {
                force_instance: machine,
                ..Wishes::default()
            },
            Fallback::PreferSelf => Wishes {
                prefer_instance: machine,
                ..Wishes::default()
            },
        }
    }
}

impl Transform {
    fn check(&self) -> Result<(), Invalid> {
        if self.path.as_ref().is_some_and(|path| !path.starts_with('/')) {
            return Err(invalid("transform.path must begin with /"));
        }
        if self.delete_headers.len().max(self.set_headers.len()) > TRANSFORMED_MAX {
            return Err(invalid(format!("transform: at most {TRANSFORMED_MAX} headers")));
        }
        let named = self
            .delete_headers
            .iter()
            .chain(self.set_headers.iter().map(|(name, _)| name));
        for name in named {
            if ours(name) {
                return Err(invalid(format!(
                    "transform: the header {name:?} is the proxy's own and stays as it is"
                )));
            }
        }
        self.set_headers
            .iter()
            .try_for_each(|(name, value)| printable(&format!("transform.set_headers: {name}"), value))
    }

    /// Where the request goes, with the client's query unless the new path brings one.
    pub fn target(&self, target: &str) -> Option<String> {
        let path = self.path.as_ref()?;
        match target.split_once('?') {
            Some((_, query)) if !path.contains('?') => Some(format!("{path}?{query}")),
            _ => Some(path.clone()),
        }
    }
}

/// Headers by which an app trusts the proxy, and those that frame a message. What clients may say about routing is not among
/// them. Apps that read `_` as `-` would take one for the other.
fn ours(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace('_', "-");
    const FRAMING: [&str; 10] = [
        "connection",
        "content-length",
        "expect",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
    ];
    const TRUSTED: [&str; 4] = ["via", "forwarded", "x-real-ip", "x-request-start"];
    let routing = name.starts_with("fly-prefer-") && name != "fly-preferred-instance-unavailable"
        || name.starts_with("fly-force-")
        || name == "fly-replay-cache-control";
    !routing
        && (name.starts_with("fly-")
            || name.starts_with("x-forwarded-")
            || name.starts_with("pantala-")
            || FRAMING.contains(&name.as_str())
            || TRUSTED.contains(&name.as_str()))
}

fn printable(field: &str, value: &str) -> Result<(), Invalid> {
    let fits = |b: u8| b == b'\t' || (b >= 0x20 && b != 0x7f);
    match value.bytes().all(fits) {
        true => Ok(()),
        false => Err(invalid(format!(
            "{field}: control characters cannot be sent in a header"
        ))),
    }
}

/// `10s`, `800ms`, `1.5s`, `2m`.
pub(crate) fn duration(text: &str) -> Result<Duration, Invalid> {
    let wrong = || invalid(format!("timeout: {text:?} is not of the form 10s or 800ms"));
    let digits = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        _ => return Err(wrong()),
    };
    match seconds {
        s if s > 0.0 && s <= 3600.0 => Ok(Duration::from_secs_f64(s)),
        _ => Err(invalid(format!(
            "timeout: {text:?} must be more than 0 and at most 60m"
        ))),
    }
}

pub(crate) fn fallback(text: &str) -> Result<Fallback, Invalid> {
    match text {
        "force_self" => Ok(Fallback::ForceSelf),
        "prefer_self" => Ok(Fallback::PreferSelf),
        _ => Err(invalid(format!(
            "fallback: {text:?} is neither force_self nor prefer_self"
        ))),
    }
}

/// Codes and aliases in lower case, without the empty ones.
pub(crate) fn regions(list: &str) -> impl Iterator<Item = String> {
    let parts = list.split(',').map(|part| part.trim().to_ascii_lowercase());
    parts.filter(|part| !part.is_empty())
}

// -- what the next machine is told ----------------------------------------------------------------------------------

/// `fly-replay-src`
pub fn source(instance: &str, region: &str, at_us: u128, state: Option<&str>) -> String {
    let state = state.map(|state| format!(";state={state}")).unwrap_or_default();
    format!("instance={instance};region={region};t={at_us}{state}")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Timeout,
    RetriesExhausted,
    NoCandidate,
}

/// `fly-replay-failed`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure<'a> {
    /// the last machine that was tried, else the one that was wanted
    pub instance: &'a str,
    pub app: &'a str,
    pub region: &'a str,
    /// who asked for the replay
    pub source: &'a str,
    pub reason: Reason,
    pub elapsed_ms: u128,
}

impl Failure<'_> {
    pub fn text(&self) -> String {
        let Failure {
            instance,
            app,
            region,
            source,
            reason,
            elapsed_ms,
        } = self;
        let reason = match reason {
            Reason::Timeout => "timeout",
            Reason::RetriesExhausted => "retries_exhausted",
            Reason::NoCandidate => "no_candidate",
        };
        format!(
            "instance={instance};app={app};region={region};replay_source={source};reason={reason};elapsed_ms={elapsed_ms}"
        )
    }
}
