"""Prepared data: token shards on disk, training sequences, held-out windows."""
