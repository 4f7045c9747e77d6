"""The benchmarks still run: with tiny inputs, and without looking at the clock."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from zoo.demo_miniature import MINIATURE, small_base
from zoo.trained_adapters import trained_adapters

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the script that the test is parametrised with."""
    monkeypatch.syspath_prepend(BENCHMARKS)  # where a script finds its neighbours
    name = f"bench_{request.param}"
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.mark.parametrize("bench", ["ae"], indirect=True)
def test_bench_of_autoencoder_bases_reports_every_solver(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SIZES", ((4, 2), (5, 3), (200, 50)))
    monkeypatch.setattr(bench, "real_gram", lambda: None)
    bench.main(["--quick", "--json", str(tmp_path / "x.json")])
    rows = json.loads((tmp_path / "x.json").read_text())
    assert len(rows) == 2 * len(bench.KINDS) * len(bench.SOLVERS)
    assert all(row["excess"] <= 1e-12 for row in rows if row["solver"] == "varpro, balanced")
    assert "varpro, free" in capsys.readouterr().out


@pytest.mark.parametrize("bench", ["constructions"], indirect=True)
def test_bench_of_constructions_says_what_each_loses_at_equal_bytes(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gram = bench.synthetic_gram("groups", 6)
    monkeypatch.setattr(bench, "cases", lambda: [("six", gram, 1), ("six", gram, 3)])
    rows = bench.main(["--json", str(tmp_path / "x.json")])
    assert rows == json.loads((tmp_path / "x.json").read_text())
    assert len(rows) == 2 * len(bench.KINDS) - 1, "there is no PCA of one stored vector, which is the mean"
    for row in rows:
        assert 0 <= row["tasks"] <= row["worst"] < 1 + 1e-6 and 0 <= row["sum"] <= 1
        if row["bases"] == "autoencoder, balanced":
            assert row["sum"] < 1e-12 and row["convex"]
    # the sum of the bases and of all tasks, from the inner products of vectors that have this Gram matrix
    bases = bench.bases_of("random choice", gram, 3)
    chosen = bases.encoder.sum(1)
    cosine = float(chosen @ gram.sum(1)) ** 2 / float(chosen @ gram @ chosen) / float(gram.sum())
    assert next(r for r in rows[len(bench.KINDS) - 1 :] if r["bases"] == "random choice")["sum"] == pytest.approx(
        1 - cosine
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("bench", ["memory"], indirect=True)
def test_bench_of_memory_measures_processes_and_removes_its_models(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "QUICK", {"tiny": bench.Shape(64, 128, 1, key_value=64, vocabulary=512)})
    every = bench.commands
    kept = ("start-up", "load", "gram")
    monkeypatch.setattr(bench, "commands", lambda *given: {job: every(*given)[job] for job in kept})
    rows = bench.main(["--quick", "--workdir", str(tmp_path)])
    assert [row["job"] for row in rows] == list(kept)
    assert all(row["peak"] > 10**7 for row in rows)
    assert list(tmp_path.iterdir()) == []
    assert "share of load" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such module"):
        bench.measure([sys.executable, "-c", "raise SystemExit('no such module')"])


@pytest.mark.parametrize("bench", ["adapter_basis"], indirect=True)
def test_bench_of_adapter_bases_compares_the_methods_for_both_kinds_of_seeds(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = {
        mode: trained_adapters(tmp_path / mode, one_seed=mode == "same", steps=10, hidden=32) for mode in bench.MODES
    }
    monkeypatch.setattr(bench, "train", lambda *given: (tmp_path / "same" / "base", adapters))
    bench.main(["--quick", "--json", str(tmp_path / "x.json")])
    report = json.loads((tmp_path / "x.json").read_text())
    same, different = (report[mode]["errors"]["0.75"] for mode in bench.MODES)
    assert same["chosen"] == "joint" and same["joint"] < 0.8 * same["tsv"]
    assert different["chosen"] == "tsv" or different["joint"] > 0.8 * different["tsv"]
    assert "same seed: " in capsys.readouterr().out


@pytest.mark.parametrize("bench", ["arithmetic"], indirect=True)
def test_bench_of_arithmetic_fills_its_table_and_shows_what_must_hold(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_base(tmp_path / "demo" / "base")
    monkeypatch.setattr(bench, "SETTINGS", MINIATURE)
    short = {"localize": {"epochs": 1}, "atlas": {"epochs": 1}, "atlas_nonnegative": {"epochs": 1}}
    short |= {name: {"steps": 1} for name in ("adamerging", "adamerging_task")}
    monkeypatch.setattr(bench, "QUICK_OPTIONS", short)
    bench.main(["--quick", "--num-bases", "2", "--workdir", str(tmp_path / "demo"), "--json", str(tmp_path / "x.json"),
                "--methods", *bench.ROWS])  # fmt: skip
    report = json.loads((tmp_path / "x.json").read_text())
    columns = report["columns"]
    assert list(columns) == ["all vectors", "AE", "PCA", "RandSelect"]
    for column in columns.values():
        assert list(column) == list(columns["AE"]) and set(bench.ROWS) <= set(column)
        assert {"fisher, scaled", "regmean, scaled", "localize, scaled"} <= set(column)
        assert all(len(cell["accuracy"]) == 3 and cell["mean"] > 0 for cell in column.values())
        assert 0 < column["localize"]["bytes"] < column["fisher"]["bytes"]
    assert columns["AE"]["fisher"]["bytes"] == 2 * columns["all vectors"]["fisher"]["bytes"] // 3
    assert "normalised accuracy" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("bench", ["online"], indirect=True)
def test_bench_of_online_bases_measures_every_addition_and_removes_its_models(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "TASKS", 20)
    monkeypatch.setattr(bench, "METHODS", ("ae", "ta"))
    monkeypatch.setattr(bench, "measure", bench.measured)
    write = bench.write_models
    monkeypatch.setattr(bench, "write_models", lambda directory, *_: write(directory, 1, 16))
    rows = bench.main(["--quick", "--workdir", str(tmp_path)])
    assert [row["method"] for row in rows] == ["ae", "ta"]
    for row in rows:
        assert len(row["steps"]) == 20
        assert row["steps"][4]["vectors"] == row["steps"][-1]["vectors"]
        assert row["cosine with the sum"] > 0.999
    assert list(tmp_path.iterdir()) == []
    assert "s a task" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="asks the system what a process used")
@pytest.mark.parametrize("bench", ["mix_styles"], indirect=True)
def test_bench_of_style_mixing_measures_a_process_and_agrees_with_the_dense_route(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench.main(["--quick", "--count", "2", "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert found["peak"] > 10**7 and found["one_weight"]["apart"] < 1e-5
    assert "linear layers" in capsys.readouterr().out


@pytest.mark.parametrize("bench", ["live_scales"], indirect=True)
def test_bench_of_live_scales_times_every_method_beside_a_merge_made_anew(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench.main(["--quick", "--count", "2", "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert set(found) == set(bench.METHODS) and all(row["cpu_seconds"] > 0 for row in found.values())
    assert "every merge anew" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("bench", ["llama"], indirect=True)
def test_bench_of_llama_shapes_measures_what_the_plan_says(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = bench.Shape(hidden=64, intermediate=128, layers=1, key_value=64, vocabulary=500)
    monkeypatch.setattr(bench, "QUICK", tiny)
    file = tmp_path / "x.json"
    bench.main(["--quick", "--only", "gram", "--only", "compress", "--workdir", str(tmp_path), "--json", str(file)])
    report = json.loads(file.read_text())
    numbers = sum(math.prod(shape) for shape in tiny.tensors().values())
    assert report["bytes"] == 5 * 2 * numbers
    for job, passes in (("gram", 1), ("compress", 2)):
        figures = report["plans"][job]
        assert figures["read"]["plan"] == figures["read"]["measured"] == passes * report["bytes"]
        assert figures["written"]["plan"] == figures["written"]["measured"]
        assert figures["memory"]["ratio"] == figures["memory"]["measured"] / figures["memory"]["plan"]
        assert figures["memory"]["measured"] == report["jobs"][job]["process"] > 10**7
    assert report["plans"]["compress"]["written"]["measured"] > 2 * 2 * numbers
    printed = capsys.readouterr().out
    assert "measured : planned" in printed and "compress" in printed
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("bench", ["llama"], indirect=True)
def test_bench_of_llama_shapes_compares_every_pair_and_sees_a_difference(bench: ModuleType, tmp_path: Path) -> None:
    out, methods = tmp_path / "out", list(bench.CHOSEN)
    chosen = bench.chosen_jobs(tmp_path, out, methods, tmp_path / "before")
    assert chosen.keys() - bench.chosen_jobs(tmp_path, out, methods, None).keys() == {f"{m}, before" for m in methods}
    known = bench.jobs(tmp_path, out).keys() | chosen.keys()
    assert {
        *bench.RATIOS,
        *bench.RATIOS.values(),
        *bench.PLANS,
        *(job for pair in bench.EQUAL for job in pair),
    } <= known
    assert all(f"{method}, native" in known for method in bench.METHODS)
    tiny = bench.Shape(hidden=64, intermediate=128, layers=1, key_value=64, vocabulary=500)
    for seed in (0, 1):
        bench.write_model(tmp_path / str(seed), tiny, seed)
    assert bench.difference(tmp_path / "0", tmp_path / "0") == {"ulps": 0, "share": 0}
    apart = bench.difference(tmp_path / "0", tmp_path / "1")
    assert apart["ulps"] > 0 and 0 < apart["share"] < 1


@pytest.mark.parametrize("bench", ["layers"], indirect=True)
def test_bench_of_layers_compares_every_shape_with_the_full_decomposition(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "REFERENCE_SIDE", 400)
    file = tmp_path / "x.json"
    bench.main(["--quick", "--all-layers", "--device", "cpu", "--json", str(file)])
    report = json.loads(file.read_text())
    assert [row["layer"] for row in report["rows"]] == [layer for layer in bench.LAYERS for _ in bench.METHODS]
    for row in report["rows"]:
        affordable = row["method"] in ("TSV-Merge", "Iso-C") or row["rows"] <= 400
        assert (row["ratio"] is not None) == (row["relative_difference"] is not None) == affordable
        if affordable:
            assert row["ratio"] == row["reference_seconds"] / row["seconds"] and row["ratio_cpu"] > 0
            assert row["relative_difference"] < 1e-4
        assert 0 < sum(row["shares"].values()) <= 1 and row["gflops"] > 0
    assert {row["ratio"] is None for row in report["rows"]} == {True, False}
    assert set(report["whole"]["seconds"]) == set(bench.METHODS) and report["plain_gflops"] > 0
    assert "all layers, total time of DeVec" in capsys.readouterr().out


@pytest.mark.parametrize("bench", ["layers"], indirect=True)
def test_bench_of_layers_counts_all_matrices_of_a_model(bench: ModuleType) -> None:
    for shape, parameters in ((bench.LLAMA_1B, 1_235_814_400), (bench.LLAMA_8B, 8_030_261_248)):
        numbers = sum(rows * columns * count for rows, columns, count in bench.matrices(shape).values())
        norms = sum(size[0] for size in shape.tensors().values() if len(size) == 1)
        assert numbers + norms == parameters  # of the published models
    assert bench.matrices(bench.LLAMA_8B)["embedding"] == (128_256, 4096, 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("bench", ["extract"], indirect=True)
def test_bench_of_extraction_compares_the_errors_of_both_programs(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "QUICK", bench.Shape(64, 128, 1, key_value=64, vocabulary=512))
    rows = bench.main(["--quick", "--rank", "4", "--workdir", str(tmp_path), "--json", str(tmp_path / "x.json")])
    assert [row["program"] for row in rows] == ["mergekit-extract-lora", "tvbases extract"]
    assert all(row["least"] <= row["error"] < 1.05 * row["least"] for row in rows)
    assert json.loads((tmp_path / "x.json").read_text()) == rows and "ours over theirs" in capsys.readouterr().out


@pytest.mark.parametrize("bench", ["library"], indirect=True)
def test_bench_of_libraries_adds_one_adapter_beside_the_others(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "alone", lambda command, request: bench.ours(request))  # for the memory alone
    size = ["--count", "4", "--layers", "1", "--families", "1", "--budget", "0.5"]
    bench.main([*size, "--workdir", str(tmp_path / "work"), "--json", str(tmp_path / "a.json")])
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["share"] < 0.52 and row["others_unchanged"] and row["error"] < 0.01
    monkeypatch.setattr(bench.Comparison, "rival", lambda *_: {**row, "package": "rival", "share": 0.4, "error": 0.5})
    folder = ["--adapters", str(tmp_path / "work"), "--base", str(tmp_path / "work" / "base"), "--budgets", "0.5"]
    shutil.rmtree(tmp_path / "work" / "made")
    rivals = ["--rivals", "python", "--components", "rival=1", "--json", str(tmp_path / "b.json")]
    bench.main([*folder, *rivals])
    bench.main(["--write", str(tmp_path / "page.md"), str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    page = (tmp_path / "page.md").read_text()
    assert "## 4 planted adapters" in page and "Our error is at most a tenth of theirs at 1 of 1 shares." in page
    assert "tvbases-hf, 4 bits" in capsys.readouterr().out


@pytest.mark.parametrize("bench", ["gpu"], indirect=True)
def test_bench_of_a_gpu_compares_what_every_command_writes(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the CPU with itself: nothing differs, and a difference would be seen."""
    monkeypatch.setattr(bench, "MERGES", {name: bench.MERGES[name] for name in ("tsv", "ae_bases, iso_c")})
    monkeypatch.setattr(bench, "TIMED_MERGES", ("tsv",))
    report = bench.main(["--device", "cpu", "--quick", "--json", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text())["device"] == "cpu"
    commands = {row["command"].partition(":")[0] for row in report["equality"]}
    assert commands == {"merge", "inspect", "compress", "decompose", "extract"}
    assert all(row["difference"] == 0 for row in report["equality"])
    assert {row["method"] for row in report["layers"]} == {"TSV-Merge", "DeVec", "Iso-C"}
    ones = torch.ones(3, 3)
    assert bench.difference({"a": 1.001 * ones}, {"a": ones}) > bench.TOLERANCE
    assert bench.difference({"a": 1.001 * ones.bfloat16()}, {"a": ones.bfloat16()}) <= bench.TOLERANCE
    with pytest.raises(SystemExit, match="other tensors"):
        bench.difference({"a": ones}, {"b": ones})


@pytest.mark.parametrize("bench", ["scaling"], indirect=True)
def test_bench_of_scaling_fits_the_exponent_of_every_series(bench: ModuleType, tmp_path: Path) -> None:
    assert math.isclose(bench.exponent([1, 2, 4, 8], [9.0, 9.0, 32.0, 256.0]), 3.0)
    report = bench.main(["--quick", "--json", str(tmp_path / "report.json")])
    assert {row["variable"] for row in report} == {"T", "M", "n", "r", "rows", "tensors"}
    assert all(len(row["points"]) == len(row["sizes"]) and math.isfinite(row["exponent"]) for row in report)
    assert json.loads((tmp_path / "report.json").read_text())[0]["work"] == report[0]["work"]
