"""Is the hub within reach? Asked once, so that a machine without network does not wait through every retry."""

import http.client
import os
import threading
import urllib.error
import urllib.request

PROBE_SECONDS = 2.0


def ensure_hub_reachable_or_offline() -> bool:
    """True if the hub answers within 2 s; otherwise switch this process to offline mode and return False.

    Without this a missing name costs 23 s of retries where there is no network. HF_HUB_OFFLINE and HF_ENDPOINT count.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()
    # In a thread: a name server that does not answer blocks for longer than any socket's time limit.
    threading.Thread(target=_ask, args=(constants.ENDPOINT, answered), name="hub probe", daemon=True).start()
    if answered.wait(PROBE_SECONDS):
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    return False


def _ask(endpoint: str, answered: threading.Event) -> None:
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except (OSError, ValueError, http.client.HTTPException):
        return
    answered.set()
