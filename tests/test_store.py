"""Trials on disk: atomic, resumable, owned by one process, the same bytes whatever happened on the way."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sukashi.core.errors import DataError, ModelError, ResourceError, UsageError
from sukashi.core.files import write
from sukashi.core.types import Curve, Member, Plan, Site, Trial
from sukashi.criteria.plans import plan_bytes, read_plan
from sukashi.experiments.compare.store import Store

SITES = (Site("conv1", "channel", 5), Site("blocks.0.heads", "head", 3, axis=2))
STUDY = {"model": {"spec": "sukashi:digits_cnn"}, "criteria": ["random", "cswap"], "seeds": 2, "ratios": [0.0, 0.5]}
TRIALS = [
    Trial({"spec": "sukashi:digits_cnn"}, {"spec": "digits"}, criterion, seed, {"alpha": 0.05})
    for criterion in ("random", "cswap")
    for seed in (0, 1)
]


def a_plan(trial: Trial = TRIALS[0]) -> Plan:
    rng = np.random.default_rng([trial.seed, len(trial.criterion)])
    order = [(s, u) for s, site in enumerate(SITES) for u in range(site.n_units)]
    order = [order[i] for i in rng.permutation(len(order))]
    return Plan.build(
        SITES,
        order,
        method=trial.criterion,
        params={"alpha": 0.05},
        category={order[0]: "detrimental", order[1]: "critical"},
        effect={pair: float(value) for pair, value in zip(order, rng.normal(size=8), strict=True)},
        p_values={order[2]: rng.random(3)},
        passes=(2, 4),
        n_images=30,
    )


def a_curve(trial: Trial = TRIALS[0]) -> Curve:
    rng = np.random.default_rng([trial.seed, 7])
    return Curve(
        ratio=np.array([0.0, np.nan, 0.5]),
        n_removed=np.array([0, 2, 4]),
        fraction=np.array([0.0, 0.2, 0.6]),
        correct=rng.random((3, 13)) > 0.4,
        image_ids=tuple(f"test/{i}é" for i in range(13)),
    )


def work(folder: Path, pause: float = 0.0, trials: Sequence[Trial] = TRIALS) -> None:
    """A whole small study, as `compare` does it: journal, plan, curve, result."""
    store = Store(folder)
    with store.writing(STUDY):
        store.log("run", command="sukashi compare")
        for trial in trials:
            if store.record(trial):
                continue
            with store.run(trial) as writer:
                if writer.plan() is None:
                    for step in range(2):
                        if f"site{step}" not in writer.journal:
                            writer.journal[f"site{step}"] = [step * 0.1, float("nan"), trial.seed]
                        time.sleep(pause)
                    assert [writer.journal[f"site{step}"][0] for step in range(2)] == [0.0, 0.1]
                    writer.save_plan(a_plan(trial))
                time.sleep(pause)
                writer.save_curve(a_curve(trial))
                writer.finish({"sauce": 50.0 + trial.seed, "dense_accuracy": 0.9})


def die_at(folder: Path, nth: int) -> None:
    """`work`, killed just before the nth time something is made durable or put in place."""
    calls = 0

    def counted(real):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    os.fsync, os.replace, os.truncate = counted(os.fsync), counted(os.replace), counted(os.truncate)
    work(folder, trials=TRIALS[::3])


def hold(folder: Path, ready) -> None:  # type: ignore[no-untyped-def]
    with Store(folder).writing(STUDY):
        ready.set()
        time.sleep(60)


def content(folder: Path) -> dict[str, bytes]:
    """Every file that a resumed run owes the same bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.jsonl"
    }


@pytest.fixture(scope="module")
def processes():  # type: ignore[no-untyped-def]
    """Makes real processes; their imports are done once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sukashi.store"])
    return context


def test_a_finished_trial_holds_what_was_given(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "study")
    with store.writing(STUDY), store.run(TRIALS[0]) as writer:
        writer.save_plan(a_plan())
        writer.save_curve(a_curve())
        assert store.record(TRIALS[0]) is None
        writer.finish({"sauce": 51.5})
    (record,) = Store(tmp_path / "new" / "study").finished()
    assert record.trial == TRIALS[0]
    assert record.folder.name == TRIALS[0].key
    assert record.result == {"sauce": 51.5}
    curve, given = record.curve(), a_curve()
    np.testing.assert_array_equal(curve.correct, given.correct)
    np.testing.assert_array_equal(curve.ratio, given.ratio)
    np.testing.assert_array_equal(curve.n_removed, given.n_removed)
    np.testing.assert_array_equal(curve.fraction, given.fraction)
    assert curve.image_ids == given.image_ids
    assert not (record.folder / "journal.jsonl").exists()


def test_a_plan_comes_back_on_the_sites_found_again(tmp_path: Path) -> None:
    plan = a_plan()
    (tmp_path / "plan.npz").write_bytes(plan_bytes(plan))
    member = Member("fc", "in", ((0,), (1,), (2,)), -1)
    found = (Site("blocks.0.heads", "head", 3, axis=2, members=(member,)), Site("conv1", "channel", 5))
    back = read_plan(tmp_path / "plan.npz", found)
    assert back.sites == plan.sites
    assert back.sites[1].members == (member,)
    for name in ("site", "unit", "category", "effect", "p_values"):
        np.testing.assert_array_equal(getattr(back, name), getattr(plan, name))
    assert (back.method, back.params, back.passes, back.n_images) == ("random", {"alpha": 0.05}, (2, 4), 30)
    assert read_plan(tmp_path / "plan.npz").sites == plan.sites


@pytest.mark.parametrize(
    "other",
    [
        (Site("conv1", "channel", 6), SITES[1]),
        (SITES[0],),
        (*SITES, Site("fc", "hidden", 4)),
        (Site("conv1", "hidden", 5), SITES[1]),
    ],
)
def test_a_plan_of_another_model_is_refused(tmp_path: Path, other: tuple[Site, ...]) -> None:
    (tmp_path / "plan.npz").write_bytes(plan_bytes(a_plan()))
    with pytest.raises(ModelError, match="made for another model"):
        read_plan(tmp_path / "plan.npz", other)


def test_a_pickle_in_a_plan_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "exploded",))

    np.savez(tmp_path / "plan.npz", about=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"plan\.npz can't be read"):
        read_plan(tmp_path / "plan.npz")
    assert not (tmp_path / "exploded").exists()


def test_a_truncated_curve_is_refused_by_name(tmp_path: Path) -> None:
    work(tmp_path / "study")
    path = Store(tmp_path / "study").finished()[0].folder / "curve.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"curve\.npz can't be read"):
        Store(tmp_path / "study").finished()[0].curve()


def test_an_altered_trial_is_refused(tmp_path: Path) -> None:
    work(tmp_path / "study")
    path = tmp_path / "study" / "trials" / TRIALS[0].key / "trial.json"
    path.write_text(path.read_text().replace('"seed":0', '"seed":9'))
    with pytest.raises(DataError, match="was altered"):
        Store(tmp_path / "study").finished()


def test_arrays_carry_no_clock_time(tmp_path: Path) -> None:
    (tmp_path / "plan.npz").write_bytes(plan_bytes(a_plan()))
    with zipfile.ZipFile(tmp_path / "plan.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_table_has_one_row_for_each_point(tmp_path: Path) -> None:
    work(tmp_path / "study")
    rows = pq.read_table(tmp_path / "study" / "results.parquet").to_pylist()
    assert len(rows) == 3 * len(TRIALS)
    assert [(row["criterion"], row["seed"]) for row in rows[::3]] == [
        ("cswap", 0),
        ("cswap", 1),
        ("random", 0),
        ("random", 1),
    ]
    trial = next(trial for trial in TRIALS if (trial.criterion, trial.seed) == ("cswap", 1))
    n_correct = int(a_curve(trial).correct[1].sum())
    assert rows[4] == {
        "trial": trial.key,
        "model": "sukashi:digits_cnn",
        "data": "digits",
        "criterion": "cswap",
        "sampling": "random",
        "seed": 1,
        "kind": "pass",
        "ratio": None,
        "fraction": 0.2,
        "units": 2,
        "n_images": 13,
        "n_correct": n_correct,
        "accuracy": n_correct / 13,
        "sauce": 51.0,
    }
    assert (rows[5]["kind"], rows[5]["ratio"]) == ("ratio", 0.5)


def test_another_study_is_refused_naming_what_differs(tmp_path: Path) -> None:
    with Store(tmp_path).writing(STUDY):
        pass
    before = content(tmp_path)
    other = {**STUDY, "seeds": 5, "model": {"spec": "timm:deit"}}
    with (
        pytest.raises(
            UsageError, match=r'another trial: model.spec was "sukashi:digits_cnn", now "timm:deit"; seeds was 2, now 5'
        ),
        Store(tmp_path).writing(other),
    ):
        pass
    assert content(tmp_path) == before
    with Store(tmp_path).writing(dict(reversed(STUDY.items()))):  # the order of keys is no difference
        pass


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"seeds": 3, "criteria": ["random", "drift", "cswap"]}, True),
        ({"options": {"lrp": {"epsilon": 1e-3}}, "criteria": [*STUDY["criteria"], "lrp"]}, True),
        ({"options": {"cswap": {"alpha": 0.1}}}, False),
        ({"criteria": ["random"]}, False),
        ({"criteria": ["random", "drift"], "seeds": 5}, False),
        ({"seeds": 5, "ratios": [0.0, 0.7]}, False),
        ({"seeds": 1}, False),
    ],
)
def test_a_study_grows_by_criteria_and_seeds_only(tmp_path: Path, change: dict[str, Any], grows: bool) -> None:
    with Store(tmp_path).writing({**STUDY, "options": {}}):
        pass
    before = content(tmp_path)
    asked = {**STUDY, "options": {}, **change}
    if grows:
        with Store(tmp_path).writing(asked) as store:
            assert store.study == asked
    else:
        with pytest.raises(UsageError, match="another trial"), Store(tmp_path).writing(asked):
            pass
        assert content(tmp_path) == before


def test_a_folder_with_other_things_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(UsageError, match=r"not empty \(thesis.tex\)"), Store(tmp_path).writing(STUDY):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"), Store(tmp_path / "thesis.tex").writing(STUDY):
        pass
    with pytest.raises(UsageError, match="holds no study"):
        _ = Store(tmp_path).study


def test_the_second_process_is_refused_naming_the_first_until_it_dies(tmp_path: Path, processes) -> None:  # type: ignore[no-untyped-def]
    ready = processes.Event()
    owner = processes.Process(target=hold, args=(tmp_path / "study", ready))
    owner.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ResourceError, match=f"process {owner.pid} on "), Store(tmp_path / "study").writing(STUDY):
            pass
    finally:
        owner.kill()
        owner.join()
    with Store(tmp_path / "study").writing(STUDY) as store:
        with pytest.raises(ResourceError, match="this very process"), Store(tmp_path / "study").writing(STUDY):
            pass
        store.log("still held")  # the refused attempt did not release it
        rival = processes.Process(target=work, args=(tmp_path / "study",))
        rival.start()
        rival.join()
        assert rival.exitcode == 1
    assert Store(tmp_path / "study").finished() == []


def test_killed_at_every_write_it_ends_with_the_same_bytes(tmp_path: Path, processes) -> None:  # type: ignore[no-untyped-def]
    work(tmp_path / "undisturbed", trials=TRIALS[::3])
    undisturbed = content(tmp_path / "undisturbed")
    nth, killed = 1, True
    while killed:
        folder = tmp_path / f"killed{nth}"
        process = processes.Process(target=die_at, args=(folder, nth))
        process.start()
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0
        work(folder, trials=TRIALS[::3])
        assert content(folder) == undisturbed, f"killed at write {nth}"
        nth += 1
    assert nth > 40


def test_killed_at_random_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path, processes) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    exits = []
    for _ in range(12):
        process = processes.Process(target=work, args=(tmp_path / "study", 0.05))
        process.start()
        process.join(rng.uniform(0.1, 0.4))
        process.kill()
        process.join()
        exits.append(process.exitcode)
    assert -signal.SIGKILL in exits
    work(tmp_path / "study")
    work(tmp_path / "undisturbed")
    assert content(tmp_path / "study") == content(tmp_path / "undisturbed")


def test_a_torn_journal_line_is_dropped(tmp_path: Path) -> None:
    with Store(tmp_path).writing(STUDY) as store, store.run(TRIALS[0]) as writer:
        writer.journal["a"] = [1, 0.1]
        path = writer.folder / "journal.jsonl"
        first = path.stat().st_size
        writer.journal["b"] = "é"
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with store.run(TRIALS[0]) as resumed:
                assert list(resumed.journal) == (["a"] if size >= first else [])
                resumed.journal.setdefault("a", [1, 0.1])
                resumed.journal["b"] = "é"
            assert path.read_bytes() == whole


def test_a_full_disk_leaves_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "result.json", b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"cannot write .*result.json: no space left"):
        write(tmp_path / "result.json", b"after")
    assert content(tmp_path) == {"result.json": b"before"}


def test_a_write_cut_short_leaves_the_previous_state(tmp_path: Path) -> None:
    """The operating system itself stops the writes after 1000 bytes of a file."""
    store = Store(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.writing(STUDY), store.run(TRIALS[0]) as writer:
        writer.journal["first"] = "x" * 400
        write(writer.folder / "plan.npz", b"before")
        before = content(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(ResourceError, match=r"journal\.jsonl"):
                writer.journal["second"] = "y" * 900
            with pytest.raises(ResourceError, match=r"plan\.npz"):
                write(writer.folder / "plan.npz", b"z" * 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert content(tmp_path) == before
        writer.journal["second"] = "now"
        assert dict(writer.journal) == {"first": "x" * 400, "second": "now"}


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with Store(tmp_path).writing(STUDY) as store, store.run(TRIALS[0]) as writer:
        writer.save_curve(a_curve())
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.finish({"sauce": float("nan")})
        assert store.record(TRIALS[0]) is None


def test_the_log_survives_a_torn_line(tmp_path: Path) -> None:
    with Store(tmp_path).writing(STUDY) as store:
        store.log("run", command="first")
        with open(tmp_path / "log.jsonl", "ab") as file:
            file.write(b'{"event":"ru')
        store.log("cost", latency_ms=2.5)
        store.log("run", command="second")
        assert [entry["command"] for entry in store.logged("run")] == ["first", "second"]
        assert store.logged("cost")[0]["latency_ms"] == 2.5
        assert json.loads((tmp_path / "log.jsonl").read_bytes().splitlines()[1])["time"].endswith("Z")
