"""The benchmarks in their quick form, as processes: all must agree before anything is timed. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ahead_of_time
import chart
import learn
import memory
import packed
import pytest
from measure import PYTHONS
from run import GOALS, judged
from worker import PROGRAMS

from convert import MixerConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", *map(str, arguments)]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles faster
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("part", "names", "tolerance"),
    [
        ("forward", {"mixer_jax", "nnx_jit", "linen", "torch_model"}, 1e-5),  # 4.5e-7 measured
        pytest.param("train", {"mixer_jax", "mixer_jax_remat", "linen"}, 1e-4, marks=pytest.mark.heavy),  # 1e-7 measured
        pytest.param("exported", {"mixer_jax", *PROGRAMS}, 1e-5, marks=pytest.mark.heavy),  # 6e-7 measured
    ],
)
def test_all_implementations_agree_and_are_timed(tmp_path, part, names, tolerance):
    process = run(part, "--results", tmp_path)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / f"{part}.json").read_text())
    assert {row["implementation"] for row in results["rows"]} == names
    for row in results["rows"]:
        assert row["relative_difference"] <= tolerance
        assert row["median_s"] > 0
        assert row["versions"]["numpy"]
    machine = results["machine"]
    assert (machine["threads"], machine["device"][:3]) == (os.cpu_count(), "CPU")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("part", "name"),
    [
        pytest.param("forward", "linen", marks=pytest.mark.heavy),
        ("forward", "torch_model"),
        pytest.param("exported", "openvino_file", marks=pytest.mark.heavy),
    ],
)
def test_an_implementation_that_computes_something_else_stops_the_run_before_it_is_timed(tmp_path, part, name):
    process = run(part, "--results", tmp_path, "--plant", name)
    assert process.returncode == 1
    assert f"error: {part}: logits differ by more than 1e-05 relative to max abs: {name} by" in process.stderr
    assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_does_not_exist_is_a_usage_error(tmp_path):
    process = run("backward", "--results", tmp_path)
    assert process.returncode == 2
    assert "no part is called backward: there are forward, bfloat16" in process.stderr


def test_a_second_process_compiles_nothing_where_the_compilation_cache_is_on(tmp_path):
    process = run("cache", "--results", tmp_path)
    assert process.returncode == 0, process.stderr
    first, second = ((r["cache_hits"], r["cache_misses"]) for r in json.loads((tmp_path / "cache.json").read_text())["rows"])
    assert first[0] == 0 < first[1]
    assert second == (first[1], 0)


def test_every_goal_is_judged_by_the_rows_of_its_file():
    for part in GOALS:
        results = json.loads((RESULTS / f"{part}.json").read_text())
        goals = judged(part, results["rows"])
        assert goals == results["goals"]
        assert goals
        turned = [row | {goal["figure"]: -goal["value"] for goal in goals if goal["figure"] in row} for row in results["rows"]]
        assert [g["reached"] for g in judged(part, turned)] == [g["relation"] == "<=" for g in goals]


def test_the_tables_and_claims_of_the_page_are_those_that_runs_wrote():
    page = (ROOT / "docs" / "performance.md").read_text()
    computed = json.loads((RESULTS / "ahead_of_time.json").read_text())
    tables = [table(RESULTS) for table in (chart.table, chart.table_of_work, chart.table_of_missed_goals)]
    assert all(table in page for table in [*tables, ahead_of_time.tables(computed)])
    gradients = MixerConfig.named("B/16").replace(num_blocks=1).num_parameters  # of one block and of what is outside the blocks
    for row in computed["data_parallel"]:
        elements = {kind: sum(elements) for kind, elements in row["collectives"].items()}
        assert elements == ({} if row["target"] == "cpu:1" else {"all-reduce": gradients + 1})  # and the loss


@pytest.mark.device("libtpu", "v5e")
@pytest.mark.heavy
def test_memory_in_its_quick_form_counts_a_step_on_one_chip_and_on_sixteen(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "--quick", "--json", tmp_path / "memory.json"]
    for again in (False, True):
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert ("S/32 sgd" in process.stdout) != again  # the second run compiles nothing
    one, sixteen = json.loads((tmp_path / "memory.json").read_text())["rows"]
    for row in (one, sixteen):
        assert row["bytes"] == row["arguments"] + row["outputs"] - row["aliased"] + row["temporaries"]
        assert 0 < row["outputs"] - row["aliased"] < 2**16  # metrics: the state is written in place
    assert sixteen["outputs"] < one["outputs"]


def test_the_largest_batch_is_on_the_line_through_two_that_are_compiled():
    rows = [{"batch": batch, "bytes": 1000 + 10 * batch} for batch in (32, 64)]
    assert memory.largest(rows, 8, 2000) == 96
    assert memory.largest(rows, 16, 2159) == 112


def test_the_tables_of_memory_are_those_that_a_run_wrote():
    page = (ROOT / "docs" / "performance.md").read_text()
    computed = json.loads((RESULTS / "memory.json").read_text())
    assert all(table in page for table in memory.tables(computed).split("\n\n"))


@pytest.mark.heavy
def test_learning_in_its_quick_form_writes_every_part(tmp_path):
    pytest.importorskip("grain")  # the extra `train`
    command = [sys.executable, ROOT / "benchmarks" / "learn.py", "--quick", "--json", tmp_path / "learn.json"]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "learn.json").read_text())
    ours, *peers = results["fashion"]["rows"]
    assert [peer["implementation"] for peer in peers] == ["timm"] * PYTHONS["peers"].exists()
    assert all(peer["parameters"] == ours["parameters"] for peer in peers)
    assert {row["start"] for row in results["transfer"]["rows"]} == {"pretraining", "fine-tuned", "from scratch"}
    assert [row["steps"] for row in results["resolution"]["rows"]] == [4, 0, 4, 4]
    for part, rows in ((part, figures["rows"]) for part, figures in results.items()):
        assert learn.judged(part, rows) == results[part]["goals"]
        for row in rows:
            assert row["accuracy"] == pytest.approx(
                row["correct"] / row["images"] if "correct" in row else row["accuracies"][0]
            )


def test_learning_without_the_images_names_the_package(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "learn.py", "fashion", "--data", tmp_path / "none"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert (
        process.stderr
        == f"error: no folder {tmp_path / 'none'}: apt install dataset-fashion-mnist, or name another with --data\n"
    )


def test_the_goals_of_learning_are_judged_by_the_rows_of_its_file():
    results = json.loads((RESULTS / "learn.json").read_text())
    for part in learn.PARTS:
        assert learn.judged(part, results[part]["rows"]) == results[part]["goals"]
    worse = [row | {"accuracy": row["accuracy"] - 0.5} for row in results["fashion"]["rows"][:1]] + results["fashion"]["rows"][
        1:
    ]
    assert not any(goal["reached"] for goal in learn.judged("fashion", worse))


def test_the_tables_of_exports_are_those_that_a_run_wrote():
    page = (ROOT / "docs" / "exporting.md").read_text()
    assert all(table in page for table in chart.tables_of_exports(RESULTS).split("\n\n"))


def test_the_tables_of_learning_are_those_that_a_run_wrote():
    page = (ROOT / "docs" / "fine-tuning.md").read_text()
    assert all(table in page for table in chart.tables_of_learning(RESULTS).split("\n\n"))


def test_the_table_for_the_readme_has_three_rows_of_relative_times():
    rows = [line.strip("| ").split(" | ")[0] for line in chart.readme_table(RESULTS).splitlines()[2:]]
    assert rows == ["forward, batch 1 / 8 / 32", "training step, batch 8", "file to first logits"]


def test_packing_in_its_quick_form_and_the_table_that_a_run_wrote(tmp_path):
    pytest.importorskip("grain")  # the extra `train`
    command = [sys.executable, ROOT / "benchmarks" / "packed.py", "--quick", "--reads", "1000", "--results", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "packed.json").read_text())
    assert (results["million"]["shards"], results["folder"]["images"]) == (2, 2500)
    written = json.loads((RESULTS / "packed.json").read_text())
    assert packed.table(written) in (ROOT / "docs" / "packing.md").read_text()
