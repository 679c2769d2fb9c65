"""Lookup of the cluster's shared authentication token. The token is sent only in the request header."""

import os
from collections.abc import Mapping
from pathlib import Path

from parcelray.errors import UserError

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
TOKEN_PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
MODE_VARIABLE = "RAY_AUTH_MODE"


def find_token(environment: Mapping[str, str] | None = None) -> str | None:
    """Finds the token in Ray's order: RAY_AUTH_TOKEN, then the file RAY_AUTH_TOKEN_PATH, then `~/.ray/auth_token`.

    Args:
        environment: environment variables to read; None: those of this process.

    Returns:
        The token; None if there is no token, or if RAY_AUTH_MODE is `disabled`.

    Raises:
        UserError: the file in RAY_AUTH_TOKEN_PATH cannot be read or is empty.
    """
    variables = os.environ if environment is None else environment
    if variables.get(MODE_VARIABLE, "").lower() == "disabled":
        return None
    if token := variables.get(TOKEN_VARIABLE, "").strip():
        return token
    if named := variables.get(TOKEN_PATH_VARIABLE):
        return _read_named(Path(named).expanduser())
    default = Path(variables.get("HOME") or Path.home()) / ".ray" / "auth_token"
    return (default.read_text().strip() or None) if default.is_file() else None


def auth_headers(token: str | None) -> dict[str, str]:
    """Builds the authorization header for Ray's dashboard; empty without a token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def _read_named(path: Path) -> str:
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise UserError(
            f"{TOKEN_PATH_VARIABLE}={path} cannot be read ({error.strerror}); set it to the path of the cluster's token"
            " file or unset it."
        ) from error
    if not token:
        raise UserError(
            f"{TOKEN_PATH_VARIABLE}={path} is an empty file; write the cluster's token to it or unset the variable."
        )
    return token
