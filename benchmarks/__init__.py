"""Measurements on real adapters; see docs/performance.md."""
