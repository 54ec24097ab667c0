"""MkDocs: benchmarks and examples are part of the site; links work there as in the repository."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = "../benchmarks/README.md"
EXAMPLES = "../examples/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Show what lies beside the benchmarks as a page of its own, and take the examples along."""
    docs = Path(config.docs_dir)
    source = str((docs / BENCHMARKS).resolve())
    files.append(File.generated(config, "benchmarks.md", abs_src_path=source))
    examples = (docs / EXAMPLES).resolve()
    for path in sorted([*examples.glob("*.py"), *examples.glob("notebooks/*.ipynb")]):
        name = f"examples/{path.relative_to(examples).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Lead links to them, and their own links into the docs, to where they stand in the site."""
    return (
        markdown.replace(f"]({BENCHMARKS}", "](benchmarks.md")
        .replace(f"]({EXAMPLES}", "](examples/")
        .replace("](../docs/", "](")
    )
