//! Fly Proxy's error codes: for each what happened and what to do. Pages and lines in an app's log take their words from here;
//! `docs/reference/error-codes.md` shows the same table.

/// Names are those of Fly Proxy's documentation.
#[derive(Debug)]
pub struct Code {
    pub name: &'static str,
    pub meaning: &'static str,
    pub advice: &'static str,
    /// why nothing here ends that way, where it is so
    pub absent: Option<&'static str>,
}

/// Those that are said here.
pub fn find(name: &str) -> Option<&'static Code> {
    CODES.iter().find(|code| code.name == name && code.absent.is_none())
}

const AGAIN: &str = "Try again in a moment. If you run this app: look at its machines and logs.";
const LISTEN: &str =
    "Try again in a moment. If you run this app: it must listen on 0.0.0.0 and its internal_port; look at its logs.";
const HOST: &str = "Try again in a moment. If you run this platform: look at that host and at the network between.";
const REPORT: &str = "Try again. If it stays so, tell whoever runs this platform, with the request id.";
const DEPLOY: &str = "If you run this app: deploy it again.";
const NOT_SET: &str = "Nothing to do.";

const fn code(name: &'static str, meaning: &'static str, advice: &'static str) -> Code {
    Code {
        name,
        meaning,
        advice,
        absent: None,
    }
}

const fn absent(name: &'static str, meaning: &'static str, why: &'static str) -> Code {
    Code {
        name,
        meaning,
        advice: NOT_SET,
        absent: Some(why),
    }
}

pub const CODES: &[Code] = &[
    code(
        "PP01",
        "the options of a connection to the app could not be set",
        REPORT,
    ),
    code(
        "PU01",
        "the app does not speak HTTP/2 on its port",
        "If you run this app: it must speak HTTP/2 without TLS there, or h2_backend must be false.",
    ),
    code("PU02", "the app took the request and did not complete an answer", AGAIN),
    code("PU03", "the host of the machine cannot be reached", HOST),
    code("PU04", "a request could not be written or understood", REPORT),
    code("PC01", "the app refuses connections on its internal port", LISTEN),
    code("PC02", "the machine has no address to connect to yet", AGAIN),
    code("PC03", "the connection to the app was reset", LISTEN),
    code("PC04", "the connection to the app was aborted", LISTEN),
    code("PC05", "the app did not accept a connection in time", LISTEN),
    code("PC06", "the connection to the app failed", LISTEN),
    absent("PC07", "connecting was given up", "the last failure keeps its own code"),
    code(
        "PC08",
        "the keepalive of a connection to the app could not be set",
        REPORT,
    ),
    code(
        "PT01",
        "too many TLS handshakes from this range of addresses",
        "Let clients keep their connections. If you run this platform: proxy.handshakes_per_range_per_s_max is the limit.",
    ),
    code(
        "PT02",
        "too many TLS handshakes for this name",
        "Let clients keep their connections. If you run this platform: proxy.handshakes_per_name_per_s_max is the limit.",
    ),
    code(
        "PT03",
        "the client left during the TLS handshake",
        "Nothing, unless it happens often: then look at what clients reach the port.",
    ),
    code(
        "PT04",
        "the TLS handshake failed",
        "If you run this app: look at alpn and versions in its tls_options, and at what the client offers.",
    ),
    code(
        "PT05",
        "no certificate for this name",
        "If you run this app: add one with `pantala certs add`, or let the client ask for a name that has one.",
    ),
    code(
        "PT06",
        "the client named nobody, or there is no certificate at all",
        "If you run this app: let the client send a name (SNI), or set default_self_signed in tls_options.",
    ),
    code(
        "PT07",
        "the TLS handshake broke off",
        "Nothing, unless it happens often: then look at the network of these clients.",
    ),
    code(
        "PT08",
        "the TLS handshake took too long",
        "The client may be slow, or no TLS client at all.",
    ),
    code("PT09", "the TLS handshake failed inside", REPORT),
    code(
        "PM01",
        "the agent of the machine's host refused to start the machine",
        AGAIN,
    ),
    code("PM02", "starting the machine failed inside the platform", REPORT),
    code(
        "PM03",
        "the machine did not become ready in time",
        "Try again in a moment. If you run this app: see in its logs how long it takes to listen, and what its checks say.",
    ),
    absent(
        "PM04",
        "the answer to a wake could not be read",
        "such an answer is skipped, and the wake ends by PM03",
    ),
    code("PM05", "the machine has no address to connect to", AGAIN),
    absent("PM06", "a wake named no app", "wakes are by machine"),
    code("PM07", "the machine's state could not be changed", AGAIN),
    code(
        "PM08",
        "the machine is in a state from which it cannot be started",
        "If you run this app: start or destroy the machine, or set auto_start_machines.",
    ),
    code(
        "PM09",
        "the machine does not stay up",
        "If you run this app: its logs say why it ends.",
    ),
    absent("PM10", "the start was cancelled", "a wake has no way to be cancelled"),
    code("PM11", "the machine stopped lately, another one may serve", AGAIN),
    code(
        "PA01",
        "the request is larger than what is kept for another try",
        "If you run this app: decide before a large body comes, or have the operator raise proxy.replay_body_bytes_max.",
    ),
    code(
        "PA02",
        "the request was replayed more than 10 times",
        "If you run this app: let one machine answer; a request that was replayed has fly-replay-src.",
    ),
    code(
        "PA03",
        "the replay that the app asked for is not valid",
        "If you run this app: correct its fly-replay answer.",
    ),
    code(
        "PA04",
        "the app of the replay is not known",
        "If you run this app: correct the name in its fly-replay answer, or deploy that app.",
    ),
    code(
        "PA05",
        "the replay to that app is not allowed",
        "If you run this app: have an admin of the other side allow it.",
    ),
    code("PE01", "the app that asked for a replay is not known", DEPLOY),
    code("PE02", "the organisation that asked for a replay is not known", DEPLOY),
    code("PR01", "no healthy machine of the app can be reached", AGAIN),
    code(
        "PR02",
        "the machine went away while it answered",
        "Send the request again. If you run this app: let it finish requests after its stop signal (kill_timeout).",
    ),
    code("PR03", "no machine took the request, after many tries", AGAIN),
    code(
        "PR04",
        "no machine took the request, or all stayed at their limit",
        "Try again in a moment. If you run this app: it needs more machines, or a higher hard_limit.",
    ),
    code(
        "PR05",
        "a static file could not be fetched from its bucket",
        "Try again in a moment. If you run this app: look at tigris_bucket in its statics, and ask who runs this platform.",
    ),
    absent(
        "PL01",
        "a hard limit on connections was bypassed",
        "the machine's own host counts, so limits hold",
    ),
    absent(
        "PL02",
        "a hard limit on requests was bypassed",
        "the machine's own host counts, so limits hold",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn workspace() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
    }

    fn sources(folder: &Path, found: &mut String) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs" || e == "py") && !path.ends_with("codes.rs") {
                found.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }

    #[test]
    fn every_code_of_the_reference_is_here_once() {
        let reference: Vec<String> = [
            ("PP", 1..=1),
            ("PU", 1..=4),
            ("PC", 1..=8),
            ("PT", 1..=9),
            ("PM", 1..=11),
            ("PA", 1..=5),
            ("PE", 1..=2),
            ("PR", 1..=5),
            ("PL", 1..=2),
        ]
        .into_iter()
        .flat_map(|(kind, numbers)| numbers.map(move |n| format!("{kind}{n:02}")))
        .collect();
        assert_eq!(CODES.iter().map(|code| code.name).collect::<Vec<_>>(), reference);
    }

    #[test]
    fn each_is_said_somewhere_or_has_a_reason_not_to_be() {
        let mut text = String::new();
        for part in [
            "crates/pantala-proxy/src",
            "crates/pantala-route/src",
            "src/pantala/agent",
        ] {
            sources(&workspace().join(part), &mut text);
        }
        for code in CODES {
            let said = text.contains(&format!("\"{}\"", code.name));
            assert_eq!(said, code.absent.is_none(), "{} is said: {said}", code.name);
        }
    }

    #[test]
    fn the_page_shows_the_table() {
        let page = fs::read_to_string(workspace().join("docs/reference/error-codes.md")).unwrap();
        for code in CODES {
            let what = code
                .absent
                .map_or(code.advice.to_owned(), |why| format!("Not used: {why}."));
            let line = format!("| {} | {} | {what} |", code.name, code.meaning);
            assert!(
                page.contains(&line),
                "docs/reference/error-codes.md lacks the line\n{line}"
            );
        }
    }
}
