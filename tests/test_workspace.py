"""Trials on disk: atomic, resumable, leased to one process each, the same bytes whatever happened on the way."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
import zipfile
from functools import partial

import numpy as np
import pytest

from sukashi.core import files
from sukashi.core.errors import DataError, ModelError, ResourceError, UsageError
from sukashi.core.experiment import Trial
from sukashi.core.files import FORMAT
from sukashi.experiments import executor
from sukashi.experiments.workspace import Workspace

ASKED = {"model": {"spec": "sukashi:digits_cnn"}, "criteria": ["random", "cswap"], "seeds": 2, "ratios": [0.0, 0.5]}
GROWS = frozenset({"criteria", "seeds", "options", "ratios"})


def steps(pause, desk):
    """A trial as they all are: decisions in a journal, artefacts, a result; it reads what it needs."""
    seed = desk.trial.about["seed"]
    for step in range(2):
        if f"step{step}" not in desk.journal:
            desk.journal[f"step{step}"] = [step * 0.1, float("nan"), seed]
        time.sleep(pause)
    needed = [desk.needed(key).arrays("found")["x"] for key in desk.trial.needs]
    if desk.arrays("found") is None:
        desk.save("found", {"x": np.arange(3.0) + seed + sum(needed)})
    else:
        desk.keep("found.npz")
    time.sleep(pause)
    desk.save("weights.bin", bytes([seed]) * 100)
    desk.finish({"decided": [desk.journal[f"step{step}"][0] for step in range(2)]})


def trials(pause=0.0):
    """Three, of which the second needs the first and the last has a place of its own."""
    first = Trial({"seed": 0}, partial(steps, pause))
    return [
        first,
        Trial({"seed": 1}, partial(steps, pause), needs=(first.key,)),
        Trial({"seed": 2}, partial(steps, pause), place="cut/0.50"),
    ]


def whole(folder, pause=0.0):
    """A whole experiment, as `execute` does it, but for its pages."""
    space, asked = Workspace(folder), trials(pause)
    space.claim("compare", ASKED, asked, GROWS)
    space.log("run", command="sukashi compare")
    executor.work(space, asked)
    return space


def alone(folder):
    """An experiment of one trial, whose place is the folder itself."""
    space, asked = Workspace(folder), [Trial({"seed": 3}, partial(steps, 0.0), place=".")]
    space.claim("prune", ASKED, asked)
    executor.work(space, asked)
    return space


def dying(run, folder, nth):
    """`run`, killed just before the nth time something is made durable, put in place or removed."""
    calls = 0

    def counted(real):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in ("fsync", "replace", "truncate", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    run(folder)


def leasing(folder, ready):
    space = Workspace(folder)
    with space.lease(trials()[0]):
        ready.set()
        time.sleep(60)


def content(folder):
    """Every file that a resumed run owes the same bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.jsonl"
    }


@pytest.fixture(scope="module")
def processes():
    """Makes real processes; their imports are done once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([executor.__name__, "pytest"])
    return context


# What is kept.


def test_a_finished_trial_holds_what_was_given(tmp_path):
    whole(tmp_path / "new" / "study")
    first, second, third = trials()
    found = Workspace(tmp_path / "new" / "study").records()
    assert [record.about for record in found] == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    assert [record.key for record in found] == [first.key, second.key, third.key]
    assert [str(r.folder.relative_to(tmp_path / "new" / "study")) for r in found] == [
        f"trials/{first.key}",
        f"trials/{second.key}",
        "cut/0.50",
    ]
    assert [record.result for record in found] == [{"decided": [0.0, 0.1]}] * 3
    assert [record.kept["needs"] for record in found] == [[], [first.key], []]
    np.testing.assert_array_equal(found[0].arrays("found")["x"], [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(found[1].arrays("found")["x"], [1.0, 3.0, 5.0])
    assert found[1].read("weights.bin") == b"\1" * 100
    assert (found[1].has("found.npz"), found[1].has("plan.npz")) == (True, False)
    with pytest.raises(DataError, match=r"has no artefact 'plan\.npz': it has found\.npz, weights\.bin"):
        found[1].read("plan.npz")
    assert sorted(content(tmp_path / "new" / "study")) == sorted(
        [
            *(".lock", "experiment.json"),
            *(f"{r}/{n}" for r in (first.folder, second.folder, "cut/0.50") for n in ("found.npz", "trial.json")),
            *(f"{r}/weights.bin" for r in (first.folder, second.folder, "cut/0.50")),
        ]
    ), "journals and leases are gone"


def test_a_finished_trial_is_not_done_again(tmp_path):
    space = whole(tmp_path)
    asked = [Trial(trial.about, pytest.fail, trial.needs, trial.place) for trial in trials()]
    assert executor.work(space, asked) == {}


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(path.read_bytes()[:50]), lambda path: path.unlink()])
def test_an_artefact_that_is_broken_is_refused_by_name(tmp_path, harm):
    (record, *_) = whole(tmp_path).records()
    harm(record.folder / "found.npz")
    with pytest.raises(DataError, match=r"found\.npz can't be read .*: remove its folder and run the same command"):
        record.arrays("found")


def test_an_altered_artefact_is_refused_though_it_can_be_read(tmp_path):
    (record, *_) = whole(tmp_path).records()
    path = record.folder / "found.npz"
    path.write_bytes(files.packed(x=np.zeros(3)))
    with pytest.raises(DataError, match=r"found\.npz can't be read \(it was altered\)"):
        record.arrays("found")


def test_an_altered_trial_is_refused(tmp_path):
    space = whole(tmp_path)
    path = space.records()[0].folder / "trial.json"
    kept = path.read_text()
    for altered in (kept.replace('"seed": 0', '"seed": 9'), kept.replace("0.1", "0.2"), kept[:-9]):
        path.write_text(altered)
        with pytest.raises(DataError, match=r"trial\.json can't be read .*: remove its folder and run"):
            space.finished(trials()[0])
        with pytest.raises(DataError, match=r"trial\.json can't be read"):
            Workspace(tmp_path).records()


def test_a_trial_in_the_place_of_another_is_refused(tmp_path):
    space = whole(tmp_path)
    first, second, *_ = space.records()
    for path in second.folder.iterdir():
        shutil.copy(path, first.folder / path.name)
    with pytest.raises(UsageError, match=r"of another trial: seed was 1, now 0"):
        space.finished(trials()[0])
    for read in (space.records, lambda: space.record(first.key)):
        with pytest.raises(DataError, match=r"trial\.json can't be read \(it is of another trial\)"):
            read()


@pytest.mark.parametrize("name", ["trials", "under_way", "figures"])
def test_a_folder_of_somebody_elses_is_left_alone_whatever_its_name(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("all my work")
    with pytest.raises(UsageError, match=rf"not empty \({name}\) and holds no experiment: choose another `out`"):
        whole(tmp_path)
    assert (tmp_path / name / "mine.txt").read_text() == "all my work"


def test_what_a_trial_began_in_a_folder_of_its_own_is_left(tmp_path):
    """As an experiment of a study does, whose training may be gone on with."""

    def run(desk):
        (tmp_path / "dense").mkdir()
        (tmp_path / "dense" / "checkpoint").write_text("hours of work")
        raise ModelError("the loss is not finite")

    space = Workspace(tmp_path)
    space.claim("study", ASKED, [Trial({"seed": 0}, run)])
    assert space.untouched
    with pytest.raises(ModelError):
        executor.work(space, [Trial({"seed": 0}, run)])
    assert not space.untouched


def test_arrays_carry_no_clock_time(tmp_path):
    with zipfile.ZipFile(whole(tmp_path).records()[0].folder / "found.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path):
    def run(desk):
        with pytest.raises(ValueError, match="not JSON compliant"):
            desk.finish({"sauce": float("nan")})

    space, asked = Workspace(tmp_path), [Trial({"seed": 0}, run)]
    space.claim("compare", ASKED, asked)
    executor.work(space, asked)
    assert not space.finished(asked[0])


def test_only_the_first_process_of_a_training_writes(tmp_path, monkeypatch):
    space, asked = Workspace(tmp_path), Trial({"seed": 0}, steps)
    space.claim("train", ASKED, [asked])
    before = content(tmp_path)
    monkeypatch.setenv("RANK", "1")
    with space.lease(asked) as desk:
        desk.save("found", {"x": np.zeros(3)})
        desk.save("weights.bin", b"1")
        desk.keep("nowhere.bin")
        desk.finish({"a": 1})
    assert content(tmp_path) == before


# Whose the folder is.


def test_another_experiment_is_refused_naming_what_differs(tmp_path):
    space = Workspace(tmp_path)
    assert space.claim("compare", ASKED, trials())
    before = content(tmp_path)
    other = {**ASKED, "seeds": 5, "model": {"spec": "timm:deit"}}
    with pytest.raises(
        UsageError, match=r'another trial: model.spec was "sukashi:digits_cnn", now "timm:deit"; seeds was 2, now 5'
    ):
        space.claim("compare", other, trials(), frozenset())
    with pytest.raises(UsageError, match=r"of another experiment \(compare, now prune\): choose another `out`"):
        space.claim("prune", ASKED, trials())
    assert content(tmp_path) == before
    assert not space.claim("compare", dict(reversed(ASKED.items())), trials()), "the order of keys is no difference"
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"seeds": 3, "criteria": ["random", "drift", "cswap"]}, True),
        ({"options": {"lrp": {"epsilon": 1e-3}}, "criteria": [*ASKED["criteria"], "lrp"]}, True),
        ({"ratios": [0.0, 0.5, 0.7]}, True),
        ({"ratios": [0.0, 0.3, 0.5]}, False),
        ({"options": {"cswap": {"alpha": 0.1}, "random": {}}}, False),
        ({"criteria": ["random"]}, False),
        ({"criteria": ["random", "drift"], "seeds": 5}, False),
        ({"seeds": 5, "ratios": [0.0, 0.7]}, False),
        ({"seeds": 1}, False),
        ({"model": {"spec": "sukashi:digits_cnn", "width": 8}}, False),
        ({"more": 1}, False),
    ],
)
def test_an_experiment_grows_by_what_may_grow_only(tmp_path, change, grows):
    asked = {**ASKED, "options": {"random": {}, "cswap": {}}}
    change = change | ({"options": asked["options"] | change["options"]} if "options" in change else {})
    Workspace(tmp_path).claim("compare", asked, trials()[:1])
    before = content(tmp_path)
    space = Workspace(tmp_path)
    if grows:
        assert not space.claim("compare", asked | change, trials(), GROWS)
        assert (space.identity, space.n_trials) == (asked | change, 3)
    else:
        with pytest.raises(UsageError, match="of another trial"):
            space.claim("compare", asked | change, trials(), GROWS)
        assert content(tmp_path) == before


def test_a_folder_with_other_things_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(UsageError, match=r"not empty \(thesis.tex\) and holds no experiment: choose another `out`"):
        whole(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file: `out` needs a folder"):
        whole(tmp_path / "thesis.tex")
    with pytest.raises(UsageError, match=r"holds no experiment \(no experiment\.json\)"):
        _ = Workspace(tmp_path).about
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("told", [1, FORMAT + 1, None])
def test_a_folder_of_another_format_is_refused_untouched(tmp_path, told):
    space = whole(tmp_path)
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": told}))
    before = content(tmp_path)
    for act in (lambda: space.about, lambda: space.records(), lambda: whole(tmp_path)):
        with pytest.raises(UsageError, match=rf"has format {told}, this version reads {FORMAT}: use the version"):
            act()
    assert content(tmp_path) == before


def test_a_new_experiment_that_is_refused_leaves_what_was_there(tmp_path):
    def run(desk):
        desk.journal["a"] = 1
        desk.save("found", {"x": np.zeros(3)})
        raise UsageError("no")

    for name, place in (("own", ""), ("named", "cut/0.50"), ("same", ".")):
        space, asked = Workspace(tmp_path / name), [Trial({"seed": 0}, run, place=place)]
        for kept in ([], ["notes.tmp"]):
            if kept:
                space.folder.mkdir()
                (space.folder / kept[0]).write_text("mine")
            assert space.claim("compare", ASKED, asked)
            space.log("run", command="sukashi compare")
            with pytest.raises(UsageError, match="no"):
                executor.work(space, asked)
            space.discard()
            assert sorted(str(p.relative_to(space.folder)) for p in space.folder.rglob("*")) == kept, name
            assert space.folder.exists() == bool(kept)


# Several processes.


@pytest.mark.slow
def test_a_leased_trial_is_free_again_when_its_process_dies(tmp_path, processes):
    space = Workspace(tmp_path)
    space.claim("compare", ASKED, trials())
    ready = processes.Event()
    owner = processes.Process(target=leasing, args=(tmp_path, ready))
    owner.start()
    try:
        assert ready.wait(60)
        with space.lease(trials()[0]) as desk:
            assert desk is None
        with space.lease(trials()[2]) as desk:
            assert desk is not None, "the others are free"
    finally:
        owner.kill()
        owner.join()
    with space.lease(trials()[0]) as desk:
        assert desk is not None


def test_processes_share_the_trials_of_a_folder(tmp_path, processes):
    rivals = [processes.Process(target=whole, args=(tmp_path / "shared", 0.1)) for _ in range(3)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(60)
    assert [rival.exitcode for rival in rivals] == [0, 0, 0]
    whole(tmp_path / "alone")
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


def test_processes_that_share_one_small_trial_after_another_do_not_disturb_each_other(tmp_path, processes):
    rivals = [processes.Process(target=hurried, args=(tmp_path,)) for _ in range(4)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(60)
    assert [rival.exitcode for rival in rivals] == [0] * 4
    assert len(Workspace(tmp_path).records()) == 60


def hurried(folder):
    executor._LOOK = 0.0
    asked = [Trial({"seed": seed}, lambda desk: desk.finish({})) for seed in range(60)]
    space = Workspace(folder)
    space.claim("compare", ASKED, asked)
    executor.work(space, asked)


def test_a_second_process_leaves_alone_what_the_first_is_writing(tmp_path, monkeypatch):
    """A network goes into the folder itself; that another process claims it meanwhile does not disturb that."""
    really, asked = os.replace, [Trial({"seed": 3}, partial(steps, 0.0), place=".")]

    def replace(draft, path):
        if path == tmp_path / "weights.bin":
            Workspace(tmp_path).claim("prune", ASKED, asked)
        really(draft, path)

    monkeypatch.setattr(os, "replace", replace)
    alone(tmp_path)
    assert Workspace(tmp_path).finished(asked[0])


# Kills.


@pytest.mark.slow
@pytest.mark.parametrize(("run", "n"), [(whole, 40), (alone, 15)])
def test_killed_at_every_write_it_ends_with_the_same_bytes(tmp_path, processes, run, n):
    run(tmp_path / "undisturbed")
    undisturbed = content(tmp_path / "undisturbed")
    nth, killed = 1, True
    while killed:
        folder = tmp_path / f"killed{nth}"
        process = processes.Process(target=dying, args=(run, folder, nth))
        process.start()
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0
        run(folder)
        assert content(folder) == undisturbed, f"killed at write {nth}"
        nth += 1
    assert nth > n


def test_killed_at_random_again_and_again_it_ends_with_the_same_bytes(tmp_path, processes):
    rng = np.random.default_rng(0)
    exits = []
    for _ in range(12):
        process = processes.Process(target=whole, args=(tmp_path / "study", 0.05))
        process.start()
        process.join(rng.uniform(0.1, 0.4))
        process.kill()
        process.join()
        exits.append(process.exitcode)
    assert -signal.SIGKILL in exits
    whole(tmp_path / "study")
    whole(tmp_path / "undisturbed")
    assert content(tmp_path / "study") == content(tmp_path / "undisturbed")


def test_a_torn_journal_line_is_dropped(tmp_path):
    space, trial = Workspace(tmp_path), trials()[0]
    space.claim("compare", ASKED, [trial])
    with space.lease(trial) as desk:
        desk.journal["a"] = [1, 0.1]
        path = desk.scratch / "journal.jsonl"
        first = path.stat().st_size
        desk.journal["b"] = "é"
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with space.lease(trial) as resumed:
            assert list(resumed.journal) == (["a"] if size >= first else [])
            resumed.journal.setdefault("a", [1, 0.1])
            resumed.journal["b"] = "é"
        assert path.read_bytes() == content


def test_the_log_survives_a_torn_line(tmp_path):
    space = Workspace(tmp_path)
    space.log("run", command="first")
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"event":"ru')
    space.log("latency", dense_ms=2.5)
    space.log("run", command="second")
    assert [entry["command"] for entry in space.logged("run")] == ["first", "second"]
    assert space.logged("latency")[0]["dense_ms"] == 2.5
    assert space.logged("run")[0]["time"].endswith("Z")


# Full disks.


def test_a_full_disk_leaves_the_previous_state(tmp_path, monkeypatch):
    files.write(tmp_path / "trial.json", b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"cannot write .*trial.json: no space left"):
        files.write(tmp_path / "trial.json", b"after")
    assert content(tmp_path) == {"trial.json": b"before"}


@pytest.mark.parametrize("run", [whole, alone])
def test_a_full_disk_at_each_write_is_told_and_gone_on_from(tmp_path, monkeypatch, run):
    really, left = os.fsync, [0]

    def fsync(number):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(number)

    monkeypatch.setattr(os, "fsync", fsync)
    run(tmp_path / "undisturbed")
    n, undisturbed = 1, content(tmp_path / "undisturbed")
    while True:
        folder, left[0] = tmp_path / f"full{n}", n
        try:
            run(folder)
            break
        except ResourceError as error:
            said = str(error)
        assert "no space left" in said
        run(folder)
        assert content(folder) == undisturbed, f"full at write {n}"
        n += 1
    assert n > 8


def test_a_write_cut_short_leaves_the_previous_state(tmp_path):
    """The operating system itself stops the writes after 1000 bytes of a file."""
    space, trial = Workspace(tmp_path), trials()[0]
    space.claim("compare", ASKED, [trial])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with space.lease(trial) as desk:
        desk.journal["first"] = "x" * 400
        desk.save("weights.bin", b"before")
        before = content(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(ResourceError, match=r"journal\.jsonl"):
                desk.journal["second"] = "y" * 900
            with pytest.raises(ResourceError, match=r"weights\.bin"):
                desk.save("weights.bin", b"z" * 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert content(tmp_path) == before
        desk.journal["second"] = "now"
        assert dict(desk.journal) == {"first": "x" * 400, "second": "now"}


def test_what_was_asked_otherwise_is_told_before_what_follows_from_it():
    kept = {"code": {"taylor": "a", "norm": "b"}, "criterion": "taylor", "data": {"sha256": "c"}, "target_flops": 0.5}
    asked = {"code": {"drift": "d", "norm": "e"}, "criterion": "drift", "data": {"sha256": "f"}, "target_flops": None}
    with pytest.raises(UsageError) as caught:
        files.refuse_other("out", kept, asked)
    assert str(caught.value) == (
        'out is an existing output folder of another trial: criterion was "taylor", now "drift"; target_flops was 0.5, '
        "now not given; the code of norm has changed and 1 more; choose another `out` or remove the folder"
    )
    with pytest.raises(UsageError, match="trial: data has other contents; choose"):
        files.refuse_other("out", {"data": {"sha256": "c"}}, {"data": {"sha256": "f"}})
