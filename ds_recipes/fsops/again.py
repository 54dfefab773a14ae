"""What a shared file system may say once and not mean: a call that changes nothing is made again a few times.

NFS answers ESTALE for a file that another host has replaced, Lustre and NFS EIO while a server fails over, and a name made
on one host can be missing on another for seconds. Writes and fsync are never repeated: after a failed fsync the kernel may
have dropped the data, and a second one would succeed without them.
"""

import errno
import time
from collections.abc import Callable, Collection
from typing import TypeVar

PASSING = frozenset({errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT})
PAUSES_SECONDS = (0.1, 0.5, 2.0, 5.0)
"""How long is waited between the attempts: 7.6 s in all, longer than the attribute cache of NFS holds a name (3 s)."""

T = TypeVar("T")


def again(fn: Callable[[], T], also: Collection[int] = (), pauses_seconds: Collection[float] = PAUSES_SECONDS) -> T:
    """Call `fn`, which must be safe to repeat, until it succeeds.

    `also` are further errno values to wait out, such as ENOENT for a name that another host has just made.

    Raises:
        OSError: the last one, once the attempts are used up; at once, one that does not pass.
    """
    for pause in pauses_seconds:
        try:
            return fn()
        except OSError as error:
            if error.errno not in PASSING and error.errno not in also:
                raise
        time.sleep(pause)
    return fn()
