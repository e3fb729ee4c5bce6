//! What an app may say about a replay, in both forms, and who may say it.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use std::time::Duration;

use pantala_route::prefer::Wishes;
use pantala_route::replay::header::CacheHeaders;
use pantala_route::replay::{
    Caching, Course, Denied, Ended, Failure, Fallback, Keep, REPLAYS_MAX, Reason, Replay, Transform, authorise, header,
    json, source,
};
use pantala_route::snapshot::Snapshot;
use pantala_route::table::Table;
use pantala_wire::feed::FeedRow;
use proptest::prelude::*;
use serde_json::{Value, json};

fn said(text: &str) -> Result<Replay, String> {
    header::read(text, CacheHeaders::default()).map_err(|why| why.to_string())
}

fn as_json(value: Value) -> Result<Replay, String> {
    json::read(value.to_string().as_bytes()).map_err(|why| why.to_string())
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|one| (*one).to_owned()).collect()
}

#[test]
fn every_field_of_the_header() {
    let replay = said(
        r#"region="IAD, ord,us,na";app=other;state="a;b=\"c\"";elsewhere=true;timeout=800ms;fallback=prefer_self"#,
    );
    let wanted = Replay {
        regions: words(&["iad", "ord", "us", "na"]),
        app: Some("other".into()),
        state: Some("a;b=\"c\"".into()),
        elsewhere: true,
        timeout: Some(Duration::from_millis(800)),
        fallback: Some(Fallback::PreferSelf),
        ..Replay::default()
    };
    assert_eq!(replay.unwrap(), wanted);
    let instance = said(" instance = m1 ; timeout = 10s;fallback=force_self; ").unwrap();
    assert_eq!(instance.instance.as_deref(), Some("m1"));
    assert_eq!(
        (instance.timeout, instance.fallback),
        (Some(Duration::from_secs(10)), Some(Fallback::ForceSelf))
    );
    assert_eq!(
        said("prefer_instance=m2").unwrap().prefer_instance.as_deref(),
        Some("m2")
    );
    assert_eq!(said("app=a;state=x=1,y=2").unwrap().state.as_deref(), Some("x=1,y=2"));
    assert_eq!(said("app=a;a-later-field=1").unwrap().app.as_deref(), Some("a"));
}

#[test]
fn the_same_in_json() {
    let replay = as_json(json!({
        "region": "iad,eu", "app": "other", "state": "s", "elsewhere": true, "timeout": "1.5s", "fallback": "force_self",
        "transform": {"path": "/new", "delete_headers": ["cookie"], "set_headers": [{"name": "X-A", "value": "b"}]},
        "cache": {"prefix": "web.test/a/*", "ttl": 60, "allow_bypass": true}, "a_later_field": 1}))
    .unwrap();
    assert_eq!(replay.regions, words(&["iad", "eu"]));
    assert_eq!(replay.timeout, Some(Duration::from_millis(1500)));
    assert_eq!(
        replay.transform,
        Transform {
            path: Some("/new".into()),
            delete_headers: words(&["cookie"]),
            set_headers: vec![("X-A".into(), "b".into())]
        }
    );
    let keep = |allow_bypass, ttl_s| {
        Some(Caching::Keep(Keep {
            pattern: "web.test/a/*".into(),
            ttl_s,
            allow_bypass,
        }))
    };
    assert_eq!(replay.cache, keep(true, Some(60)));
    let beside = as_json(json!({"app": "a", "cache": {"prefix": "web.test/a/*", "ttl": "30"}, "allow_bypass": true}));
    assert_eq!(beside.unwrap().cache, keep(true, Some(30)));
    let inside = json!({"app": "a", "cache": {"prefix": "web.test/a/*", "allow_bypass": false}, "allow_bypass": true});
    assert_eq!(
        as_json(inside).unwrap().cache,
        keep(false, None),
        "the nearer word counts"
    );
    let listed = as_json(json!({"region": ["iad", "ord"], "cache": {"invalidate": true}})).unwrap();
    assert_eq!(
        (listed.regions, listed.cache),
        (words(&["iad", "ord"]), Some(Caching::Invalidate))
    );
}

#[test]
fn what_to_remember_in_headers() {
    let with = |rule, ttl, allow_bypass| {
        let headers = CacheHeaders {
            rule: Some(rule),
            ttl,
            allow_bypass,
        };
        header::read("app=a", headers).map(|replay| replay.cache)
    };
    let keep = |ttl_s, allow_bypass| {
        Some(Caching::Keep(Keep {
            pattern: "/a/*".into(),
            ttl_s,
            allow_bypass,
        }))
    };
    assert_eq!(with("/a/*", Some("60"), Some("yes")), Ok(keep(Some(60), true)));
    assert_eq!(with("/a/*", None, Some("no")), Ok(keep(None, false)));
    assert_eq!(with("invalidate", None, None), Ok(Some(Caching::Invalidate)));
    assert!(
        with("/a/*", Some("soon"), None)
            .unwrap_err()
            .to_string()
            .contains("ttl-secs")
    );
}

#[test]
fn what_is_refused_names_the_field() {
    for (text, named) in [
        ("", "names no target"),
        ("state=x", "names no target"),
        ("elsewhere=false", "names no target"),
        ("region=iad,ord", "must be quoted"),
        ("region=\"iad", "quotes are not closed"),
        ("region=\"iad\"x", "a ; must follow"),
        ("region=iad;region=ord", "set twice"),
        ("iad", "key=value"),
        ("app=a;nonsense;x=1", "key=value"),
        ("instance=a;prefer_instance=b", "exclude each other"),
        ("instance=a;elsewhere=true", "exclude each other"),
        ("app=a;elsewhere=perhaps", "elsewhere"),
        ("app=a;timeout=10", "timeout"),
        ("app=a;timeout=0s", "timeout"),
        ("app=a;timeout=2h", "timeout"),
        ("app=a;fallback=self", "fallback"),
        ("app=a;state=\u{1}", "state"),
    ] {
        let why = said(text).unwrap_err();
        assert!(why.contains(named), "{text}: {why}");
    }
    for (value, named) in [
        (json!({"app": "a", "cache": {"ttl": 10}}), "cache.prefix"),
        (json!({"app": "a", "cache": {"prefix": "/", "ttl": "x"}}), "cache.ttl"),
        (json!({"app": "a", "transform": {"path": "new"}}), "transform.path"),
        (
            json!({"app": "a", "transform": {"set_headers": [{"name": "Fly-Client-IP", "value": "1"}]}}),
            "the proxy's own",
        ),
        (
            json!({"app": "a", "transform": {"set_headers": [{"name": "x_forwarded_for", "value": "1"}]}}),
            "the proxy's own",
        ),
        (
            json!({"app": "a", "transform": {"delete_headers": ["Transfer-Encoding"]}}),
            "the proxy's own",
        ),
        (
            json!({"app": "a", "transform": {"set_headers": [{"name": "x", "value": "a\r\nb"}]}}),
            "control characters",
        ),
        (json!({"app": 1}), "JSON"),
        (json!([]), "names no target"),
    ] {
        let why = as_json(value.clone()).unwrap_err();
        assert!(why.contains(named), "{value}: {why}");
    }
    let clients =
        json!({"app": "a", "transform": {"delete_headers": ["fly-force-instance-id", "fly-prefer-region", "cookie"]}});
    assert!(
        as_json(clients).is_ok(),
        "what clients say about routing is no secret of the proxy"
    );
}

#[test]
fn a_path_keeps_the_query_unless_it_brings_one() {
    let to = |path: &str| Transform {
        path: Some(path.to_owned()),
        ..Transform::default()
    };
    assert_eq!(to("/new").target("/old?a=1").as_deref(), Some("/new?a=1"));
    assert_eq!(to("/new?b=2").target("/old?a=1").as_deref(), Some("/new?b=2"));
    assert_eq!(to("/new").target("/old").as_deref(), Some("/new"));
    assert_eq!(Transform::default().target("/old"), None);
}

#[test]
fn what_it_wants_of_a_machine() {
    let replay = said("region=iad;prefer_instance=m2;elsewhere=true").unwrap();
    let wishes = Wishes {
        prefer_instance: Some("m2".into()),
        force_region: words(&["iad"]),
        exclude: Some("m1".into()),
        ..Wishes::default()
    };
    assert_eq!(replay.wishes("m1"), wishes);
    assert_eq!(
        said("instance=m2").unwrap().wishes("m1").force_instance.as_deref(),
        Some("m2")
    );
    assert_eq!(Fallback::ForceSelf.wishes("m1").force_instance.as_deref(), Some("m1"));
    assert_eq!(Fallback::PreferSelf.wishes("m1").prefer_instance.as_deref(), Some("m1"));
}

#[test]
fn what_changes_from_request_to_request_is_not_cached() {
    for (text, field) in [
        ("app=a;state=s", Some("state")),
        ("app=a;timeout=1s", Some("timeout")),
        ("app=a;fallback=force_self", Some("fallback")),
        ("app=a;region=iad", None),
        ("instance=m1", None),
    ] {
        assert_eq!(said(text).unwrap().uncacheable(), field, "{text}");
    }
    let moved = as_json(json!({"app": "a", "transform": {"path": "/x"}})).unwrap();
    assert_eq!(moved.uncacheable(), Some("transform"));
}

#[test]
fn what_the_next_machine_is_told() {
    assert_eq!(
        source("m1", "iad", 5, Some("a b")),
        "instance=m1;region=iad;t=5;state=a b"
    );
    assert_eq!(source("m1", "iad", 5, None), "instance=m1;region=iad;t=5");
    let failure = Failure {
        instance: "m2",
        app: "other",
        region: "lhr",
        source: "m1",
        reason: Reason::NoCandidate,
        elapsed_ms: 7,
    };
    assert_eq!(
        failure.text(),
        "instance=m2;app=other;region=lhr;replay_source=m1;reason=no_candidate;elapsed_ms=7"
    );
    for (reason, word) in [
        (Reason::Timeout, "timeout"),
        (Reason::RetriesExhausted, "retries_exhausted"),
    ] {
        assert!(
            Failure {
                reason,
                ..failure.clone()
            }
            .text()
            .contains(&format!("reason={word};"))
        );
    }
}

fn view(orgs: Value) -> Snapshot {
    let row = |key: String, value: Value| FeedRow {
        stream: "routes".into(),
        key,
        value: Some((&value).into()),
    };
    let mut rows = Vec::new();
    for (app, org, network) in [
        ("web", "acme", 1),
        ("api", "acme", 1),
        ("lab", "acme", 2),
        ("far", "other", 3),
    ] {
        rows.push(row(
            format!("app/{app}"),
            json!({"app": app, "org": org, "network": network}),
        ));
    }
    for (slug, value) in orgs.as_object().unwrap() {
        rows.push(row(format!("org/{slug}"), value.clone()));
    }
    rows.push(row(
        "m/m1".into(),
        json!({"id": "m1", "app": "rowless", "region": "iad", "node": "n1", "instance_id": "01A", "generation": 1,
            "state": "started", "ip4": "", "ip6": "", "services": [], "passing": []}),
    ));
    let mut table = Table::new("n1");
    table.apply(1, rows);
    assert_eq!(table.set_aside().count(), 0);
    table.snapshot()
}

#[test]
fn who_may_replay_to_whom() {
    let default = view(json!({}));
    let may = |from, to| authorise(from, to, &default);
    assert_eq!(may("web", "web"), Ok(()));
    assert_eq!(may("web", "api"), Ok(()));
    assert_eq!(may("web", "lab"), Err(Denied::Network));
    assert_eq!(may("web", "far"), Err(Denied::Org));
    assert_eq!(may("web", "gone"), Err(Denied::TargetApp));
    assert_eq!(may("web", "rowless"), Err(Denied::TargetApp));
    assert_eq!(may("gone", "web"), Err(Denied::SourceApp));
    assert_eq!(may("rowless", "web"), Err(Denied::SourceOrg));

    let open = view(json!({"acme": {"cross_network": true}, "other": {"replay_from": ["acme"]}}));
    assert_eq!(authorise("web", "lab", &open), Ok(()));
    assert_eq!(authorise("web", "far", &open), Ok(()));
    assert_eq!(
        authorise("far", "web", &open),
        Err(Denied::Org),
        "the list is the target's"
    );
    let codes = [
        Denied::SourceApp,
        Denied::SourceOrg,
        Denied::TargetApp,
        Denied::Network,
        Denied::Org,
    ];
    assert_eq!(codes.map(Denied::code), ["PE01", "PE02", "PA04", "PA05", "PA05"]);
}

proptest! {
    #[test]
    fn replays_end(says in prop::collection::vec(any::<bool>(), 0..60)) {
        let (mut course, mut deliveries, mut ended) = (Course::default(), 1, None);
        for again in says {
            let goes_on = match again {
                true => course.follow().map_err(|why| ended = Some(why)).is_ok(),
                false => course.fall_back(),
            };
            if !goes_on {
                break;
            }
            deliveries += 1;
        }
        prop_assert!(deliveries <= 1 + REPLAYS_MAX + 1);
        prop_assert!(ended != Some(Ended::TooMany) || deliveries == 1 + REPLAYS_MAX);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,80}", bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let _ = said(&text);
        let _ = json::read(&bytes);
    }

    #[test]
    fn a_quoted_state_comes_through(state in "[ -~]{0,40}") {
        let quoted = state.replace('\\', "\\\\").replace('"', "\\\"");
        let replay = said(&format!("app=a;state=\"{quoted}\"")).unwrap();
        prop_assert_eq!(replay.state, Some(state));
    }

    #[test]
    fn names_that_frame_or_vouch_are_never_set(name in prop::sample::select(vec![
        "fly-replay-src", "fly-replay-failed", "fly-client-ip", "x-forwarded-for", "content-length", "transfer-encoding",
        "connection", "upgrade", "via", "pantala-mesh-app", "fly-preferred-instance-unavailable", "te", "expect",
    ]), capital in any::<bool>(), alias in any::<bool>()) {
        let name = if capital { name.to_uppercase() } else { name.to_owned() };
        let name = if alias { name.replace('-', "_") } else { name };
        let value = json!({"app": "a", "transform": {"set_headers": [{"name": name, "value": "1"}]}});
        prop_assert!(as_json(value).is_err());
    }
}
