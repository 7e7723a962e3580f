"""Replication: copies of a VM on an SR, whole (full) or as one VM that follows (incremental)."""
