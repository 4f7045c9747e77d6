"""Makes plain mergekit find the merge methods of tvbases-hf: `tvbases hook install` copies this file to site-packages.

Why a copy and not an import from the package: what Python runs at start-up must never fail and must cost nothing. The
package may be uninstalled, may import torch, or may belong to an editable install whose own start-up file is read after
ours. The copy needs nothing but `os` and `sys`, and looks for the package only when it is wanted.

Why it is wanted when mergekit is asked for a method, and not when mergekit's registry is imported: at that moment
mergekit is half imported, and `tvbases_mergekit` may need the other half. And a merge with a method of mergekit's own
never imports us.
"""

import os
import sys

REGISTRY = "mergekit.merge_methods.registry"
PACKAGE = "tvbases_mergekit"


def start() -> None:
    """Watch for the import of mergekit's registry. Called at every start of Python; calling it twice is harmless."""
    switched_off = os.environ.get("TVBASES_NO_HOOK", "") not in ("", "0")
    if not switched_off and not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegistryFinder())


class RegistryFinder:
    """Finds one module, mergekit's registry, where the other finders find it, and extends it once it has loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != REGISTRY:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, RegistryFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _extend_after_loading(spec.loader)
                return spec
        return None


def _extend_after_loading(loader) -> None:
    execute = loader.exec_module

    def exec_module(module) -> None:
        execute(module)
        if module.__name__ == REGISTRY:
            try:
                _extend(module)
            except Exception as error:
                _warn(f"this mergekit has another registry than 0.1.5 ({error!r}); the hook does nothing")

    try:
        # On the instance, so that the loader stays what it is for everything that looks at its type.
        loader.exec_module = exec_module
    except Exception as error:
        _warn(f"cannot extend mergekit's registry ({error!r}); the hook does nothing")


def _extend(registry) -> None:
    """Replace the registry's two questions by ones that register our methods before they answer "unknown"."""
    import functools
    import threading

    get, registered_methods = registry.get, registry.registered_methods
    lock = threading.Lock()
    done = False

    def register_once() -> None:
        nonlocal done
        if done or _asked_by_ourselves():
            return
        with lock:
            if not done:
                _register()
                done = True

    @functools.wraps(get)
    def get_or_register(*args, **kwargs):
        try:
            return get(*args, **kwargs)
        except Exception:
            pass  # mergekit does not know it, or the call is wrong: the second call says so
        register_once()
        return get(*args, **kwargs)

    @functools.wraps(registered_methods)
    def registered_methods_and_ours(*args, **kwargs):
        register_once()
        return registered_methods(*args, **kwargs)

    registry.get, registry.registered_methods = get_or_register, registered_methods_and_ours


def _asked_by_ourselves() -> bool:
    """Whether the question comes from our package, which may be half imported or in the middle of registering."""
    frame = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE:
            return True
        frame = frame.f_back
    return False


def _register() -> None:
    try:
        import tvbases_mergekit

        tvbases_mergekit.register()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == PACKAGE:
            stem = __name__.lstrip("_")
            _warn(
                "tvbases-hf is not installed here any more, but its start-up hook is: install it again, or delete "
                f"{__file__} and {stem}.pth or {stem}.start beside it"
            )
        else:
            _warn(f"the merge methods of tvbases-hf are not available: {type(error).__name__}: {error}")


def _warn(message: str) -> None:
    import logging

    logging.getLogger(PACKAGE).warning("tvbases hook: %s", " ".join(message.split()))
