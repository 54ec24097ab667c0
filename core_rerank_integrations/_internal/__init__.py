"""Helpers that are not part of the public API: files, progress, packaged resources."""
