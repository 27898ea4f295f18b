"""Packages of requirements-extra.txt, which only some tools need, are imported through here."""

import importlib
from types import ModuleType

from common.config import UserError


def require(name: str) -> ModuleType:
    """The module `name` of an extra package. Raises UserError if the package is not installed."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is there, but one that it needs is missing
            raise
        raise UserError(
            f"{package} is not installed; run make extra, or pip install -r requirements-extra.txt"
        ) from error
