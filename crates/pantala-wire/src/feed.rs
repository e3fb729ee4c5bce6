//! The feed between agent and proxy: `src/pantala/wire/feed.py`.
