"""What `shards.verify` looks at: tars, records, images, captions, and overlaps between sets."""
