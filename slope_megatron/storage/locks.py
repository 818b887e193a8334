"""One process at a time: an advisory lock on an open file, which the kernel drops when the process ends."""

import errno
import fcntl
import logging
from typing import IO

logger = logging.getLogger(__name__)
HELD_BY_ANOTHER = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
# Lustre without -o flock, NFS without a lock service, FUSE and others: there is no lock to be had.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def take(stream: IO, risk: str) -> bool:
    """Lock an open file without waiting; closing it gives the lock back.

    Args:
        risk: what two processes at once would do, for the line that is logged where the file system has no locks.
    Returns:
        False: another process holds it. True: it is ours, or the file system has no locks.
    Raises:
        OSError: anything else that the file system says; names the file.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD_BY_ANOTHER:
            return False
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, stream.name) from None
        logger.warning("%s: this file system has no locks (%s): %s", stream.name, error.strerror, risk)
    return True
