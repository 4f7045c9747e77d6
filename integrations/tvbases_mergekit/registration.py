"""The merge methods of this package, made known to mergekit."""

from __future__ import annotations

from tvbases_hf.errors import MissingExtraError


def register() -> None:
    """Make the methods known to mergekit in this process; calling it again changes nothing.

    Raises MissingExtraError when mergekit is absent or of another API (it was rewritten in 0.1.5).
    """
    try:
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import GroupMergeMethod  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f'mergekit 0.1.5 or later is needed ({error}); pip install "tvbases-hf[mergekit]"'
        ) from error
    from .layerwise import LAYERWISE
    from .methods import build_methods

    known = {method.spec.name for method in registry.registered_methods()}
    others = (*registry.registered_methods(), *(method for method in LAYERWISE if method.spec.name not in known))
    for method in (*LAYERWISE, *build_methods(others)):
        if method.spec.name not in known:
            registry.register(method)
