"""Contracts as plain types: public API, node API, guest API, proxy feed, catalogue frames. Types only."""
