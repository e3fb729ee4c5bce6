//! Which object of which bucket a path means, by the app's `statics`. What a client writes must never lead out of the
//! folder that the app named: names that a URL would resolve (`.`, `..`) are for the app.
//!
//! Each version of an app may name a folder of its own. While a deploy goes on machines of two versions serve pages, and
//! each kind of page asks for files of its own version: all folders are looked into, those of ready machines first.

use std::sync::Arc;

use pantala_wire::feed::Static;
use percent_encoding::percent_decode_str;

use crate::snapshot::{Phase, Target};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object<'a> {
    pub bucket: &'a str,
    /// not encoded
    pub key: String,
}

/// Folders that a path is looked up in; more versions than this do not serve at once for long.
const FOLDERS_MAX: usize = 3;

/// Those that are read from buckets, each once: first what machines name that serve, then what the others do.
pub fn of(targets: &[Target]) -> Option<Arc<[Static]>> {
    let named = |target: &Target| target.service.statics.iter().any(|one| one.tigris_bucket.is_some());
    if !targets.iter().any(named) {
        return None;
    }
    let serves =
        |target: &&Target| target.machine.phase == Phase::Running && !target.machine.cordoned && target.passing;
    let there = |target: &&Target| target.machine.phase != Phase::Gone;
    let in_order = (targets.iter().filter(serves)).chain(targets.iter().filter(there));
    let mut found: Vec<Static> = Vec::new();
    for one in in_order.flat_map(|target| &target.service.statics) {
        if one.tigris_bucket.is_some() && !found.contains(one) {
            found.push(one.clone());
        }
    }
    (!found.is_empty()).then(|| found.into())
}

/// Where to look, one after the other. `path` is as the client wrote it. None, or in none of them: the app is asked.
pub fn objects<'a>(statics: &'a [Static], path: &str) -> impl Iterator<Item = Object<'a>> {
    statics
        .iter()
        .filter_map(move |one| object(one, path))
        .take(FOLDERS_MAX)
}

fn object<'a>(mapping: &'a Static, path: &str) -> Option<Object<'a>> {
    let rest = path.strip_prefix(mapping.url_prefix.trim_end_matches('/'))?;
    let rest = rest.starts_with('/').then_some(rest)?;
    let mut name = percent_decode_str(rest).decode_utf8().ok()?.into_owned();
    if name.ends_with('/') {
        name.push_str(mapping.index_document.as_deref().filter(|index| !index.is_empty())?);
    }
    let key = format!("{}{name}", mapping.guest_path.trim_matches('/'));
    let key = key.trim_start_matches('/').to_owned();
    let bucket = mapping.tigris_bucket.as_deref()?;
    (names_a_bucket(bucket) && names_an_object(&key)).then_some(Object { bucket, key })
}

/// What may stand in a URL's host or path and means nothing else there.
fn names_a_bucket(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.' || b == b'_';
    !name.is_empty() && name.bytes().all(allowed) && !name.starts_with('.')
}

fn names_an_object(key: &str) -> bool {
    let misleading = |part: &str| part.is_empty() || part == "." || part == "..";
    key.len() <= 1024 && !key.split('/').any(misleading) && !key.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mapping(url_prefix: &str, guest_path: &str, index: Option<&str>) -> [Static; 1] {
        [Static {
            url_prefix: url_prefix.to_owned(),
            guest_path: guest_path.to_owned(),
            tigris_bucket: Some("assets".to_owned()),
            index_document: index.map(str::to_owned),
        }]
    }

    fn key(statics: &[Static], path: &str) -> Option<String> {
        objects(statics, path).next().map(|object| object.key)
    }

    #[test]
    fn the_path_under_the_prefix_is_the_key_under_the_folder() {
        let statics = mapping("/static/", "/app/public/", None);
        assert_eq!(
            key(&statics, "/static/css/a%20b.css").as_deref(),
            Some("app/public/css/a b.css")
        );
        for other in ["/static", "/static/", "/staticx/a", "/", "/static/a/", "/static//a"] {
            assert_eq!(key(&statics, other), None, "{other}");
        }
        assert_eq!(key(&mapping("/", "/", None), "/a/b").as_deref(), Some("a/b"));
        assert_eq!(
            key(&mapping("/s", "site", None), "/s/a%2Fb").as_deref(),
            Some("site/a/b")
        );
    }

    #[test]
    fn an_index_stands_for_paths_that_end_in_a_slash() {
        let statics = mapping("/", "/site", Some("index.html"));
        assert_eq!(key(&statics, "/").as_deref(), Some("site/index.html"));
        assert_eq!(key(&statics, "/docs/").as_deref(), Some("site/docs/index.html"));
        assert_eq!(key(&statics, "/docs").as_deref(), Some("site/docs"));
    }

    #[test]
    fn a_bucket_that_would_be_something_else_in_a_url_is_none() {
        for bad in ["", ".", "..", "a/b", "a?b", "a%2f", "a@b"] {
            let mut statics = mapping("/", "/", None);
            statics[0].tigris_bucket = Some(bad.to_owned());
            assert_eq!(objects(&statics, "/a").next(), None, "{bad}");
        }
    }

    #[test]
    fn a_path_is_looked_up_in_the_folder_of_each_version() {
        let folders: Vec<Static> = ["new", "old", "older", "oldest"]
            .into_iter()
            .flat_map(|folder| {
                mapping("/s", folder, None)
                    .into_iter()
                    .chain(mapping("/t", folder, None))
            })
            .collect();
        let keys: Vec<String> = objects(&folders, "/s/a").map(|object| object.key).collect();
        assert_eq!(keys, ["new/a", "old/a", "older/a"]);
        assert_eq!(objects(&folders, "/u/a").count(), 0);
    }

    proptest! {
        #[test]
        fn nothing_leads_out_of_the_folder(path in "/s(/|%2[eEfF]|%5c|\\.|[a-z]|%00|\\\\|\u{e9}){0,12}") {
            if let Some(key) = key(&mapping("/s", "/app/public", Some("index.html")), &path) {
                prop_assert!(key.starts_with("app/public/"));
                prop_assert!(key.split('/').all(|part| !["", ".", ".."].contains(&part)), "{}", key);
            }
        }
    }
}
