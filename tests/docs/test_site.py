"""The site: it builds without a warning, its reference is the code's, and what it names exists."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer
import yaml
from msgspec import structs

from lapora.cli.app import app as lapora_app
from lapora.storage import manifest
from pages import DOCS, environment, lapora_lines

ROOT = DOCS.parent


def _page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_command_line_page_is_the_codes(tmp_path):
    command = ["lapora.cli.app", "utils", "docs", "--name", "lapora", "--title", "Command line"]
    fresh = tmp_path / "cli.md"
    subprocess.run(
        [sys.executable, "-m", "typer", *command, "--output", str(fresh)], check=True, capture_output=True, timeout=60
    )
    assert _page("reference/cli.md") == fresh.read_text(encoding="utf-8"), "run `make docs-reference`"


PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.name != "cli.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_a_page_is_one(page):
    """Names, arguments, options and their values; recipes and the start page are run, too, by other tests."""
    group = typer.main.get_command(lapora_app)
    # A fence without a language counts; in a pipe the command ends where the next begins.
    for block in re.findall(r"^```(?:sh|text|console)?\n(.*?)^```$", _page(page), flags=re.S | re.M):
        for words in lapora_lines(block):
            ends = [index for index, word in enumerate(words) if word in ("|", ">", ">>", "&&", "||", "2>/dev/null")]
            words = words[: min(ends, default=len(words))]
            name, *rest = words
            command = group.commands[name]
            command.make_context(name, rest)


def test_every_module_that_a_page_names_exists():
    named = set()
    for page in [*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        named |= set(re.findall(r"\[`?(lapora\.[\w.]+)`?\]\[", text)) | set(
            re.findall(r"^::: (lapora\.[\w.]+)", text, re.M)
        )
    assert len(named) > 30
    for name in named:
        module, _, attribute = name.rpartition(".")
        if not _exists(name):
            assert _exists(module), name
            assert hasattr(importlib.import_module(module), attribute), name


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def test_every_module_of_the_method_is_a_section_of_the_reference():
    sections = set(re.findall(r"^::: (lapora\.[\w.]+)", _page("reference/modules.md"), flags=re.M))
    assert set(re.findall(r"\[`(lapora\.[\w.]+)`\]\[", _page("method.md"))) <= sections


def test_the_format_page_names_every_field_and_no_other(demo):
    """The fields that the reader knows, and those of a posterior that was really written."""
    top, parameter, prior = (_fields(part) for part in _page("format.md").split("| field | content |")[1:4])
    saved = manifest.read_content(demo / "adapter" / "laplace" / "default" / "posterior.json")
    optional = {name for name, mark in top.items() if mark}
    fields = structs.fields(manifest.Manifest)
    assert set(top) == {field.name for field in fields} | {"prior", "tensors", "checksums"} == set(saved)
    assert optional == {field.name for field in fields if not field.required}
    assert set(parameter) == {key for each in saved["parameters"] for key in each}
    assert set(prior) - {"validation", "noise_scale"} <= set(saved["prior"])
    extra = set(saved["prior"]) - set(prior)
    assert all(f"`{key}`" in _page("format.md") for key in extra)
    for key in ("base_model", "data", "answers"):
        row = next(line for line in _page("format.md").splitlines() if line.startswith(f"| `{key}`"))
        assert {*saved[key]} == set(re.findall(r"`(\w+)`", row)[1:]), key


def _fields(table: str) -> dict[str, bool]:
    rows = table.split("\n\n")[0]
    return {name: bool(mark) for name, mark in re.findall(r"^\| `(\w+)`( °)? \|", rows, flags=re.M)}


def test_the_contributing_page_names_what_is_there():
    text = _page("contributing.md")
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    for name in re.findall(r"`(_?[A-Za-z]+(?:_[A-Za-z]+)+|_[a-z]+|[A-Z][a-z]+[A-Z]\w+)`", text):
        assert re.search(rf"\b{name}\b", source), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", text + (ROOT / "CONTRIBUTING.md").read_text()):
        assert f"\n{target}:" in makefile, target
    assert list((ROOT / "src/lapora/tasks/builtin").glob("*.yaml"))


def test_every_page_is_in_the_navigation():
    """MkDocs only mentions a page that is not; and its build is not run where it is not installed."""

    class Loader(yaml.SafeLoader):
        pass

    listed: set[str] = set()

    def walk(entry):
        if isinstance(entry, str):
            listed.add(entry)
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                walk(value)

    walk(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_and_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\">\s]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)[^>]+href=\"?([^\">\s]+)", text)
        assert loaded and not [target for target in loaded if target.startswith(("http", "//"))], page


def test_names_in_docstrings_are_links(site):
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    prose = re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
    assert not re.findall(r":(?:func|class|meth|mod|data):", prose)
    assert re.search(
        r'<a [^>]*href="#lapora\.options\.FitOptions"[^>]*><code>lapora\.options\.FitOptions</code>', prose
    )


def test_equations_are_mathml(site):
    text = (site / "method.html").read_text(encoding="utf-8")
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.S)
    source = _page("method.md")
    displayed, inline = source.count("```math"), len(re.findall(r"\$[^$\n]+\$", source))
    assert text.count("<math") == displayed + inline > 40
    assert "$" not in re.sub(r"<script.*?</script>", "", prose, flags=re.S)
    assert "\\" not in "".join(re.findall(r"<math.*?</math>", text, flags=re.S))


@pytest.fixture
def browse(tmp_path):
    """What a browser makes of a page, once it is loaded."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium")

    def dump(address: str, *options: str) -> str:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
        done = subprocess.run([*command, *options, address], capture_output=True, text=True, timeout=120)
        return done.stdout

    return dump


def test_equations_are_drawn_by_a_browser(site, browse):
    shown = browse(_measuring(site).as_uri(), "--virtual-time-budget=3000")
    count, tall = map(int, re.search(r'id="measured">(\d+) (\d+)<', shown).groups())
    assert count > 40 and tall == 0, shown[-500:]


class _Site(http.server.SimpleHTTPRequestHandler):
    """The site, and a picture that takes its time: the page is loaded, and shown, only when the search is done."""

    def do_GET(self):
        if self.path == "/late.png":
            time.sleep(5)
            self.send_error(404)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("opened", ["served", "from the disk"])
def test_the_search_finds(opened, site, browse):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Site, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        page = site / "late.html"
        late = f'<img src="{address}/late.png"></body>'
        page.write_text((site / "index.html").read_text(encoding="utf-8").replace("</body>", late), encoding="utf-8")
        shown = browse(f"{address if opened == 'served' else site.as_uri()}/late.html?q=ekfac")
        page.unlink()
        server.shutdown()
    assert re.search(r"[1-9]\d* matching documents", shown)
    assert re.search(r'href="[^"]*posteriors\.html"[^>]*class="md-search-result__link"', shown)


@pytest.mark.parametrize("width", [1280, 700])
def test_no_block_of_code_scrolls_sideways(site, browse, width):
    """Every page in a frame of a browser's page; a block is wider than what is shown of it, if it scrolls."""
    names = sorted(str(page.relative_to(site)) for page in site.rglob("*.html") if page.name != "404.html")
    page = site / "frames.html"
    page.write_text(_FRAMES.replace("WIDTH", str(width)).replace("NAMES", json.dumps(names)), encoding="utf-8")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Site, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shown = browse(f"http://127.0.0.1:{server.server_address[1]}/frames.html", "--virtual-time-budget=30000")
        server.shutdown()
    page.unlink()
    found = re.search(r'id="found">([^<]*)<', shown)
    assert found, shown[-500:]
    pages, blocks, *scrolling = found.group(1).split()
    assert int(pages) == len(names) and int(blocks) > 100 and not scrolling


_FRAMES = """<!doctype html><body><script>
const names = NAMES, scrolling = []; let pages = 0, blocks = 0;
async function measure(name) {
  const frame = document.createElement('iframe');
  frame.sandbox = 'allow-same-origin';  // no scripts
  frame.width = WIDTH; frame.height = 800; frame.src = name;
  const loaded = new Promise(done => frame.onload = done);
  document.body.append(frame); await loaded;
  for (const block of frame.contentDocument.querySelectorAll('pre, pre > code')) {
    blocks += 1;
    if (block.scrollWidth > block.clientWidth + 1) scrolling.push(name);
  }
  pages += 1; frame.remove();
}
(async () => {
  for (const name of names) await measure(name);
  const shown = document.createElement('p'); shown.id = 'found';
  shown.textContent = [pages, blocks, ...scrolling].join(' '); document.body.append(shown);
})();
</script></body>"""


def _measuring(site: Path) -> Path:
    """The method's page, with a script that counts equations and those that take no room."""
    page = site / "measured.html"
    script = (
        "<script>addEventListener('load',()=>{const all=[...document.querySelectorAll('math')];"
        "const p=document.createElement('p');p.id='measured';"
        "p.textContent=all.length+' '+all.filter(m=>m.getBoundingClientRect().height<5).length;"
        "document.body.append(p)})</script></body>"
    )
    page.write_text((site / "method.html").read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    return page
