//! The header form: `fly-replay: key=value;key="quoted, value"`, with what to remember in three more headers.

use super::{Caching, Invalid, Keep, Replay, duration, fallback, invalid, regions};

/// `fly-replay-cache`, `fly-replay-cache-ttl-secs`, `fly-replay-cache-allow-bypass`, as they came.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheHeaders<'a> {
    pub rule: Option<&'a str>,
    pub ttl: Option<&'a str>,
    pub allow_bypass: Option<&'a str>,
}

pub fn read(text: &str, cache: CacheHeaders<'_>) -> Result<Replay, Invalid> {
    let mut replay = Replay::default();
    let mut seen: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some(item) = next(&mut rest)? {
        if seen.contains(&item.key) {
            return Err(invalid(format!("{} is set twice", item.key)));
        }
        seen.push(item.key);
        take(&mut replay, item)?;
    }
    replay.cache = caching(cache)?;
    replay.checked()
}

struct Item<'a> {
    key: &'a str,
    value: String,
    quoted: bool,
}

/// A field of a later version is none of ours; a replay without a target is refused in any case.
fn take(replay: &mut Replay, item: Item<'_>) -> Result<(), Invalid> {
    let Item { key, value, quoted } = item;
    let one = |value: String| Some(value).filter(|value| !value.is_empty());
    match key {
        "region" if !quoted && value.contains(',') => {
            return Err(invalid(format!("region: a list must be quoted: region=\"{value}\"")));
        }
        "region" => replay.regions = regions(&value).collect(),
        "instance" => replay.instance = one(value),
        "prefer_instance" => replay.prefer_instance = one(value),
        "app" => replay.app = one(value),
        "state" => replay.state = Some(value),
        "elsewhere" => replay.elsewhere = truth(key, &value)?,
        "timeout" => replay.timeout = Some(duration(&value)?),
        "fallback" => replay.fallback = Some(fallback(&value)?),
        _ => {}
    }
    Ok(())
}

fn truth(field: &str, value: &str) -> Result<bool, Invalid> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(invalid(format!("{field}: {value:?} is neither true nor false"))),
    }
}

fn caching(headers: CacheHeaders<'_>) -> Result<Option<Caching>, Invalid> {
    let Some(rule) = headers.rule.map(str::trim).filter(|rule| !rule.is_empty()) else {
        return Ok(None);
    };
    if rule == "invalidate" {
        return Ok(Some(Caching::Invalidate));
    }
    let seconds = |text: &str| {
        let wrong = || invalid(format!("fly-replay-cache-ttl-secs: {text:?} is no number of seconds"));
        text.trim().parse().map_err(|_| wrong())
    };
    let allow_bypass = headers.allow_bypass.map(str::trim);
    Ok(Some(Caching::Keep(Keep {
        pattern: rule.to_owned(),
        ttl_s: headers.ttl.map(seconds).transpose()?,
        allow_bypass: matches!(allow_bypass, Some("yes" | "true")),
    })))
}

/// Takes `key=value` off the front; quotes may hold anything, `\` keeps the next character from meaning something.
fn next<'a>(rest: &mut &'a str) -> Result<Option<Item<'a>>, Invalid> {
    let text = rest.trim_start_matches([' ', '\t', ';']);
    if text.is_empty() {
        return Ok(None);
    }
    let (key, after) = text
        .split_once('=')
        .filter(|(key, _)| !key.contains(';'))
        .ok_or_else(|| invalid(format!("{text:?} is not of the form key=value;key=value")))?;
    let after = after.trim_start();
    let key = key.trim();
    let Some(inside) = after.strip_prefix('"') else {
        let end = after.find(';').unwrap_or(after.len());
        *rest = &after[end..];
        return Ok(Some(Item {
            key,
            value: after[..end].trim_end().to_owned(),
            quoted: false,
        }));
    };
    let (value, after) = unquote(inside).ok_or_else(|| invalid(format!("{key}: the quotes are not closed")))?;
    let after = after.trim_start();
    if !after.is_empty() && !after.starts_with(';') {
        return Err(invalid(format!("{key}: a ; must follow the closing quote")));
    }
    *rest = after;
    Ok(Some(Item {
        key,
        value,
        quoted: true,
    }))
}

fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            _ => value.push(character),
        }
    }
    None
}
