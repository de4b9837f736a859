"""The model hub: fetch a snapshot, or say why it cannot be had."""

from pathlib import Path

from hildanext.errors import ModelError

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""No pickles, no code."""
SECONDS = 10.0


def snapshot(repository: str, hint: str, target: Path | None = None) -> Path:
    """The folder of a hub repository: from the hub's own cache, else downloaded (into `target` where given).

    Raises `ModelError` where the hub cannot be reached or has no such model; an interrupted download is
    never taken for a whole one, because the folder is checked again before loading.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = {} if target is None else {"local_dir": str(target)}
    try:
        return Path(snapshot_download(repository, allow_patterns=WANTED, etag_timeout=SECONDS, **where))
    except LocalEntryNotFoundError:
        raise ModelError(f"model {repository!r} is not here and the hub cannot be reached", hint) from None
    except HfHubHTTPError as problem:
        status = getattr(problem.response, "status_code", "no answer")
        raise ModelError(f"the hub refuses {repository!r} (status {status})", hint) from None
    except (HFValidationError, OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0][:160] if str(problem) else type(problem).__name__
        raise ModelError(f"cannot fetch {repository!r} ({reason})", hint) from None
