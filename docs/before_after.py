"""Draw pictures/before-after.svg: one question of the demo, as the demo prints it."""

import re
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.table import Table
from rich.terminal_theme import MONOKAI
from rich.text import Text

from core_rerank_integrations import CoReReranker
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.cli.demo import SHOWN_RANKS, llama_index_pipeline
from core_rerank_integrations.research.collection import Collection

QUESTION = "q29"
# Rich's own format without the fonts, which a browser would download.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)

if __name__ == "__main__":
    collection = Collection.load(resource_folder("examples/data"))
    console = Console(record=True, width=86)
    with CoReReranker() as reranker:
        pipeline = llama_index_pipeline(collection, reranker, candidates=20)
        question = collection.queries[QUESTION]
        orders = pipeline.first_stage(question), pipeline.reranked(question)
    table = Table("", "before", "after", title=f"{pipeline.name}: {question}", title_justify="left")
    for rank, passages in enumerate(list(zip(*orders, strict=True))[:SHOWN_RANKS], start=1):
        cells = []
        for passage in passages:
            is_relevant = collection.qrels[QUESTION].get(passage)
            mark, style = ("✔", "bold green") if is_relevant else (" ", "")
            cells.append(Text(f"{mark} {collection.passages[passage].title}", style))
        table.add_row(str(rank), *cells)
    console.print(table)
    console.print("✔ judged relevant", justify="center")
    console.save_svg(
        str(Path(__file__).parent / "pictures" / "before-after.svg"),
        title="20 passages found by embeddings, reranked",
        theme=MONOKAI,
        code_format=FORMAT,
    )
