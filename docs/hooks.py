"""Hooks of MkDocs: add benchmarks and examples to the site, with links that work in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = "../benchmarks/README.md"
EXAMPLES = "../examples/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README of the benchmarks as a page, and the examples as files."""
    docs = Path(config.docs_dir)
    source = str((docs / BENCHMARKS).resolve())
    files.append(File.generated(config, "benchmarks.md", abs_src_path=source))
    examples = (docs / EXAMPLES).resolve()
    for path in sorted([*examples.glob("*.py"), *examples.glob("notebooks/*.ipynb")]):
        name = f"examples/{path.relative_to(examples).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Rewrite links to these files, and their links to the docs, for the site."""
    return (
        markdown.replace(f"]({BENCHMARKS}", "](benchmarks.md")
        .replace(f"]({EXAMPLES}", "](examples/")
        .replace("](../docs/", "](")
    )
