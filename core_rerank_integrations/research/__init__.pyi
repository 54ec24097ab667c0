from .abstention_fit import fit_abstention as fit_abstention
from .detection import FoundHeads as FoundHeads, find_heads as find_heads
from .evaluation import Evaluation as Evaluation, MethodResult as MethodResult, evaluate as evaluate
from .evidence_fit import fit_evidence as fit_evidence
from .features import HeadReader as HeadReader
from .fitting import FittedHeads as FittedHeads, fit_heads as fit_heads
from .methods import Method as Method
from .options import (
    AbstentionOptions as AbstentionOptions,
    EvaluationOptions as EvaluationOptions,
    EvidenceOptions as EvidenceOptions,
    FindOptions as FindOptions,
    FitOptions as FitOptions,
    ReaderOptions as ReaderOptions,
    TuneOptions as TuneOptions,
)
from .report import save_report as save_report
from .sources import JudgedRun as JudgedRun, WeightedRun as WeightedRun
from .tuning.tune import TunedHeads as TunedHeads, tune_heads as tune_heads
