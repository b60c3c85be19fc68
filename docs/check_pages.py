"""Opens every page of the built documentation in Chromium, and fails on what a reader would stumble over.

    python docs/check_pages.py out/docs [--pictures FOLDER]

In light and dark, at the width of a desktop and of a phone: errors in the console, requests that fail or leave the
site, pictures without content, links and anchors that lead nowhere, pages wider than the window, and a search that
finds nothing. --pictures keeps a picture of each page. Chromium is the one that CHROMIUM names, the system's, or that
of `playwright install chromium`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

from playwright.sync_api import Page, TimeoutError, sync_playwright

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
READ = """() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    anchors: [...document.querySelectorAll('[id]')].map(e => e.id),
    pictures: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    scheme: document.body.getAttribute('data-md-color-scheme'),
})"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def look(page: Page, address: str, site: str, scheme: str) -> tuple[dict, list[str]]:
    """What a page has, and what is wrong with it alone."""
    wrong: list[str] = []
    listeners = {
        "console": lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None,
        "pageerror": lambda error: wrong.append(f"error: {error}"),
        "request": lambda r: None if r.url.startswith((site, "data:", "blob:")) else wrong.append(f"loads {r.url}"),
        "response": lambda r: wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None,
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.goto(address, wait_until="load")
    page.evaluate("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    found = page.evaluate(READ)
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    wrong += [f"no picture: {source}" for source in found["pictures"]]
    if found["wide"] > 0:
        wrong.append(f"{found['wide']} pixels wider than the window")
    if (found["scheme"] == "slate") != (scheme == "dark"):
        wrong.append(f"not {scheme}, but {found['scheme']}")
    return found, wrong


def searched(page: Page, site: str, word: str) -> list[str]:
    """What is wrong with the search."""
    page.goto(site + "index.html")
    page.keyboard.press("s")  # opens it at any width, and loads the index
    page.wait_for_timeout(1000)
    page.keyboard.type(word)
    try:
        page.wait_for_selector(f".md-search-result__item >> text={word}", timeout=10_000, state="attached")
    except TimeoutError:
        return [f"the search does not find {word!r}"]
    return []


def broken(seen: dict[str, dict], site: str, folder: Path) -> list[str]:
    """Links to files and anchors that the site does not have."""
    wrong = []
    for address, found in seen.items():
        for link in sorted(set(found["links"])):
            target, anchor = urldefrag(link)
            if not target.startswith(site):
                continue
            file = folder / unquote(target[len(site) :].partition("?")[0] or "index.html")
            target = target if target in seen else f"{target.rstrip('/')}/index.html"
            if file.is_dir():
                file = file / "index.html"
            if not file.exists():
                wrong.append(f"{address}: no {link}")
            elif anchor and target in seen and unquote(anchor) not in seen[target]["anchors"]:
                wrong.append(f"{address}: no anchor {link}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    pages = sorted(str(p.relative_to(options.folder)) for p in options.folder.rglob("*.html") if p.name != "404.html")
    if not pages:
        parser.error(f"no pages in {options.folder}: run make docs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(options.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}/"
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    wrong: list[str] = []
    seen: dict[str, dict] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width, (w, h) in WIDTHS.items():
                view = browser.new_context(viewport={"width": w, "height": h}, color_scheme=scheme)
                page = view.new_page()
                for name in pages:
                    found, own = look(page, site + name, site, scheme)
                    seen[site + name] = found
                    wrong += [f"{name}, {scheme}, {width}: {what}" for what in own]
                    if options.pictures:
                        path = options.pictures / f"{name.replace('/', '-').removesuffix('.html')}-{scheme}-{width}.png"
                        page.screenshot(path=path)
                wrong += [f"{scheme}, {width}: {what}" for what in searched(page, site, "peephole")]
                view.close()
        browser.close()
    wrong += broken(seen, site, options.folder)
    server.shutdown()
    print("\n".join(wrong).replace(site, ""), file=sys.stderr)
    print(f"{len(pages)} pages, light and dark, {' and '.join(WIDTHS)}: {len(wrong)} things wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
