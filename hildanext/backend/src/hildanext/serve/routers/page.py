"""GET /, the page's files, and /docs: the routes as a plain page. Nothing is loaded from elsewhere."""

from html import escape
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse

from hildanext.serve.errors import Refused

router = APIRouter(include_in_schema=False)


def folder() -> Path:
    """Where the page's files are."""
    return Path(str(files("hildanext"))) / "serve" / "static"


@router.get("/")
def index() -> FileResponse:
    """The page."""
    return _file("index.html")


@router.get("/static/{name:path}")
def static(name: str) -> FileResponse:
    """One of its files."""
    return _file(name)


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """The OpenAPI document as a list for people; it needs no script."""
    document = request.app.openapi()
    rows = [
        f"<tr><td>{method.upper()}<td><code>{escape(path)}</code><td>{escape(operation.get('description', ''))}</tr>"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>'
        '<p>Types of all bodies and answers are in <a href="/openapi.json">/openapi.json</a>.</p>'
        f"<table><tr><th>Method<th>Route<th>What it does</tr>{''.join(rows)}</table></html>"
    )


def _file(name: str) -> FileResponse:
    """A file of the page, by a name that is there: no path is made from what a client sends."""
    known = {str(path.relative_to(folder()).as_posix()): path for path in folder().rglob("*") if path.is_file()}
    if name not in known:
        raise Refused(f"the page has no file {name[:100]!r}", "reinstall, if it should have", 404, "no_file")
    return FileResponse(known[name], headers={"Cache-Control": "no-cache"})
