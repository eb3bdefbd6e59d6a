"""Sample influence of whole corpora, on one machine or a cluster, kept as parquet; and what it is compared with."""

from dynmix.scoring.baselines import ngram_scores, perplexity_scores
from dynmix.scoring.corpus import Corpus
from dynmix.scoring.folder import OtherConfiguration, discard, read_losses, read_scores
from dynmix.scoring.score import score_corpus
from dynmix.scoring.sources import Source, all_sources, peak_sources

__all__ = [
    "Corpus",
    "OtherConfiguration",
    "Source",
    "all_sources",
    "discard",
    "ngram_scores",
    "peak_sources",
    "perplexity_scores",
    "read_losses",
    "read_scores",
    "score_corpus",
]
