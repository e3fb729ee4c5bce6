//! Whether and why a request waited: measured where it waits ([`crate::wait`]), said to its client (`Server-Timing`) and to
//! the app's log. A request that did not wait pays for none of it.

use std::sync::Mutex;
use std::time::Duration;

use hyper::Response;
use hyper::header::{HeaderName, HeaderValue};
use pantala_route::snapshot::Machine;
use pantala_wire::feed::{HTTPOptions, ProxyLog};
use tokio::time::Instant;

use crate::body::OutBody;
use crate::shared::Shared;

const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
/// Lines about waits in one second, of all apps; more are counted only.
const LINES_PER_S_MAX: u32 = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// the machine was stopped
    Cold,
    /// the machine was suspended
    Resume,
    /// every machine was at its hard limit
    Queue,
    /// machines were starting, or their state was changing
    Start,
    /// no machine passed its checks
    Health,
    /// the app refused connections
    Retry,
    /// the hosts of the machines did not answer
    Host,
}

pub const CAUSES: [(Cause, &str, &str); 7] = [
    (Cause::Cold, "cold", "a stopped machine was started"),
    (Cause::Resume, "resume", "a suspended machine was resumed"),
    (Cause::Queue, "queue", "every machine was at its hard limit"),
    (Cause::Start, "start", "the app's machine was about to start"),
    (Cause::Health, "health", "no machine passed its health checks"),
    (Cause::Retry, "retry", "the app did not accept the connection"),
    (Cause::Host, "host", "the host of the machine did not answer"),
];

/// How long a request waited, by cause, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited([u32; CAUSES.len()]);

/// With the names of whom it was about.
#[derive(Clone, Debug)]
pub struct Wait {
    pub waited: Waited,
    pub app: String,
    pub machine: String,
    /// the app's log has it already, with the reason for which the request failed
    pub told: bool,
}

impl Waited {
    pub fn add(&mut self, cause: Cause, since: Instant) {
        self.count(cause, since.elapsed());
    }

    fn count(&mut self, cause: Cause, passed: Duration) {
        let us = u32::try_from(passed.as_micros()).unwrap_or(u32::MAX);
        let sum = &mut self.0[cause as usize];
        *sum = sum.saturating_add(us.max(1));
    }

    /// What another host says of the waits there.
    pub fn merge(&mut self, other: &Waited) {
        self.0
            .iter_mut()
            .zip(other.0)
            .for_each(|(sum, us)| *sum = sum.saturating_add(us));
    }

    pub fn any(&self) -> bool {
        self.0.iter().any(|us| *us > 0)
    }

    /// Of one part of a wait, without what was there `before`.
    pub fn since(&self, before: &Waited) -> Waited {
        let mut waited = *self;
        let sums = waited.0.iter_mut().zip(before.0);
        sums.for_each(|(sum, us)| *sum = sum.saturating_sub(us));
        waited
    }

    pub fn by_word(&self) -> impl Iterator<Item = (&'static str, u32)> {
        let sums = CAUSES.iter().zip(self.0);
        sums.filter(|(_, us)| *us > 0).map(|((_, word, _), us)| (*word, us))
    }

    fn parts(&self) -> impl Iterator<Item = (&'static str, &'static str, f64)> {
        let parts = CAUSES.iter().zip(self.0).filter(|(_, us)| *us > 0);
        parts.map(|((_, word, why), us)| (*word, *why, f64::from(us) / 1000.0))
    }

    /// `cold=812.4,queue=3.1`, in milliseconds: between hosts.
    pub fn written(&self) -> String {
        let one = |(word, _, ms): (&str, &str, f64)| format!("{word}={ms:.3}");
        self.parts().map(one).collect::<Vec<_>>().join(",")
    }

    pub fn read(text: &str) -> Waited {
        let mut waited = Waited::default();
        for (word, ms) in text.split(',').filter_map(|part| part.split_once('=')) {
            let cause = CAUSES.iter().find(|(_, known, _)| *known == word);
            if let (Some((cause, ..)), Ok(ms)) = (cause, ms.parse::<f64>())
                && (0.0..4e6).contains(&ms)
            {
                waited.count(*cause, Duration::from_secs_f64(ms / 1000.0));
            }
        }
        waited
    }

    fn server_timing(&self) -> String {
        let one = |(word, _, ms): (&str, &str, f64)| format!("wait;desc=\"{word}\";dur={ms:.1}");
        self.parts().map(one).collect::<Vec<_>>().join(", ")
    }

    /// `what`: the request, or the connection of a port without HTTP.
    pub fn sentence(&self, what: &str) -> String {
        let one = |(word, why, ms): (&str, &str, f64)| format!("{ms:.0} ms ({word}: {why})");
        let parts: Vec<String> = self.parts().map(one).collect();
        format!("The {what} waited {}.", parts.join(", then "))
    }
}

/// Last words about a request that waited.
pub fn finish(shared: &Shared, response: &mut Response<OutBody>, options: Option<&HTTPOptions>, id: &str) {
    let Some(wait) = response.extensions_mut().remove::<Wait>() else {
        return;
    };
    let pristine = options.and_then(|o| o.response.as_ref()).and_then(|r| r.pristine) == Some(true);
    if !pristine && let Ok(value) = HeaderValue::from_str(&wait.waited.server_timing()) {
        response.headers_mut().append(SERVER_TIMING, value);
    }
    if !wait.told && shared.lines.take() {
        shared.tell_agent(ProxyLog {
            app: wait.app,
            code: String::new(),
            message: wait.waited.sentence("request"),
            machine: wait.machine,
            request_id: id.to_owned(),
        });
    }
}

/// A connection without HTTP has its machine; nothing but the log can say that it waited.
pub fn connected(shared: &Shared, waited: &Waited, machine: &Machine, id: &str) {
    if waited.any() && shared.lines.take() {
        shared.tell_agent(ProxyLog {
            app: machine.app.to_string(),
            code: String::new(),
            message: waited.sentence("connection"),
            machine: machine.id.to_string(),
            request_id: id.to_owned(),
        });
    }
}

/// How many lines this second still has.
#[derive(Default)]
pub struct Lines(Mutex<Option<(std::time::Instant, u32)>>);

impl Lines {
    pub fn take(&self) -> bool {
        let mut second = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &mut *second {
            Some((since, lines)) if since.elapsed() < Duration::from_secs(1) => {
                *lines += 1;
                *lines <= LINES_PER_S_MAX
            }
            other => {
                *other = Some((std::time::Instant::now(), 1));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_stand_where_they_are_counted() {
        for (at, (cause, ..)) in CAUSES.iter().enumerate() {
            assert_eq!(*cause as usize, at);
        }
    }

    #[test]
    fn said_to_clients_other_hosts_and_logs() {
        let mut waited = Waited::default();
        assert!(!waited.any());
        waited.count(Cause::Queue, Duration::from_micros(3_100));
        waited.count(Cause::Cold, Duration::from_millis(812));
        assert_eq!(
            waited.server_timing(),
            "wait;desc=\"cold\";dur=812.0, wait;desc=\"queue\";dur=3.1"
        );
        assert_eq!(
            waited.sentence("request"),
            "The request waited 812 ms (cold: a stopped machine was started), then 3 ms (queue: every machine was at its \
             hard limit)."
        );
        assert_eq!(Waited::read(&waited.written()), waited);
    }

    #[test]
    fn what_another_version_says_is_skipped() {
        assert_eq!(Waited::read("tired=3,cold=x,cold=-1,queue"), Waited::default());
        assert!(Waited::read("tired=3,cold=2").any());
    }

    #[test]
    fn a_flood_of_lines_ends() {
        let lines = Lines::default();
        assert_eq!((0..200).filter(|_| lines.take()).count(), LINES_PER_S_MAX as usize);
    }
}
