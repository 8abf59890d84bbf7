"""Mistakes of the user, as exceptions with a message worth reading.

Every error that a user can cause is a `UserError`: its message says what was wrong, where, what was
expected and what to do. The command line prints the message alone and exits with code 2.
"""

from __future__ import annotations

import importlib.util


class UserError(Exception):
    """Something the user gave cannot be used; `str(error)` is the whole explanation."""


class ConfigError(UserError):
    """The YAML file or an override is wrong."""


class DataError(UserError):
    """A data file, its cells, genes or labels cannot be used."""


class ModelError(UserError):
    """A checkpoint or model folder cannot be used, or does not fit what was asked."""


class PluginError(UserError):
    """A package that adds to scModelForge is missing, cannot be imported, or does not say what it must."""


class MissingExtraError(UserError):
    """An optional package is needed and not installed."""


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Raise `MissingExtraError` unless `package` can be imported; costs no import."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"{purpose} needs the package '{package}', which is not installed.\n"
            f"Install it with: pip install 'scmodelforge[{extra}]' (in a clone of the repository: '.[{extra}]')"
        )
