"""The way to the hub: is there one, may it be used, and with whose token."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.utils.tqdm import disable_progress_bars

from ds_recipes.checkpoint.hub.credentials import find_token
from ds_recipes.errors import HubError, InputError
from ds_recipes.hub_probe import PROBE_SECONDS, ensure_hub_reachable_or_offline

ANSWER_SECONDS = 300.0
"""How long one answer is waited for; without this, for ever. The commit of many files may take minutes."""


def connect(token_file: Path | None, with_bars: bool) -> HfApi:
    """Reach the hub, with a token.

    Raises:
        InputError: offline mode is on, or there is no token.
        HubError: the hub does not answer within 2 s.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing may be sent. Unset it and run again."
        )
    if not ensure_hub_reachable_or_offline():
        raise HubError(
            f"{constants.ENDPOINT} did not answer within {PROBE_SECONDS:.0f} s: this machine has no way to the hub. Run the "
            "command on one that has (a login node, for instance); HTTPS_PROXY and HF_ENDPOINT are followed."
        )
    if not with_bars:
        disable_progress_bars()
    get_session().timeout = ANSWER_SECONDS
    return HfApi(token=find_token(token_file))
