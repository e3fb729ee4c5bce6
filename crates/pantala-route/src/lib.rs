//! Routing decisions without I/O, between the rows of `pantala-wire` and the sockets of `pantala-proxy`, in the order in
//! which a request meets them:
//!
//! - [`table`]: rows become a [`snapshot`] (`assemble`), what they say alike is kept once (`intern`); unreadable ones are set aside
//! - [`entry`]: which app a connection is for and what is spoken on it; [`announce`] is the PROXY header, [`rates`] how often
//! - [`matching`]: address and host name to an app or a platform service
//! - [`buckets`]: whether a path is that of an object in a bucket, and of which
//! - [`choose`]: which machine of which region, or wake, wait, queue, fail; [`within`] is the part inside one region
//! - [`prefer`]: the same within what the client wishes
//! - [`replay`]: what an app says when a request should be answered elsewhere; [`replay_cache`] remembers it;
//!   [`geography`] knows the names for several regions
//! - [`internal`]: names of the private network
//! - [`line`]: who waits for a place while all are at their limit, and who is next
//! - [`gauge`]: what is in flight on a machine, shared by all threads; also the drain switch
//! - [`turn`]: which requests of other hosts' edges a machine's host turns away
//! - [`retry`]: whether another attempt is allowed
#![forbid(unsafe_code)]

pub mod announce;
mod assemble;
pub mod buckets;
pub mod choose;
pub mod entry;
pub mod gauge;
pub mod geography;
mod intern;
pub mod internal;
pub mod line;
pub mod matching;
pub mod names;
pub mod prefer;
pub mod rates;
pub mod replay;
pub mod replay_cache;
pub mod retry;
pub mod snapshot;
pub mod table;
pub mod turn;
pub mod within;
