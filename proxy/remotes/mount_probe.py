"""Does what is mounted at a directory work: a program of its own, which can be killed.

``python mount_probe.py <directory> <file>``: ask for the space, list, and unless it is mounted
read-only write, sync and remove ``<file>``.  Prints ``ok``, or ``<errno> <what it was doing>``.
It imports nothing of the daemon, so that it starts at once.
"""

import os
import sys


def probe(directory: str, name: str) -> str:
    """``ok``, or the number of the error and what failed."""
    doing = "statvfs"
    try:
        space = os.statvfs(directory)
        doing = "scandir"
        with os.scandir(directory) as names:
            next(names, None)
        if not space.f_flag & os.ST_RDONLY:
            doing = "create"
            path = f"{directory}/{name}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                doing = "write"
                os.write(descriptor, b"probe")
                doing = "fsync"
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
                doing = f"unlink after {doing}"
                os.unlink(path)  # noqa: PTH108 (no import that costs time)
    except OSError as error:
        return f"{error.errno} {doing}"
    return "ok"


if __name__ == "__main__":
    print(probe(sys.argv[1], sys.argv[2]), flush=True)  # noqa: T201
