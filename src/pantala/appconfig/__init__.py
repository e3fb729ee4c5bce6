"""fly.toml: parse, validate, explain, write. Decisions only; files are read by `load`."""
