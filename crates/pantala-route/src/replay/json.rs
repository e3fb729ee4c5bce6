//! The JSON form: an answer of the type [`CONTENT_TYPE`], whose fields are those of the header and a few more.

use serde::Deserialize;
use serde_json::Value;

use super::{Caching, Invalid, Keep, Replay, Transform, duration, fallback, invalid, regions};

pub const CONTENT_TYPE: &str = "application/vnd.fly.replay+json";
/// Bodies of that type are instructions, not content.
pub const BYTES_MAX: usize = 64 * 1024;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Document {
    region: Option<Regions>,
    instance: Option<String>,
    prefer_instance: Option<String>,
    app: Option<String>,
    state: Option<String>,
    elsewhere: Option<bool>,
    timeout: Option<String>,
    fallback: Option<String>,
    transform: Option<DocumentTransform>,
    cache: Option<DocumentCache>,
    allow_bypass: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Regions {
    Text(String),
    List(Vec<String>),
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct DocumentTransform {
    path: Option<String>,
    delete_headers: Option<Vec<String>>,
    set_headers: Option<Vec<NameValue>>,
}

#[derive(Deserialize)]
struct NameValue {
    name: String,
    value: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct DocumentCache {
    prefix: Option<String>,
    ttl: Option<Value>,
    invalidate: Option<bool>,
    allow_bypass: Option<bool>,
}

pub fn read(body: &[u8]) -> Result<Replay, Invalid> {
    let document: Document =
        serde_json::from_slice(body).map_err(|error| invalid(format!("the JSON is not right: {error}")))?;
    let one = |text: Option<String>| text.filter(|text| !text.is_empty());
    let listed = match document.region {
        None => Vec::new(),
        Some(Regions::Text(text)) => regions(&text).collect(),
        Some(Regions::List(list)) => list.iter().flat_map(|text| regions(text)).collect(),
    };
    let replay = Replay {
        regions: listed,
        instance: one(document.instance),
        prefer_instance: one(document.prefer_instance),
        app: one(document.app),
        state: document.state,
        elsewhere: document.elsewhere.unwrap_or_default(),
        timeout: document.timeout.as_deref().map(duration).transpose()?,
        fallback: document.fallback.as_deref().map(fallback).transpose()?,
        transform: document.transform.map(transform).unwrap_or_default(),
        cache: match document.cache {
            Some(cache) => caching(cache, document.allow_bypass)?,
            None => None,
        },
    };
    replay.checked()
}

fn transform(document: DocumentTransform) -> Transform {
    let set = document.set_headers.unwrap_or_default();
    Transform {
        path: document.path,
        delete_headers: document.delete_headers.unwrap_or_default(),
        set_headers: set.into_iter().map(|one| (one.name, one.value)).collect(),
    }
}

/// The documentation shows `allow_bypass` without saying where it belongs: beside `cache` or in it.
fn caching(cache: DocumentCache, allow_bypass: Option<bool>) -> Result<Option<Caching>, Invalid> {
    if cache.invalidate == Some(true) {
        return Ok(Some(Caching::Invalidate));
    }
    let Some(pattern) = cache.prefix else {
        return Err(invalid("cache.prefix: say for which requests, such as /path/*"));
    };
    let ttl_s = match cache.ttl {
        None | Some(Value::Null) => None,
        Some(Value::Number(number)) => Some(number.as_u64().ok_or_else(wrong_ttl)?),
        Some(Value::String(text)) => Some(text.parse().map_err(|_| wrong_ttl())?),
        Some(_) => return Err(wrong_ttl()),
    };
    Ok(Some(Caching::Keep(Keep {
        pattern,
        ttl_s,
        allow_bypass: cache.allow_bypass.or(allow_bypass).unwrap_or_default(),
    })))
}

fn wrong_ttl() -> Invalid {
    invalid("cache.ttl must be a number of seconds")
}
