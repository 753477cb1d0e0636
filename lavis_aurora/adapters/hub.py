"""Adapters on the Hugging Face hub, by the library huggingface_hub: two files read, three written, nothing else."""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from lavis_aurora.common.errors import AuroraError

REPOSITORY = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")
COMMIT = re.compile("[0-9a-f]{40}")
LOG = logging.getLogger(__name__)


def local_folder(source: str | Path, files: tuple[str, ...]) -> Path:
    """A folder on this machine: ``source`` or, for a text USER/NAME[@REVISION] that is none here, what the hub has.

    Args:
        source: a path, or a text. A path, or a text whose first part is a folder here, is never looked up.
        files: of the repository, the only ones that are fetched.

    Raises:
        AuroraError: it is none here, and the hub has no such repository, cannot be reached, or is not installed.
    """
    path, text = Path(source).expanduser(), str(source)
    match = REPOSITORY.fullmatch(text)
    if not isinstance(source, str) or match is None or path.exists() or Path(text.partition("/")[0]).exists():
        return path
    return _fetch(match["name"], match["revision"], files)


@cache
def _fetch(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """Files of a repository in the hub's cache; once a process, so that all of it has one revision."""
    hub = _library(f"{name} is no folder here, and to fetch it from the hub")
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # of requests and of the hub's library
        at = f" at {revision}" if revision else ""
        reason = str(error).strip().split("\n")[0]
        raise AuroraError(f"{name} is no folder here, and the hub gives no such repository{at} ({reason})") from error
    if revision is None or not COMMIT.fullmatch(revision):
        LOG.warning("%s: fetched from the hub; name %s@%s to have this very one again", name, name, folder.name)
    else:
        LOG.info("%s: commit %s of the hub", name, revision)
    return folder


def push_files(files: dict[str, Path | bytes], repository: str, private: bool, message: str) -> str:
    """Write files into a repository of the hub, which is made if need be; the commit's hash.

    Args:
        files: their content by name.
        repository: USER/NAME.
        private: make it a private one, if it is made.
        message: of the commit.

    Raises:
        AuroraError: no such name can be, the hub refuses it or cannot be reached, or is not installed.
    """
    match = REPOSITORY.fullmatch(repository)
    if match is None or match["revision"]:
        raise AuroraError(f"{repository!r} is no name of a repository; write USER/NAME")
    hub = _library("to push to the hub")
    operations = [
        hub.CommitOperationAdd(
            path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content)
        )
        for name, content in files.items()
    ]
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.create_commit(repository, operations, commit_message=message)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AuroraError(
            f"{repository}: the hub refuses it ({reason}); log in by hf auth login, or set HF_TOKEN, with a token "
            f"that may write there"
        ) from error
    return str(commit.oid)


def _library(purpose: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise AuroraError(f"{purpose} needs huggingface_hub: pip install huggingface_hub ({error})") from error
    return huggingface_hub
