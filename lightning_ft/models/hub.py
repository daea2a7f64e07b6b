"""Upload an export to the Hugging Face hub, in one commit, so that a repository never mixes two exports.

What would fail is refused before anything is written, if that is known by then: being offline, a missing token, a
repository that has files, and weights in another format than safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import HubError, LightningFTError
from lightning_ft.models.export import CARD, FIRST_READ, LOADED, REPLACED, ExportFormat
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.model_card import hub_name

_UPLOADED = (*FIRST_READ, *LOADED)
"""Files of an export next to its card. Other files in its folder are the user's own and are never uploaded."""
_DELETED = (*FIRST_READ, *REPLACED)
"""Files of an earlier export, in whatever format: weights that stay would be loaded, or taken for those of the card."""
_OF_THE_HUB = (".gitattributes",)
"""Files that a new repository has."""


def check_hub(
    repo_id: str, *, private: bool = True, overwrite: bool = False, format: ExportFormat = "safetensors"
) -> None:
    """Refuse an upload that would fail, as far as that is known.

    A hub that can't be reached now may be reached later, so that is a warning.

    Args:
        repo_id: Repository, such as ``organization/name``.
        private: Whether it is to be private.
        overwrite: Whether it may have files.
        format: Format of the export.

    Raises:
        HubError: With the reason and what to do.
    """
    if format != "safetensors":
        raise HubError(f"format={format!r} isn't uploaded: push_to_hub takes safetensors, which transformers loads.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"push_to_hub={repo_id!r} is no name of a repository: expected 'organization/name' or 'name'. {error}"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"push_to_hub={repo_id!r}: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or export without "
            "push_to_hub and run `hf upload` on the folder later."
        )
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"push_to_hub={repo_id!r}: there is no token for the hub. Run `hf auth login`, or set HF_TOKEN to a token "
            "that may write."
        )
    api = HfApi()
    try:
        api.whoami()
        _refuse(repo_id, _existing(api, repo_id), private=private, overwrite=overwrite)
    except LightningFTError:
        raise
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise HubError(
                f"push_to_hub={repo_id!r}: the hub refused the token ({_reason(error)}). Run `hf auth login` again, or "
                "set HF_TOKEN to a token that may write to this repository."
            ) from error
        rank_zero_warn(
            f"The hub can't be asked about {repo_id!r} now ({_reason(error)}). The upload is tried at the end."
        )


def warn_of_local_base(model: CausalLM, repo_id: str, *, merge: bool) -> None:
    """Warn before an upload of an adapter that no one else can load, since its base is a local folder.

    Args:
        model: The model.
        repo_id: Repository.
        merge: Whether the adapter is merged into the base.
    """
    source = getattr(base_of(model).config, "_name_or_path", None)
    if model is not base_of(model) and not merge and hub_name(source) is None:
        rank_zero_warn(
            f"{repo_id!r} gets an adapter whose base is the local folder {Path(source or '').name!r}, so it can only "
            "be loaded where that folder is. Merge it (merge=True), or train over the base's name on the hub."
        )


def upload_export(
    folder: str | Path,
    repo_id: str,
    *,
    card: str,
    private: bool = True,
    overwrite: bool = False,
    kept: bool = True,
) -> str:
    """Upload an export as one commit; files of an earlier export are removed in the same commit.

    Args:
        folder: Folder of the export. Files that an export doesn't write stay where they are.
        repo_id: Repository; created if it doesn't exist.
        card: Text of the model card.
        private: Whether the repository is private; an existing public one is refused.
        overwrite: Whether the repository may have files.
        kept: Whether the folder is kept, so that errors point to it.

    Returns:
        Address of the repository.

    Raises:
        HubError: If nothing was uploaded, with the reason. The folder is unchanged.
    """
    path = Path(folder)
    check_hub(repo_id, private=private, overwrite=overwrite)
    api, files = HfApi(), list(_exported(path))
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        repository = _existing(api, url.repo_id)
        _refuse(repo_id, repository, private=private, overwrite=overwrite)  # others may have written since the check
        there = [] if repository is None else repository.files
        additions = [CommitOperationAdd(file.relative_to(path).as_posix(), file) for file in files]
        additions.append(CommitOperationAdd(CARD, card.encode()))
        new = {addition.path_in_repo for addition in additions}
        old = [CommitOperationDelete(name) for name in there if name not in new and _matches(name, _DELETED)]
        api.create_commit(url.repo_id, [*old, *additions], commit_message="Upload model with lightning_ft")
    except HubError:
        raise
    except Exception as error:  # of the network, the hub or the token
        rest = f" The export is in {str(path)!r}: run `hf upload {repo_id} {path}`, or export again." if kept else ""
        raise HubError(f"Nothing was uploaded to {repo_id!r}: {_reason(error)}.{rest}") from error
    return str(url)


def _exported(folder: Path) -> Iterator[Path]:
    """Files of an export, without its card."""
    found = {file for pattern in _UPLOADED for file in folder.glob(pattern) if file.is_file()}
    return iter(sorted(found))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path in a repository matches, as `Path.glob` would: fnmatch's ``*`` would also match a slash."""
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


class _Repository(NamedTuple):
    """A repository on the hub."""

    private: bool
    files: list[str]


def _existing(api: HfApi, repo_id: str) -> _Repository | None:
    """The repository of that name; None if there is none, or the token may not see it."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    files = [file.rfilename for file in info.siblings or () if file.rfilename not in _OF_THE_HUB]
    return _Repository(bool(info.private), files)


def _refuse(repo_id: str, repository: _Repository | None, *, private: bool, overwrite: bool) -> None:
    """Refuse a repository that has files, or that everyone can read, unless that was asked for."""
    if repository is None:
        return
    if repository.files and not overwrite:
        raise HubError(
            f"The repository {repo_id!r} has files already ({len(repository.files)}, first: {repository.files[0]}). "
            "Choose another name, or pass hub_overwrite=True to commit this export over them; earlier commits stay in "
            "its history."
        )
    if private and not repository.private:
        raise HubError(
            f"The repository {repo_id!r} is public. Make it private on its settings page, or pass private=False to "
            "upload to it as it is."
        )


def _reason(error: Any) -> str:
    """First line of an error, without the token that a message might repeat."""
    text = str(error).strip() or type(error).__name__
    token = huggingface_hub.get_token()
    return (text.replace(token, "<token>") if token else text).splitlines()[0].rstrip(".")
