"""Typed clients of the public API and of the node API."""
