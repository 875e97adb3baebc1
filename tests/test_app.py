"""The local site: what it shows, whom it answers, and a choice that is made on it and pruned by."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from fastapi.testclient import TestClient

import sukashi
from sukashi.app import server
from sukashi.core.errors import UsageError
from sukashi.experiments.concepts.choice import FILE, Choice, choose, chosen
from sukashi.experiments.workspace import Workspace

PORT = 8421
HOST = f"127.0.0.1:{PORT}"
OWN = {"origin": f"http://{HOST}"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with concepts of a network, and the weights of that."""
    folder = tmp_path_factory.mktemp("site") / "runs & more"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sukashi.models.load("sukashi:digits_cnn", width=8).model
    weights = folder.parent / "weights.pt"
    torch.save(model.state_dict(), weights)
    given = {"width": 8, "weights": weights, "images": 20, "positions": 10, "trials": 1, "test_images": 60}
    sukashi.concepts("sukashi:digits_cnn", "digits", "bn2", "3", **given, subspaces=2, out=folder / "parts")
    return folder, weights


@pytest.fixture
def runs(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "runs & more")
    return tmp_path / "runs & more"


@pytest.fixture
def client(runs):
    return TestClient(server.site(runs, PORT), base_url=f"http://{HOST}", follow_redirects=False)


def sent(client, said):
    """A form as the page sends it that was loaded now."""
    shown = re.search('name="version" value="([0-9a-f]+)"', client.get("/at/parts/").text)[1]
    return client.post("/at/parts/", data={"version": shown, **said}, headers=OWN)


def test_experiments_and_their_pages_are_shown(client, runs):
    index = client.get("/")
    assert index.status_code == 200
    assert 'href="/at/parts/"' in index.text
    page = client.get("/at/parts/")
    assert page.text.count("<fieldset>") == 2
    assert "take it out" in page.text
    assert client.get("/at/parts/report.html").content == (runs / "parts" / "report.html").read_bytes()
    assert client.get("/at/parts/figures/subspace-1.png").headers["content-type"] == "image/png"
    assert client.get("/at/parts").headers["location"] == "/at/parts/"
    assert client.get("/at/parts/", headers={"host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"host": "evil.example"}, 421),
        ("/", {"host": "127.0.0.1"}, 421),
        ("/", {"host": "evil.example:8421"}, 421),
        ("/at/parts/%2e%2e/%2e%2e/secret.json", {}, 400),
        ("/at/..%2fsecret.json", {}, 400),
        ("/at//etc/passwd", {}, 400),
        ("/at/nowhere/", {}, 400),
        ("/at/parts/trial.json", {}, 200),
        ("/at/parts/subspaces.npz", {}, 400),
        ("/at/link/secret.json", {}, 400),
        ("/at/%00/", {}, 400),
        ("/at/" + "x" * 3000, {}, 400),
    ],
)
def test_it_answers_to_its_own_name_about_its_own_folder(client, runs, path, headers, status):
    (runs.parent / "secret.json").write_text("{}")
    (runs / "link").symlink_to(runs.parent)
    assert client.get(path, headers=headers).status_code == status


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", f"https://{HOST}", "http://127.0.0.1:1"])
def test_what_is_sent_from_elsewhere_is_refused(client, runs, origin):
    headers = {} if origin is None else {"origin": origin}
    assert client.post("/at/parts/", data={"out-0": "1"}, headers=headers).status_code == 403
    assert not (runs / "parts" / FILE).exists()


def test_a_choice_is_kept_and_shown_again(client, runs):
    name = 'a "mark" `size` <b>水　印</b> \\ é'
    found = sent(client, {"name-0": "", "name-1": f" {name} ", "out-1": "1"})
    assert (found.status_code, found.headers["location"]) == (303, "/at/parts/")
    assert chosen(Workspace(runs / "parts")) == Choice({1: name}, (1,))
    page = client.get("/at/parts/").text
    assert page.count("checked") == 1
    assert "<b>水" not in page
    assert "`size`" in page
    assert sukashi.results(runs / "parts").subspaces[1]["name"] == name
    sent(client, {"name-0": "", "name-1": ""})
    assert chosen(Workspace(runs / "parts")) == Choice()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"out-2": "1"}, "there are subspaces 0 to 1, got 2"),
        ({"name-0": "x" * 81}, "at most 80 letters"),
        ({"name-0": "two\nlines"}, "one line"),
        ({"nome-0": "x"}, "is no name of a subspace"),
        ({"out-x": "1"}, "is no name of a subspace"),
        ({"out-00": "1"}, "is no name of a subspace"),
        ({"out-" + "9" * 5000: "1"}, "is no name of a subspace"),
        ({"out-0": "1", "out-1": "1"}, "all that the layer writes would go"),
        ({"version": "0" * 64}, "this page is older"),
    ],
)
def test_what_is_no_choice_is_refused(client, runs, data, words):
    found = sent(client, data)
    assert found.status_code == 400
    assert words in found.text
    assert not (runs / "parts" / FILE).exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda said: said.replace("0", "1"), "of other subspaces"),
        (lambda said: said + "[subspaces.7]\nname='x'\n", "speaks of subspace '7': there are 0 to 1"),
        (lambda said: said + "[subspaces.0]\nnome='x'\n", "says 'nome' of a subspace.*name"),
        (lambda said: said + "[subspaces.0]\ntake_out='yes'\n", "take_out of a subspace is true or false"),
        (lambda said: said + "[parts.0]\n", "'parts', which is no table"),
        (lambda said: said + "][", "can't be read"),
    ],
)
def test_a_file_that_says_something_else_is_refused(runs, changed, words):
    space = Workspace(runs / "parts")
    path = choose(space, Choice({1: "mark"}))
    said = path.read_text()
    head, _, digest = said.partition('sha256 = "')
    # The hash alone is another one.
    path.write_text(head + 'sha256 = "' + changed(digest) if "other" in words else changed(said))
    with pytest.raises(UsageError, match=words):
        chosen(space)


def test_what_was_chosen_is_pruned_without(made, runs, tmp_path):
    cut = {"width": 8, "weights": made[1], "ratio": 0.2, "calibration": 5, "repair": "refit", "test_images": 60}
    prune = ("sukashi:digits_cnn", "digits", "magnitude")
    with pytest.raises(UsageError, match=r"no subspace in .* is chosen to be taken out"):
        sukashi.prune(*prune, **cut, ablate=runs / "parts", out=tmp_path / "cut")
    choose(Workspace(runs / "parts"), Choice({}, (1,)))
    found = sukashi.prune(*prune, **cut, ablate=runs / "parts", out=tmp_path / "cut")
    assert found.ablated["numbers"] == [1]
    with pytest.raises(UsageError, match=r"has no subspaces: give the `out` of `sukashi.concepts`"):
        sukashi.prune(*prune, **cut, ablate=found.out, out=tmp_path / "other")
    (runs / "parts" / FILE).write_text("][")
    assert "can't be read" in sukashi.results(runs / "parts").warnings[0]
    (runs / "parts" / FILE).unlink()
    choose(Workspace(runs / "parts"), Choice({}, (0,)))
    with pytest.raises(UsageError, match="ablated"):
        sukashi.prune(*prune, **cut, ablate=runs / "parts", out=tmp_path / "cut")


def test_a_folder_without_experiments_and_a_port_in_use_are_refused(runs, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="holds no experiment"):
        server.site(tmp_path / "nothing", PORT)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="can't be had"):
            server.serve(runs, taken.getsockname()[1], print)


@pytest.fixture
def served(runs):
    """The address of the site of a process of its own, which can be killed and started again at the same port."""
    started = []

    def start(port=0):
        given = [sys.executable, "-m", "sukashi", "serve", str(runs), "--port", str(port), "--json"]
        process = subprocess.Popen(given, stdout=subprocess.PIPE, text=True)
        started.append(process)
        said = ""
        while not said.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, "the site did not start"
            said += line
        return json.loads(said)["address"], process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a chromium")
def test_a_person_names_ticks_saves_reloads_and_prunes(served, runs, made, tmp_path):
    from playwright.sync_api import sync_playwright

    address, process = served()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.goto(address)
        page.get_by_role("link", name="parts").click()
        # By the keyboard alone.
        page.locator("input[name=name-0]").focus()
        page.keyboard.type("the mark")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        page.get_by_text("Saved. Taken out: 0.").wait_for()
        # Killed and started again, nothing is lost, and what was not saved is said.
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.locator("input[name=name-1]").fill("a part")
        page.locator("input[name=name-1]").blur()
        page.get_by_text("Not saved").wait_for()
        _, process = served(int(address.rpartition(":")[2].strip("/")))
        page.get_by_role("button", name="Save").click()
        page.get_by_text("Saved. Taken out: 0.").wait_for()
        page.locator("input[name=out-1]").check()
        page.get_by_text("all that the layer writes would go").wait_for()
        page.locator("input[name=out-1]").uncheck()
        page.get_by_text("Saved. Taken out: 0.").wait_for()
        page.reload()
        assert page.locator("input[name=name-0]").input_value() == "the mark"
        assert page.locator("input[name=out-0]").is_checked()
        assert not page.locator("input[name=out-1]").is_checked()
        # Those further down are read when somebody scrolls to them, after the page is there.
        page.evaluate("for (const of of document.images) of.scrollIntoView()")
        page.wait_for_function("document.images.length && [...document.images].every(of => of.naturalWidth > 0)")
        assert all("ERR_CONNECTION_REFUSED" in of or "400" in of for of in said)
        # Without a script a form does the same.
        plain = browser.new_context(java_script_enabled=False).new_page()
        plain.goto(f"{address}at/parts/")
        plain.locator("input[name=name-1]").fill("the shape")
        plain.get_by_role("button", name="Save").click()
        assert plain.locator("input[name=name-1]").input_value() == "the shape"
        browser.close()
    assert chosen(Workspace(runs / "parts")) == Choice({0: "the mark", 1: "the shape"}, (0,))
    cut = ["sukashi:digits_cnn", "--width", "8", "--weights", str(made[1]), "--data", "digits", "--test-images", "60"]
    cut += ["--criterion", "taylor", "--ratio", "0.2", "--calibration", "5", "--repair", "refit"]
    cut += ["--ablate", str(runs / "parts"), "--out", str(tmp_path / "cut"), "--json"]
    done = subprocess.run([sys.executable, "-m", "sukashi", "prune", *cut], capture_output=True, text=True)
    assert json.loads(done.stdout)["ablated"]["numbers"] == [0]
