"""The model hub: fetch a snapshot, or say why it cannot be had."""

from pathlib import Path
from typing import Any

from hildanext.core.errors import ModelError

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""No pickles, no code."""
SECONDS = 10.0


class Unreachable(ModelError):
    """The hub did not answer, and its cache on this machine does not hold the model."""


def snapshot(repository: str, hint: str, target: Path | None = None) -> Path:
    """The folder of a hub repository: from the hub's own cache, else downloaded (into `target` where given).

    Raises `ModelError` where the hub has no such model or refuses it, `Unreachable` where it cannot be asked. An
    interrupted download is never taken for a whole one, because every folder is checked before loading.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where: dict[str, Any] = {} if target is None else {"local_dir": str(target)}
    try:
        folder = Path(snapshot_download(repository, allow_patterns=WANTED, etag_timeout=SECONDS, **where))
    except LocalEntryNotFoundError:
        raise Unreachable(f"model {repository!r} is not here and the hub cannot be reached", hint) from None
    except HfHubHTTPError as problem:
        status = getattr(problem.response, "status_code", None)
        if status in (401, 404):
            raise ModelError(f"the hub has no model {repository!r}, or it needs a login", hint) from None
        raise Unreachable(f"the hub refuses {repository!r} (status {status})", hint) from None
    except (HFValidationError, OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0][:160] if str(problem) else type(problem).__name__
        raise Unreachable(f"cannot fetch {repository!r} ({reason})", hint) from None
    if not (folder / "config.json").is_file():  # an unreachable hub may leave the empty target folder as it is
        raise Unreachable(f"the hub did not deliver {repository!r}", hint)
    return folder
