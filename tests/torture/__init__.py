"""The real daemon, killed at random moments while it backs up and restores: `scripts/torture`."""
