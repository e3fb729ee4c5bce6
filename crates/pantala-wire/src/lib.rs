//! Serde mirror of the documents that Python and Rust exchange. The source is `src/pantala/wire/`; tests hold these
//! types against the schemas generated from it (`schemas/feed.json`, `schemas/guest.json`).
#![forbid(unsafe_code)]

pub mod feed;
pub mod guest;
pub mod media;
