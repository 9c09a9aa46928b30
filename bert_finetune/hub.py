"""Models by hub name: every file from one commit, the local cache, and what went wrong in plain words."""

import functools
import os
import sys
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from bert_finetune.errors import reason

# For a model without safetensors, transformers would ask a public service to convert it, and send it the user's token.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

CONFIG = "config.json"

# What the hub's client raises when the hub cannot be reached, refuses, or answers as no hub does: its own errors, and
# those of the HTTP library under it, are of these kinds.
HUB_FAILURES = (HTTPError, HfHubHTTPError, OSError, ValueError, RuntimeError)

# What an error means, the first that fits. {hub}: its address, {cache}: the folder of all models fetched.
REASONS = (
    (GatedRepoError, "is gated: ask for access at {hub}/{name} and set HF_TOKEN to a token of yours"),
    (RepositoryNotFoundError, "neither a folder nor a model at {hub}; if it is private, set HF_TOKEN"),
    (OfflineModeIsEnabled, "neither a folder nor in the local cache ({cache}); unset HF_HUB_OFFLINE to fetch it"),
    (RemoteEntryNotFoundError, "has no config.json at {hub}, so it is no transformers model"),
    (HFValidationError, "no such folder, and not a name on the hub (such as google-bert/bert-base-uncased)"),
    (FileMetadataError, "{hub} does not answer as a model hub does; check HF_ENDPOINT"),
    (HfHubHTTPError, "{hub} answered with HTTP status {status}; try again later, or check HF_TOKEN and HF_ENDPOINT"),
    (HTTPError, "cannot be fetched from {hub} ({error}); try again, or check the network and HF_ENDPOINT"),
)


# The same where a finished model is to be sent.
_PUSH_REASONS = (
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it"),
    (HFValidationError, "not a name that the hub takes; give another as --hub_model_id"),
    (
        HfHubHTTPError,
        "{hub} answered with HTTP status {status}; 401 and 403 mean that HF_TOKEN is no token that may write there",
    ),
    (HTTPError, "{hub} cannot be reached ({error}); check the network and HF_ENDPOINT"),
)

_commits: dict[str, str] = {}


def hub_options(name_or_path: str) -> dict:
    """What transformers' loaders need beside a name to take all files from one commit (nothing for a folder).

    That is where `main` stands when the process first asks; where the hub cannot tell, the commit in the local cache,
    and then the hub is not asked for anything else. Raises what `hub_reason` explains.
    """
    if Path(name_or_path).is_dir():
        return {}
    options = _options(name_or_path)
    _commits[name_or_path] = options["revision"]
    return options


def commits_used() -> dict[str, str]:
    """The models that this process took by name, each with the commit that its files are of."""
    return dict(_commits)


@functools.cache
def _options(name: str) -> dict:
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG))  # gives up early, where the next line tries for minutes
        return {"revision": Path(hf_hub_download(name, CONFIG)).parent.name}
    except HUB_FAILURES as error:
        cached = try_to_load_from_cache(name, CONFIG)
        if not isinstance(cached, str):
            raise
        if not constants.HF_HUB_OFFLINE:
            print(f"warning: {name} is taken from the local cache: {hub_reason(error, name)}", file=sys.stderr)
        return {"revision": Path(cached).parent.name, "local_files_only": True}


def push_reason(error: Exception) -> str:
    """Why a model cannot be sent, and what to do about it, in one line."""
    return _first_reason(error, _PUSH_REASONS) or reason(error)


def hub_reason(error: BaseException, name: str) -> str:
    """What went wrong with a model by name, and what to do about it, in one line."""
    if found := _first_reason(error, REASONS, name=name, cache=constants.HF_HUB_CACHE):
        return found
    if any("Consistency check failed" in str(link) for link in _links(error)):
        return f"a file came incomplete from {constants.ENDPOINT}; try again"
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    again = f"if files in {folder} are damaged or missing, remove it and run this again with the hub at hand"
    return f"cannot be loaded: {reason(error)}; {again}"


def _links(error: BaseException) -> list[BaseException]:
    """An error, and what led to it, back to the first."""
    links = [error]
    while (link := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(link)
    return links


def _first_reason(error: BaseException, reasons: tuple, **words: str) -> str | None:
    for kind, text in reasons:
        for link in _links(error):
            if isinstance(link, kind):
                status = link.response.status_code if isinstance(link, HfHubHTTPError) else None
                return text.format(hub=constants.ENDPOINT, status=status, error=reason(link), **words)
    return None
