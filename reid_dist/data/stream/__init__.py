"""Streams of image-text pairs out of tars that are read from beginning to end."""
