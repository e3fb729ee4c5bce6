//! One JSON object a line on standard error: a short constant sentence and fields named by the glossary.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

pub fn info(event: &str, fields: &[(&str, &dyn std::fmt::Display)]) {
    line("info", event, fields);
}

pub fn warning(event: &str, fields: &[(&str, &dyn std::fmt::Display)]) {
    line("warning", event, fields);
}

pub fn error(event: &str, fields: &[(&str, &dyn std::fmt::Display)]) {
    line("error", event, fields);
}

fn line(level: &str, event: &str, fields: &[(&str, &dyn std::fmt::Display)]) {
    let mut record = Map::new();
    record.insert("event".into(), event.into());
    record.insert("level".into(), level.into());
    record.insert("time_ms".into(), now_ms().into());
    record.extend(
        fields
            .iter()
            .map(|(name, value)| ((*name).to_owned(), Value::String(value.to_string()))),
    );
    let mut text = Value::Object(record).to_string();
    text.push('\n');
    // A full or closed log must not stop the data path.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}
