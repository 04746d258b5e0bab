"""Build the documentation site: `make docs` writes it into site/.

README.md, CONTRIBUTING.md, CHANGELOG.md and the pages of docs/, examples/ and benchmarks/ become pages. A source file
that one of them links to becomes a page with its text, so that no link leaves the site. The build ends with an error
when a link leads to no file, or, by Zensical's strict mode, to no heading.

The packages are those of locks/docs.txt, each checked by its hash, in a folder of their own: .venv stays as it is.
Zensical is the successor of Material for MkDocs by the same authors; MkDocs 1 is no longer developed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "locks" / "docs.txt"
CACHE = ROOT / ".cache" / "docs"
SITE = ROOT / "site"
# Order of docs/.
GUIDE = (
    *("setup", "concepts", "tasks", "configuration", "algorithms", "metrics", "models", "gpu"),
    *("operations", "slurm", "kubernetes"),
)
BENCHMARKS = ("benchmarks/README.md", "benchmarks/RESULTS.md", "benchmarks/gpu/RESULTS.md")
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\[[^]]*\]\()([^)\s]+)(\))")


def pages(root: Path) -> dict[str, list[Path]]:
    """Return the Markdown files that become pages, by section, in the order of the navigation; '' is no section."""
    order = {name: number for number, name in enumerate(GUIDE)}
    guide = sorted((root / "docs").glob("*.md"), key=lambda page: (order.get(page.stem, len(order)), page.stem))
    return {
        "": [root / "README.md", root / "examples" / "README.md"],
        "Guide": guide,
        "Benchmarks": [root / name for name in BENCHMARKS],
        "Project": [root / name for name in PROJECT],
    }


def place(root: Path, path: Path) -> Path:
    """Return where a file of the repository is in the site's sources."""
    name = path.relative_to(root)
    if name.parts[0] == "docs":
        name = Path(*name.parts[1:])
    if name.name == "README.md":
        return name.with_name("index.md")
    if path.is_dir():
        return Path("source", name, "index.md")
    if name.suffix in (".md", ".svg"):
        return name
    return Path("source", f"{name}.md")


def stage(root: Path, target: Path) -> None:
    """Write the site's sources below `target`.

    ValueError: a link or a picture leads to no file.
    """
    target.mkdir(parents=True)
    shutil.copy(root / "docs" / "look.css", target)
    linked: set[Path] = set()
    for page in (page for section in pages(root).values() for page in section):
        parts = FENCED.split(page.read_text())
        parts[::2] = [_with_links(root, page, part, linked) for part in parts[::2]]
        _write(target / place(root, page), "".join(parts))
    for path in sorted(linked):
        if path.suffix == ".svg":
            (target / place(root, path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / place(root, path))
        elif path.suffix != ".md":
            _write(target / place(root, path), "\n".join(_source_page(root, path, linked)))


def _with_links(root: Path, page: Path, text: str, linked: set[Path]) -> str:
    """Return a page's text with its links as the site has them, and add to `linked` what they lead to."""

    def rewrite(match: re.Match[str]) -> str:
        name, hash_sign, anchor = match[2].partition("#")
        if not name or "://" in name:
            return match[0]
        path = Path(os.path.normpath(page.parent / name))
        if not path.exists():
            raise ValueError(f"{page.relative_to(root)}: the link {match[2]} leads to no file")
        if (path / "README.md").exists():
            path /= "README.md"
        linked.add(path)
        to = os.path.relpath(place(root, path), place(root, page).parent)
        return f"{match[1]}{to}{hash_sign}{anchor}{match[3]}"

    return LINK.sub(rewrite, text)


def _source_page(root: Path, path: Path, linked: set[Path]) -> Iterator[str]:
    """Yield the lines of a page that shows a source file, or the names in a folder."""
    yield from ("---", "hide: [navigation, toc]", "search:", "  exclude: true", "---")
    yield from (f"# {path.relative_to(root)}", "")
    if not path.is_dir():
        yield from (f"````{LANGUAGES.get(path.suffix, 'text')}", path.read_text(), "````")
        return
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        to = os.path.relpath(place(root, file), place(root, path).parent)
        yield f"- [{file.name}]({to})" if file in linked else f"- {file.name}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def configuration(root: Path) -> str:
    """Return Zensical's configuration: folders beside it, the navigation, then the look (docs/look.toml)."""
    lines = []
    for section, files in pages(root).items():
        titles = [(json.dumps(_title(root, file)), json.dumps(str(place(root, file)))) for file in files]
        entries = ", ".join(f"{{ {title} = {name} }}" for title, name in titles)
        lines.append(f"  {{ {json.dumps(section)} = [{entries}] }}," if section else f"  {entries},")
    head = ["[project]", 'site_name = "slime"', 'docs_dir = "pages"', 'site_dir = "site"', 'extra_css = ["look.css"]']
    return "\n".join([*head, "nav = [", *lines, "]", "", (root / "docs" / "look.toml").read_text()])


def _title(root: Path, page: Path) -> str:
    if page == root / "README.md":
        return "Home"
    return next(line.removeprefix("# ") for line in page.read_text().splitlines() if line.startswith("# "))


def install() -> Path:
    """Return the folder with the packages of the lock, installed there unless it holds them already."""
    digest = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = CACHE / f"packages-{digest}"
    if not folder.exists():
        print(f"docs: installing {LOCK.read_text().count('==')} packages of {LOCK.relative_to(ROOT)}", flush=True)
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        options = ["-qq", "--no-input", "--no-deps", "--require-hashes", "--target", str(part)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, "--requirement", str(LOCK)], check=True)
        part.rename(folder)
    return folder


def main() -> int:
    """Build the site and return an exit code: 0 done, 1 a package or a link is missing."""
    try:
        packages = install()
        shutil.rmtree(CACHE / "pages", ignore_errors=True)
        stage(ROOT, CACHE / "pages")
        (CACHE / "zensical.toml").write_text(configuration(ROOT))
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(CACHE / "zensical.toml")]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(packages)}, capture_output=True, text=True)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"docs: {error}", file=sys.stderr)
        return 1
    if done.returncode:
        print(done.stderr.partition("Traceback")[0], "docs: Zensical ended with the problems above", file=sys.stderr)
        return 1
    shutil.rmtree(SITE, ignore_errors=True)
    (CACHE / "site").rename(SITE)
    print(f"docs: {sum(1 for _ in SITE.rglob('*.html'))} pages in {SITE}; .venv/bin/python -m http.server -d site")
    return 0


if __name__ == "__main__":
    sys.exit(main())
