"""The merge methods of this package, made known to mergekit."""

from __future__ import annotations

from tvbases_hf.errors import MissingExtraError

from .light import import_mergekit

# Of the methods in tvbases_hf.methods, those that a YAML has from mergekit, with mergekit's own parameters.
MERGEKITS = frozenset({"task_arithmetic", "ties"})


def register() -> None:
    """Make the methods known to mergekit in this process; calling it again changes nothing.

    Raises MissingExtraError when mergekit is absent or of another API (it was rewritten in 0.1.5).
    """
    try:
        import_mergekit()
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import GroupMergeMethod  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f'mergekit 0.1.5 or later is needed ({error}); pip install "tvbases-hf[mergekit]"'
        ) from error
    from .methods import build_methods
    from .registered import missing_methods

    known = {method.spec.name for method in registry.registered_methods()}
    missing = missing_methods(known)
    for method in (*missing, *build_methods((*registry.registered_methods(), *missing))):
        if method.spec.name not in known:
            registry.register(method)
