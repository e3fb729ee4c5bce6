//! Which object of which bucket a path means, by the app's `statics`. What a client writes must never lead out of the
//! folder that the app named: names that a URL would resolve (`.`, `..`) are for the app.

use std::sync::Arc;

use pantala_wire::feed::Static;
use percent_encoding::percent_decode_str;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object<'a> {
    pub bucket: &'a str,
    /// not encoded
    pub key: String,
}

/// Those that are read from buckets.
pub fn of(statics: &[Static]) -> Option<Arc<[Static]>> {
    let found: Arc<[Static]> = statics
        .iter()
        .filter(|one| one.tigris_bucket.is_some())
        .cloned()
        .collect();
    (!found.is_empty()).then_some(found)
}

/// `path` is as the client wrote it. None: the app is asked.
pub fn object<'a>(statics: &'a [Static], path: &str) -> Option<Object<'a>> {
    let under = |one: &'a Static| {
        let rest = path.strip_prefix(one.url_prefix.trim_end_matches('/'))?;
        rest.starts_with('/').then_some((one, rest))
    };
    let (mapping, rest) = statics.iter().find_map(under)?;
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
        object(statics, path).map(|object| object.key)
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
            assert_eq!(object(&statics, "/a"), None, "{bad}");
        }
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
