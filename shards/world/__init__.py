"""Procedural pedestrian world: identities, pictures, captions and raw data sets drawn by code (no photograph)."""
