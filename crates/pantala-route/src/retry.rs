//! Whether a failed attempt may be followed by another. Pure: the caller says what it saw.

/// Candidate attempts for one request, as Fly Proxy documents its retries.
pub const ATTEMPTS_MAX: u32 = 90;
/// Apps that may have begun to act on one request: once more after the first, so that a request which kills what it reaches
/// is not carried through the fleet.
pub const DEATHS_MAX: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// no connection: refused, reset, timed out, unreachable
    Connect,
    /// the request did not leave this proxy
    NotSent,
    /// a kept connection ended before an answer: the machine had closed it
    Stale,
    /// the proxy of the machine's host refused before a byte reached the app
    Turned,
    /// a fresh connection ended before an answer: the app may have acted on the request
    Died,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// nothing was taken from the client yet, or there is nothing to take
    Unread,
    /// what was taken is kept and can be sent again
    Kept,
    /// more was sent than is kept
    Lost,
}

#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    pub fault: Fault,
    /// how many were made, this one included
    pub attempts: u32,
    /// how many ended with [`Fault::Died`], this one included
    pub deaths: u32,
    /// GET, HEAD, OPTIONS, TRACE, PUT, DELETE
    pub idempotent: bool,
    pub body: Body,
    pub response_started: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Again,
    /// with one of Fly Proxy's error codes
    GiveUp(&'static str),
}

pub fn judge(attempt: Attempt) -> Verdict {
    if attempt.response_started {
        return Verdict::GiveUp("PR02");
    }
    if attempt.body == Body::Lost {
        return Verdict::GiveUp("PA01");
    }
    if attempt.attempts >= ATTEMPTS_MAX {
        return Verdict::GiveUp("PR03");
    }
    match attempt.fault {
        Fault::Connect | Fault::NotSent | Fault::Stale | Fault::Turned => Verdict::Again,
        Fault::Died if attempt.idempotent && attempt.deaths < DEATHS_MAX => Verdict::Again,
        Fault::Died => Verdict::GiveUp("PU02"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attempts() -> impl Strategy<Value = Attempt> {
        let faults = prop::sample::select(vec![
            Fault::Connect,
            Fault::NotSent,
            Fault::Stale,
            Fault::Turned,
            Fault::Died,
        ]);
        let bodies = prop::sample::select(vec![Body::Unread, Body::Kept, Body::Lost]);
        (faults, 1u32..200, 0u32..10, any::<bool>(), bodies, any::<bool>()).prop_map(
            |(fault, attempts, deaths, idempotent, body, response_started)| Attempt {
                fault,
                attempts,
                deaths,
                idempotent,
                body,
                response_started,
            },
        )
    }

    proptest! {
        /// Whatever happens to a request's attempts, at most one more reaches an app after the first that did.
        #[test]
        fn at_most_one_try_after_the_first_byte(faults in prop::collection::vec(attempts(), 1..120), idempotent: bool) {
            let (mut deaths, mut tries) = (0, 0);
            for (index, seen) in faults.iter().enumerate() {
                tries += u32::from(seen.fault == Fault::Died && deaths > 0);
                deaths += u32::from(seen.fault == Fault::Died);
                let attempt = Attempt { attempts: index as u32 + 1, deaths, idempotent, response_started: false, ..*seen };
                if judge(attempt) != Verdict::Again {
                    break;
                }
                prop_assert!(index < ATTEMPTS_MAX as usize);
            }
            prop_assert!(tries <= u32::from(idempotent));
        }

        #[test]
        fn no_second_try_after_the_first_byte(attempt in attempts()) {
            if attempt.response_started {
                prop_assert!(judge(attempt) != Verdict::Again);
            }
        }

        #[test]
        fn no_second_try_without_the_body(attempt in attempts()) {
            if attempt.body == Body::Lost {
                prop_assert!(judge(attempt) != Verdict::Again);
            }
        }

        #[test]
        fn every_request_ends(attempt in attempts()) {
            if attempt.attempts >= ATTEMPTS_MAX {
                prop_assert!(judge(attempt) != Verdict::Again);
            }
        }

        #[test]
        fn what_the_app_may_have_acted_on_is_repeated_only_if_harmless(attempt in attempts()) {
            if attempt.fault == Fault::Died && judge(attempt) == Verdict::Again {
                prop_assert!(attempt.idempotent && attempt.deaths < DEATHS_MAX);
            }
        }
    }

    #[test]
    fn refused_is_tried_again() {
        let attempt = Attempt {
            fault: Fault::Connect,
            attempts: 1,
            deaths: 0,
            idempotent: false,
            body: Body::Unread,
            response_started: false,
        };
        assert_eq!(judge(attempt), Verdict::Again);
        assert_eq!(
            judge(Attempt {
                attempts: 90,
                ..attempt
            }),
            Verdict::GiveUp("PR03")
        );
    }
}
