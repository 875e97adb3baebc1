"""The site that `sukashi serve` shows on this machine alone.

It reads what experiments left and writes nothing but what a person chose, one file a folder, whole or not at all. It
answers to its own address only: other names in the Host header are refused, so that no page of the web reaches it by a
name of its own, and what is sent must come from a page of this site (Origin). Pages need no script; one is there that
saves each change as it is made.
"""

from __future__ import annotations

import re
import secrets
import shlex
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response

from sukashi.core.errors import SukashiError, UsageError
from sukashi.experiments import catalogue
from sukashi.experiments.concepts import choice
from sukashi.experiments.executor import summarised
from sukashi.experiments.kinds import spelled
from sukashi.experiments.workspace import EXPERIMENT, Workspace
from sukashi.report.page import REPORT, environment

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
SHOWN = {".png", ".svg", ".csv", ".tex", ".onnx", ".json", ".parquet"}  # of the files beside a page
LARGEST = 1_000_000  # bytes of what is sent


def site(folder: Path, port: int) -> FastAPI:
    """The site of a folder at a port. Raises UsageError where the folder holds no experiment."""
    catalogue.experiments(folder)
    root = folder.resolve()
    own = {f"http://{name}:{port}" for name in NAMES} | ({f"http://{name}" for name in NAMES} if port == 80 else set())
    app = FastAPI(title="sukashi", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if f"http://{request.headers.get('host')}" not in own:
            return _refused(f"This site answers to {HOST}:{port} only.", 421, request)
        if request.method not in ("GET", "HEAD") and request.headers.get("origin") not in own:
            return _refused("What is sent must come from a page of this site.", 403, request)
        nonce = secrets.token_urlsafe(16)
        request.state.nonce = nonce
        try:
            found = await answer(request)
        except SukashiError as error:
            found = _refused(spelled(str(error)), 400, request)
        except (ValueError, OSError):  # of an address or a form that no page of this site makes
            found = _refused("There is no such page.", 400, request)
        found.headers["Content-Security-Policy"] = (
            f"default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
            "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        found.headers["X-Content-Type-Options"] = "nosniff"
        found.headers["Referrer-Policy"] = "same-origin"  # none at all would take the Origin of a form away too
        found.headers["Cache-Control"] = "no-store"
        return found

    @app.api_route("/", methods=["GET", "HEAD"])
    def index() -> Response:
        rows = catalogue.experiments(root)
        for row in rows:
            inside = Path(row["folder"]).relative_to(root).as_posix()
            row["address"] = f"/at/{quote(inside)}/" if inside != "." else "/at/"
            row["name"] = inside if inside != "." else root.name
        return _page("app/index.html.j2", folder=str(root), rows=rows)

    @app.api_route("/at/{path:path}", methods=["GET", "HEAD"])
    def shown(path: str, request: Request) -> Response:
        place = _inside(root, path)
        if place.is_dir():
            if path and not path.endswith("/"):
                return RedirectResponse(f"/at/{quote(path)}/", 307)
            space = Workspace(place)
            if space.about["kind"] == "concepts":
                return _choosing(space, request.state.nonce)
            place = place / REPORT
        if place.name != REPORT and place.suffix not in SHOWN:
            raise UsageError(f"{path} is no page, figure or table")
        if not place.is_file():
            raise UsageError(
                f"there is no {path}{REPORT if path.endswith('/') else ''}: `sukashi report` writes a page"
            )
        return FileResponse(place)

    @app.post("/at/{path:path}")
    async def choose(path: str, request: Request) -> Response:
        if int(request.headers.get("content-length", LARGEST)) >= LARGEST:
            raise UsageError("what was sent is too large")
        space = Workspace(_inside(root, path))
        form = parse_qs((await request.body()).decode(), keep_blank_values=True)
        # Of another tab, or from before the folder was made anew.
        if form.pop("version", [""])[-1] != choice.version(space):
            raise UsageError("this page is older than what lies in the folder: load it again")
        choice.choose(space, _said(form))
        if _is_script(request):
            return Response(choice.version(space), media_type="text/plain")
        return RedirectResponse(f"/at/{quote(path)}", 303)

    return app


def _inside(root: Path, path: str) -> Path:
    """A place below the root, in the folder of an experiment. Raises UsageError for one that is elsewhere."""
    place = (root / path).resolve()
    above = (place, *place.parents)
    homes = [folder for folder in above if folder == root or root in folder.parents]
    if not any((folder / EXPERIMENT).is_file() for folder in homes):
        raise UsageError(f"there is no experiment at {path!r}")
    return place


def _said(form: Mapping[str, list[str]]) -> choice.Choice:
    """The choice that a form sends: `name-NUMBER` and, of those that are ticked, `out-NUMBER`."""
    names, out = {}, []
    for key, values in form.items():
        what, _, number = key.partition("-")
        if what not in ("name", "out") or not re.fullmatch(r"0|[1-9]\d{0,3}", number):
            raise UsageError(f"{key[:20]!r} was sent, which is no name of a subspace")
        if what == "out":
            out.append(int(number))
        elif values[-1].strip():
            names[int(number)] = values[-1]
    return choice.Choice(names, tuple(out))


def _choosing(space: Workspace, nonce: str) -> Response:
    """The page on which subspaces are named and chosen."""
    result: Any = summarised(space)
    return _page(
        "app/choose.html.j2",
        result=result,
        said=choice.chosen(space),
        version=choice.version(space),
        ablate=shlex.quote(str(space.folder)),
        drawn=all((space.folder / f"figures/subspace-{of['subspace']}.png").is_file() for of in result.subspaces),
        told=list(result.subspaces[0]["tells"]),
        longest=choice.LONGEST,
        folder=str(space.folder),
        file=choice.FILE,
        nonce=nonce,
    )


def _page(template: str, status: int = 200, **shown: Any) -> HTMLResponse:
    # What people named is shown as it is; what settings are called is for the site's own words.
    made = environment(lambda text: text)
    made.filters["spelled"] = spelled
    return HTMLResponse(made.get_template(template).render(**shown), status)


def _is_script(request: Request) -> bool:
    """Whether a page's script asks, which stays on its page."""
    return request.headers.get("sec-fetch-dest") == "empty"


def _refused(why: str, status: int, request: Request) -> Response:
    return PlainTextResponse(why, status) if _is_script(request) else _page("app/refused.html.j2", status, why=why)


def serve(folder: Path, port: int, tell: Callable[[str], None]) -> None:
    """Show the site until it is stopped. `tell` is called with its address once that is taken.

    Raises UsageError for a folder without experiments, a port that is in use, or one that this user may not have.
    """
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((HOST, port))
        except OSError as error:
            raise UsageError(
                f"port {port} can't be had ({error.strerror}): give another, or 0 for one that is free"
            ) from error
        port = taken.getsockname()[1]
        app = site(folder.expanduser(), port)
        tell(f"http://{HOST}:{port}/")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[taken])
