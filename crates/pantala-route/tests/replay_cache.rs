//! Remembered replays: by what they are found, for how long, how many, and how they are forgotten.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use std::sync::Arc;

use pantala_route::replay::Replay;
use pantala_route::replay_cache::{Asked, Pattern, Remembered, ReplayCache, Session, cookie, session};
use pantala_wire::feed;
use proptest::prelude::*;

fn asked(host: &str, path: &str) -> Asked {
    Asked {
        host: host.into(),
        path: path.into(),
        session: None,
    }
}

fn to(app: &str) -> Remembered {
    let replay = Replay {
        app: Some(app.into()),
        ..Replay::default()
    };
    Remembered {
        replay,
        issuer: "m1".into(),
        allow_bypass: false,
    }
}

fn pattern(text: &str) -> Pattern {
    Pattern::parse(text).unwrap()
}

fn found(cache: &ReplayCache, asked: &Asked, now_ms: u64) -> Option<String> {
    cache
        .find("web", asked, now_ms)
        .and_then(|known| known.replay.app.clone())
}

fn keep(cache: &mut ReplayCache, asked: &Asked, text: &str, ttl_s: u64, app: &str) {
    cache.keep_path(&"web".into(), asked, &pattern(text), Some(ttl_s), to(app), 0);
}

#[test]
fn patterns() {
    for (text, host, path, covered) in [
        ("/a/*", "web.test", "/a/b", true),
        ("/a/*", "web.test", "/a", true),
        ("/a/*", "web.test", "/ab", false),
        ("/a", "web.test", "/a/b", true),
        ("/*", "web.test", "/", true),
        ("/", "web.test", "/any/thing", true),
        ("Web.test:443/a/*", "web.test", "/a/b", true),
        ("web.test", "web.test", "/x", true),
        ("other.test/a/*", "web.test", "/a/b", false),
    ] {
        assert_eq!(pattern(text).covers(host, path), covered, "{text} {host}{path}");
    }
    for bad in ["/a*", "/a/*/b", "/a?x=1", "a b/x", &"/a".repeat(100)] {
        assert!(Pattern::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_longest_path_of_the_host_counts_for_its_time() {
    let mut cache = ReplayCache::default();
    let here = asked("web.test", "/a/b/c");
    keep(&mut cache, &here, "/*", 60, "root");
    keep(&mut cache, &here, "/a/b/*", 30, "deep");
    assert_eq!(found(&cache, &here, 29_999).as_deref(), Some("deep"));
    assert_eq!(
        found(&cache, &here, 30_000).as_deref(),
        Some("root"),
        "what has ended does not hide the rest"
    );
    assert_eq!(found(&cache, &here, 60_000), None);
    assert_eq!(found(&cache, &asked("web.test", "/a/bc"), 0).as_deref(), Some("root"));
    assert_eq!(found(&cache, &asked("web.test", "/a/b"), 0).as_deref(), Some("deep"));
    assert_eq!(found(&cache, &asked("other.test", "/a/b/c"), 0), None);
    assert!(cache.find("other", &here, 0).is_none());
}

#[test]
fn ten_seconds_at_least() {
    let mut cache = ReplayCache::default();
    let here = asked("web.test", "/a");
    keep(&mut cache, &here, "/a/*", 1, "other");
    assert!(found(&cache, &here, 9_999).is_some());
    assert!(found(&cache, &here, 10_000).is_none());
}

fn rules() -> Vec<feed::ReplayCache> {
    let rule = |prefix: &str, kind: &str, name: &str| feed::ReplayCache {
        path_prefix: Some(prefix.into()),
        ttl_seconds: Some(60),
        r#type: Some(kind.into()),
        name: Some(name.into()),
        allow_bypass: Some(true),
    };
    vec![
        rule("/", "cookie", "sid"),
        rule("web.test/api", "header", "x-user"),
        rule("/odd", "query", "q"),
    ]
}

fn of(host: &str, path: &str, value: &'static str) -> Option<Session> {
    let read = |name: &str| (name == "sid" || name == "x-user").then_some(value);
    session(&rules(), host, path, read, read)
}

#[test]
fn sessions_by_the_rule_with_the_longest_prefix() {
    let mut cache = ReplayCache::default();
    let with = |path: &str, value| Asked {
        session: of("web.test", path, value),
        ..asked("web.test", path)
    };
    let web: Arc<str> = "web".into();
    for (path, value, app) in [("/", "one", "a"), ("/", "two", "b"), ("/api/x", "one", "c")] {
        let session = with(path, value).session.unwrap();
        assert!(session.allow_bypass && session.ttl_s == 60);
        cache.keep_session(&web, &session, to(app), 0);
    }
    assert_eq!(found(&cache, &with("/anywhere", "one"), 0).as_deref(), Some("a"));
    assert_eq!(found(&cache, &with("/anywhere", "two"), 0).as_deref(), Some("b"));
    assert_eq!(found(&cache, &with("/api", "one"), 0).as_deref(), Some("c"));
    assert_eq!(
        found(&cache, &with("/api", "two"), 0),
        None,
        "another rule, another key"
    );
    assert_eq!(found(&cache, &with("/", "three"), 0), None);
    assert_eq!(found(&cache, &asked("web.test", "/"), 0), None);
    assert!(of("web.test", "/odd", "1").is_none() && of("web.test", "/", "").is_none());
}

#[test]
fn cookies() {
    assert_eq!(cookie("a=1; sid=x=y; b=2", "sid"), Some("x=y"));
    assert_eq!(cookie("sid2=1; asid=2", "sid"), None);
}

#[test]
fn forgotten_by_whom_it_leads_to() {
    let mut cache = ReplayCache::default();
    let here = asked("web.test", "/a");
    keep(&mut cache, &here, "/a/*", 60, "other");
    assert!(!cache.forget("web", &here, |known| known.replay.app.as_deref() == Some("third")));
    assert!(cache.forget("web", &here, |known| known.replay.app.as_deref() == Some("other")));
    assert!(cache.is_empty() && found(&cache, &here, 0).is_none());
}

#[test]
fn memory_is_bounded_and_the_oldest_go_first() {
    let mut cache = ReplayCache::default();
    for index in 0..10_050u32 {
        let path = format!("/{index}");
        keep(&mut cache, &asked("web.test", &path), &path, 60, "other");
        keep(&mut cache, &asked("web.test", "/kept"), "/kept", 60, "other"); // renewed, so it stays the youngest
    }
    assert_eq!(cache.len(), 10_000);
    assert!(found(&cache, &asked("web.test", "/10"), 0).is_none());
    assert!(found(&cache, &asked("web.test", "/10049"), 0).is_some());
    assert!(found(&cache, &asked("web.test", "/kept"), 0).is_some());
    let long = format!("/{}", "x".repeat(4000));
    keep(&mut cache, &asked("web.test", &long), &long, 60, "other");
    assert!(found(&cache, &asked("web.test", &long), 0).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Against the plain reading of the rules: of all living patterns that cover the request the longest.
    #[test]
    fn finds_what_a_list_would(
        kept in prop::collection::vec(("[ab](/[ab]){0,3}", 10u64..30), 0..12),
        path in "(/[ab]){1,5}/?",
        now_s in 0u64..40,
    ) {
        let mut cache = ReplayCache::default();
        let mut list: Vec<(String, u64, String)> = Vec::new();
        for (index, (prefix, ttl_s)) in kept.iter().enumerate() {
            let prefix = format!("/{prefix}");
            let app = format!("app{index}");
            keep(&mut cache, &asked("web.test", &prefix), &format!("{prefix}/*"), *ttl_s, &app);
            list.retain(|(known, _, _)| *known != prefix);
            list.push((prefix, *ttl_s, app));
        }
        prop_assert_eq!(cache.len(), list.len());
        let covering = list.iter().filter(|(prefix, ttl_s, _)| {
            now_s < *ttl_s && (path == *prefix || path.starts_with(&format!("{prefix}/")))
        });
        let wanted = covering.max_by_key(|(prefix, _, _)| prefix.len()).map(|(_, _, app)| app.clone());
        prop_assert_eq!(found(&cache, &asked("web.test", &path), now_s * 1000), wanted);
    }
}
