"""The installed version."""

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    try:
        return version("tvbases-hf")
    except PackageNotFoundError:
        return "unknown"
