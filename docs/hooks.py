"""MkDocs: the benchmarks are a page of the site, and links work there as in the repository."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = "../benchmarks/README.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Show what lies beside the benchmarks as a page of its own."""
    source = str(Path(config.docs_dir, BENCHMARKS).resolve())
    files.append(File.generated(config, "benchmarks.md", abs_src_path=source))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Lead links to it, and its own links into the docs, to where they stand in the site."""
    return markdown.replace(f"]({BENCHMARKS}", "](benchmarks.md").replace("](../docs/", "](")
