"""The shard room: sources, shard files, receipts and snapshots on any fsspec URL."""
