"""Copying backups from one remote to others (``job.type = 'mirrorBackup'``)."""
