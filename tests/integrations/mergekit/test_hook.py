"""The start-up hook, in throw-away virtual environments: what a Python that has it does, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from tvbases_hf.errors import TvbasesError
from tvbases_mergekit import hook

REPOSITORY = Path(__file__).resolve().parents[3]
OURS = [str(REPOSITORY), str(REPOSITORY / "integrations")]
INSTALLED = sysconfig.get_path("purelib")

# The part of mergekit that matters: a package that imports its registry, and a registry with two questions.
MERGEKIT = {
    "mergekit/__init__.py": "",
    "mergekit/merge_methods/__init__.py": "from mergekit.merge_methods.registry import get, registered_methods",
    "mergekit/merge_methods/registry.py": """
        METHODS = {"linear": "mergekit's linear"}

        def get(name):
            try:
                return METHODS[name]
            except KeyError:
                raise RuntimeError(f"Unimplemented merge method {name}") from None

        def registered_methods():
            return tuple(METHODS)
    """,
}
OUR_METHODS = """
    def register():
        from mergekit.merge_methods import registry
        registry.METHODS["ae_bases"] = "our ae_bases"
"""


@dataclass(frozen=True)
class Environment:
    """A bare virtual environment; `add` makes packages importable the way an editable install does."""

    root: Path
    python: Path
    site_packages: Path

    def add(self, files: dict[str, str], pth: str = "zzz_editable.pth") -> Path:
        folder = self.root / Path(pth).stem
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
        (self.site_packages / pth).write_text(f"{folder}\n", encoding="utf-8")
        return folder

    def run(self, code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TVBASES"))}
        return subprocess.run(
            [str(self.python), "-c", textwrap.dedent(code), *arguments],
            env=clean | variables,
            capture_output=True,
            text=True,
            timeout=120,  # only so that a deadlock fails
            check=False,
        )

    def says(self, code: str, **variables: str) -> str:
        """What the code prints, in a Python that has nothing to complain about."""
        done = self.run(code, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    def tree(self) -> dict[str, bytes]:
        paths = sorted(self.site_packages.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    root = tmp_path / "environment"
    venv.EnvBuilder(symlinks=os.name != "nt").create(root)
    scheme = sysconfig.get_path("purelib", "venv", {"base": str(root), "platbase": str(root)})
    scripts = sysconfig.get_path("scripts", "venv", {"base": str(root), "platbase": str(root)})
    return Environment(root, Path(scripts) / ("python.exe" if os.name == "nt" else "python"), Path(scheme))


@pytest.fixture
def hooked(environment: Environment) -> Environment:
    """The hook, a small mergekit, and a package of ours whose path Python learns only after the hook's start."""
    environment.add(MERGEKIT, "zzz_mergekit.pth")
    environment.add({"tvbases_mergekit/__init__.py": OUR_METHODS})
    hook.install(environment.site_packages)
    return environment


def sys_with(**changes: object) -> SimpleNamespace:
    """`sys` as another interpreter would show it to the hook, and to the hook alone."""
    return SimpleNamespace(**{**vars(sys), **changes})


LIST = "from mergekit.merge_methods import registered_methods; print(*registered_methods())"
GET = "from mergekit.merge_methods import get; print(get('ae_bases'))"


# --- with the real packages


def test_plain_mergekit_finds_the_methods_if_and_only_if_the_hook_is_there_and_on(environment: Environment) -> None:
    pytest.importorskip("mergekit")
    paths = [INSTALLED, sysconfig.get_path("platlib"), *OURS]
    (environment.site_packages / "zzz.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n", encoding="utf-8")
    names = """
        from mergekit.merge_methods import registry
        print(*sorted(method.spec.name for method in registry.registered_methods()))
    """
    plan = """
        import mergekit.plan
        print(mergekit.plan.merge_methods.get("ae_bases").spec.name)
    """
    before = environment.says(names).split()
    hook.install(environment.site_packages)
    after = environment.says(names).split()
    assert "ae_bases" not in before
    assert "ae_bases" in after
    assert set(before) < set(after)
    assert environment.says(plan) == "ae_bases"
    assert environment.says(names, TVBASES_NO_HOOK="1").split() == before
    hook.remove(environment.site_packages)
    assert environment.says(names).split() == before


def test_the_commands_install_report_and_remove_the_hook_of_the_python_that_runs_them(environment: Environment) -> None:
    code = """
        import sys
        from tvbases_mergekit.hook import hook_app
        for command in sys.argv[1:]:
            print("$", command)
            hook_app([command], standalone_mode=False)
    """
    before = environment.tree()
    commands = ["status", "install", "status", "remove", "remove", "status"]
    done = environment.run(code, *commands, PYTHONPATH=os.pathsep.join([*OURS, INSTALLED]))
    assert done.returncode == 0, done.stderr
    answers = [answer.partition("\n")[2] for answer in done.stdout.split("$ ")[1:]]
    module = str(environment.site_packages / hook.MODULE_FILE)
    assert answers[0].startswith("not installed: ")
    assert f"wrote {module}\n" in answers[1]
    assert answers[2].startswith(f"installed: {environment.site_packages}\n")
    assert f"deleted {module}\n" in answers[3]
    assert answers[4].startswith("nothing to remove")
    assert answers[5] == answers[0]
    assert environment.tree() == before


# --- finding the methods


@pytest.mark.parametrize("code", [LIST, GET])
def test_a_package_that_python_finds_only_after_the_hook_is_still_registered(hooked: Environment, code: str) -> None:
    assert "ae_bases" in hooked.says(code)
    assert hooked.run(GET, TVBASES_NO_HOOK="1").returncode == 1
    assert hooked.says(LIST, TVBASES_NO_HOOK="1") == "linear"
    assert hooked.says(LIST, TVBASES_NO_HOOK="0") == "linear ae_bases"


def test_a_merge_with_a_method_of_mergekit_never_imports_our_package(hooked: Environment) -> None:
    code = """
        import sys
        from mergekit.merge_methods import get
        print(get("linear"), "tvbases_mergekit" in sys.modules)
    """
    assert hooked.says(code) == "mergekit's linear False"


def test_an_unknown_method_is_still_unknown_and_says_so_once(hooked: Environment) -> None:
    done = hooked.run("from mergekit.merge_methods import get; get('ae_basis')")
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.strip().endswith("RuntimeError: Unimplemented merge method ae_basis")


def test_registering_may_itself_ask_the_registry(hooked: Environment) -> None:
    """At its import, when it is half there, and while it registers, holding a lock that cannot be taken twice."""
    hooked.add(
        {
            "tvbases_mergekit/__init__.py": """
                import threading
                from mergekit.merge_methods import registry

                KNOWN = registry.registered_methods()
                lock = threading.Lock()

                def register():
                    with lock:
                        if "ae_bases" not in registry.registered_methods():
                            registry.METHODS["ae_bases"] = f"ours beside {KNOWN}"
            """
        }
    )
    ours = "ours beside ('linear',)"
    assert hooked.says(GET) == ours
    assert hooked.says(f"import tvbases_mergekit; tvbases_mergekit.register(); {GET}") == ours


def test_many_threads_register_once_and_all_find_the_method(hooked: Environment) -> None:
    hooked.add(
        {
            "tvbases_mergekit/__init__.py": """
                import time
                from mergekit.merge_methods import registry

                def register():
                    print("registering")
                    time.sleep(0.05)
                    registry.METHODS["ae_bases"] = "found"
            """
        }
    )
    code = """
        from concurrent.futures import ThreadPoolExecutor
        from mergekit.merge_methods import get
        with ThreadPoolExecutor(8) as pool:
            print(*pool.map(get, ["ae_bases"] * 8))
    """
    assert hooked.says(code).split() == ["registering"] + ["found"] * 8


def test_a_registry_that_is_loaded_again_is_extended_again(hooked: Environment) -> None:
    code = """
        import importlib
        from mergekit.merge_methods import registry
        print(*registry.registered_methods())
        print(*importlib.reload(registry).registered_methods())
    """
    assert hooked.says(code).splitlines() == ["linear ae_bases"] * 2


# --- doing no harm


def test_start_up_imports_nothing_but_the_hook_itself(environment: Environment) -> None:
    code = "import sys; print(*sys.modules)"
    before = set(environment.says(code).split())
    hook.install(environment.site_packages)
    assert set(environment.says(code).split()) - before == {hook.MODULE}


def test_python_starts_silently_and_mergekit_works_when_the_package_is_gone(hooked: Environment) -> None:
    (hooked.site_packages / "zzz_editable.pth").unlink()
    assert hooked.says("print('started')") == "started"
    assert hooked.says("from mergekit.merge_methods import get; print(get('linear'))") == "mergekit's linear"
    done = hooked.run(GET)
    warning, traceback, *_ = done.stderr.splitlines()
    assert hook.MODULE_FILE in warning and hook.PTH_FILE in warning
    assert traceback.startswith("Traceback") and done.stderr.strip().endswith("Unimplemented merge method ae_bases")


@pytest.mark.parametrize("damage", ["missing", "raises", "nonsense"])
def test_python_starts_silently_when_the_start_up_module_is_broken(hooked: Environment, damage: str) -> None:
    module = hooked.site_packages / hook.MODULE_FILE
    match damage:
        case "missing":
            module.unlink()
        case "raises":
            module.write_text("raise OSError('no')", encoding="utf-8")
        case "nonsense":
            module.write_bytes(b"\xff\x00 def (")
    assert hooked.says(LIST) == "linear"


@pytest.mark.parametrize("failure", ["def register(): raise ValueError('two\\nlines')", "import no_such_module", ""])
def test_if_registering_fails_one_line_says_so_and_mergekit_works(hooked: Environment, failure: str) -> None:
    hooked.add({"tvbases_mergekit/__init__.py": failure})
    done = hooked.run(f"{LIST}; {LIST}")
    assert (done.returncode, done.stdout) == (0, "linear\nlinear\n")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("tvbases hook: ")


def test_a_mergekit_with_another_registry_is_left_alone_with_one_line(hooked: Environment) -> None:
    hooked.add(
        {
            "mergekit/__init__.py": "",
            "mergekit/merge_methods/__init__.py": "import mergekit.merge_methods.registry",
            "mergekit/merge_methods/registry.py": "METHODS = {}",
        },
        "zzz_mergekit.pth",
    )
    done = hooked.run("from mergekit.merge_methods import registry; print(registry.METHODS)")
    assert (done.returncode, done.stdout) == (0, "{}\n")
    assert len(done.stderr.splitlines()) == 1


# --- coming and going


def test_installing_twice_is_installing_once(environment: Environment) -> None:
    first = hook.install(environment.site_packages)
    once = environment.tree()
    assert hook.install(environment.site_packages) == first
    assert environment.tree() == once


def test_remove_leaves_the_environment_as_it_was_before_install(environment: Environment) -> None:
    before = environment.tree()
    hook.install(environment.site_packages)
    environment.says("pass")  # Python writes its compiled copy
    assert list(environment.site_packages.glob(f"__pycache__/{hook.MODULE}.*.pyc"))
    removed = hook.remove(environment.site_packages)
    assert environment.tree() == before
    assert removed and not any(path.exists() for path in removed)
    assert hook.remove(environment.site_packages) == []


def test_remove_spares_what_others_compiled(environment: Environment) -> None:
    hook.install(environment.site_packages)
    other = environment.site_packages / "__pycache__" / "other.cpython-311.pyc"
    other.parent.mkdir(exist_ok=True)
    other.touch()
    hook.remove(environment.site_packages)
    assert other.exists()


def test_a_folder_that_cannot_be_written_is_one_clear_error_and_stays_as_it_is(
    environment: Environment, tmp_path: Path
) -> None:
    no_folder = tmp_path / "file"
    no_folder.write_text("not a folder", encoding="utf-8")
    with pytest.raises(TvbasesError, match="mergekit-yaml"):
        hook.install(no_folder)

    before = environment.tree()
    blocked = environment.site_packages / hook.PTH_FILE
    blocked.mkdir()  # the second file cannot be written: the first must go again
    with pytest.raises(TvbasesError, match="mergekit-yaml"):
        hook.install(environment.site_packages)
    blocked.rmdir()
    assert environment.tree() == before


def test_a_python_that_reads_no_start_up_files_where_it_installs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook.site, "getsitepackages", lambda: ["/nowhere"])
    monkeypatch.setattr(hook.site, "ENABLE_USER_SITE", False)
    with pytest.raises(TvbasesError, match="reads no start-up files"):
        hook.install()


# --- Python 3.15: .start files


def test_every_python_gets_one_start_up_file_and_the_forms_share_their_stem(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stem, so that a Python which reads both forms ignores the older one (PEP 829)."""
    assert Path(hook.PTH_FILE).stem == Path(hook.START_FILE).stem
    for version, startup_file in [((3, 10), hook.PTH_FILE), ((3, 15), hook.START_FILE), ((3, 14), hook.PTH_FILE)]:
        monkeypatch.setattr(hook, "sys", sys_with(version_info=version))
        hook.install(environment.site_packages)
        present = {name for name in hook.FILES if (environment.site_packages / name).exists()}
        assert present == {hook.MODULE_FILE, startup_file}


def test_both_start_up_forms_together_watch_once(hooked: Environment) -> None:
    (hooked.site_packages / hook.START_FILE).write_text(hook.START_LINE, encoding="utf-8")
    code = f"""
        import pkgutil, sys
        pkgutil.resolve_name({hook.START_LINE.strip()!r})()
        print(sum(type(finder).__name__ == "RegistryFinder" for finder in sys.meta_path))
    """
    assert hooked.says(code) == "1"


# --- status


def test_status_tells_the_states_apart(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    where = environment.site_packages

    def state() -> str:
        found = hook.status(where)
        assert (found.where, found.files) == (where, tuple(where / n for n in hook.FILES if (where / n).exists()))
        return found.state

    assert state() == "not installed"
    hook.install(where)
    assert state() == "installed"

    with monkeypatch.context() as patch:
        patch.setattr(hook.metadata, "version", lambda name: "9.9.9")
        assert state() == "installed for another version"
    with monkeypatch.context() as patch:
        patch.setattr(hook, "sys", sys_with(prefix="/another/environment"))
        assert state() == "installed for another interpreter"

    (where / hook.MODULE_FILE).unlink()
    assert state() == "damaged"
    hook.install(where)
    assert state() == "installed"
    (where / hook.PTH_FILE).unlink(missing_ok=True)
    (where / hook.START_FILE).unlink(missing_ok=True)
    assert state() == "damaged"
    hook.remove(where)
    assert state() == "not installed"


def test_status_finds_a_hook_that_this_python_reads_from_another_folder(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook.site, "getsitepackages", lambda: [str(environment.site_packages), str(tmp_path)])
    assert hook.status(environment.site_packages).state == "not installed"
    hook.install(tmp_path)
    found = hook.status(environment.site_packages)
    assert (found.state, found.where) == ("installed for another interpreter", tmp_path)


def test_installing_the_package_hooks_nothing() -> None:
    installed = {path.name for path in metadata.files("tvbases-hf") or ()}
    assert installed  # otherwise this says nothing
    assert installed.isdisjoint(hook.FILES)
