//! Routing decisions without I/O: match, balance, retry, wake.
#![forbid(unsafe_code)]
