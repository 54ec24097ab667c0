__version__: str

from .errors import (
    BackendError as BackendError,
    ClosedError as ClosedError,
    CoReError as CoReError,
    DocumentTruncatedWarning as DocumentTruncatedWarning,
    GeneratorError as GeneratorError,
    HeadSetError as HeadSetError,
    InvalidInputError as InvalidInputError,
    LongDocumentWarning as LongDocumentWarning,
    MissingExtraError as MissingExtraError,
    ModelError as ModelError,
    StorageError as StorageError,
    UnsupportedModelError as UnsupportedModelError,
)
from .heads.head_set import (
    Head as Head,
    HeadSet as HeadSet,
)
from .integrations.langchain import (
    CoReDocumentCompressor as CoReDocumentCompressor,
    CoReDocumentIndexer as CoReDocumentIndexer,
    CoReRetriever as CoReRetriever,
    create_reranked_search_tool as create_reranked_search_tool,
)
from .integrations.llama_index import (
    CoReNodeIndexer as CoReNodeIndexer,
    CoReNodePostprocessor as CoReNodePostprocessor,
)
from .method.templates import (
    PromptTemplate as PromptTemplate,
)
from .remote.reranker import (
    RemoteReranker as RemoteReranker,
)
from .reranker import (
    CoReReranker as CoReReranker,
)
from .results import (
    RerankResult as RerankResult,
    RerankResults as RerankResults,
)
from .settings import (
    DocumentCache as DocumentCache,
    RerankOptions as RerankOptions,
)
