"""Nouns and lifecycles; no I/O."""
