from .dataset import rerank_dataset as rerank_dataset
from .options import PoolOptions as PoolOptions, RunOptions as RunOptions
from .run import rerank_run as rerank_run
