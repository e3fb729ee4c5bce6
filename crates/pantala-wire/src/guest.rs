//! The guest API between agent and init: `src/pantala/wire/guest.py`.
