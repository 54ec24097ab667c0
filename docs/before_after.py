"""Draw pictures/before-after.svg: one question of the demo, as the demo prints it."""

import re
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from core_rerank_integrations import CoReReranker
from core_rerank_integrations._internal.resources import resource_folder
from core_rerank_integrations.cli.demo import llama_index_pipeline, side_by_side
from core_rerank_integrations.research.collection import Collection

QUESTION = "q29"
# Rich's own format without the fonts, which a browser would download.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)

if __name__ == "__main__":
    collection = Collection.load(resource_folder("examples/data"))
    console = Console(record=True, width=86)
    with CoReReranker() as reranker:
        pipeline = llama_index_pipeline(collection, reranker, candidates=20)
        console.print(side_by_side(collection, pipeline, QUESTION))
    console.save_svg(
        str(Path(__file__).parent / "pictures" / "before-after.svg"),
        title="20 passages found by embeddings, reranked",
        theme=MONOKAI,
        code_format=FORMAT,
    )
