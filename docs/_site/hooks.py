"""Hooks of mkdocs: pages from outside of docs/, and links between them as they are written for a reader of the files.

A page links another file by its path in the repository, so links work on a git host and in an editor. The site has the
README as its first page and, under their own paths, the pages of the repository that other pages link to. A link to any
other file of the repository becomes its path, in code font, since the site doesn't contain it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?P<open>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)


def repository_pages() -> Iterator[Path]:
    """Pages of the site that aren't in docs/, as paths in the repository."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        yield Path(name)
    for path in sorted(ROOT.glob("examples/*/README.md")):
        yield path.relative_to(ROOT)


def site_path(path: str) -> str:
    """Path in the site of a file of the repository: docs/ is its root, and the README its first page.

    Example:
        >>> site_path("docs/data.md"), site_path("README.md"), site_path("examples/support/README.md")
        ('data.md', 'index.md', 'examples/support/README.md')
    """
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/."""
    for path in repository_pages():
        source = site_path(path.as_posix())
        files.append(File.generated(config, source, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links by paths in the repository into links by paths in the site; code is left as it is."""
    source = page.file.src_uri
    own = "README.md" if source == "index.md" else source if page.file.generated_by else f"docs/{source}"

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
        if (ROOT / path).is_dir() and (ROOT / path / "README.md").is_file():
            path += "/README.md"
        if files.get_file_from_path(site_path(path)) is None and (ROOT / path).exists():
            return match["text"] if match["text"].startswith("`") else f"{match['text']} (`{path}`)"
        relative = posixpath.relpath(site_path(path), posixpath.dirname(source) or ".")
        return f"{match['open']}{relative}{match['anchor'] or ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
