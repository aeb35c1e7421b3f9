"""Pushes an exported folder to a model hub."""

from pathlib import Path

from ddmd_jax.util.text import first_line


class PushError(RuntimeError):
    """The hub did not take it; the folder is as it was."""


def push(folder: Path, name: str, private: bool) -> str:
    """Uploads `folder` as the model ``owner/name``, made if need be; its address.

    Raises:
      PushError: no network, no login, no such owner.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message='ddmd_jax.export')
    except Exception as e:  # network, login and naming errors have no common ancestor
        raise PushError(f'{name} cannot be pushed ({first_line(e)}); {folder} is complete: check '
                        f'the name, the network and your login (hf auth login), then '
                        f'`hf upload {name} {folder}`') from e
    return f'{api.endpoint}/{name}'
