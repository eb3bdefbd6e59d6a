"""Raw text to token stores: jsonl (plain, .gz, .zst), plain text, parquet and HF datasets, one store a domain.

`inputs` finds the files and cuts them into pieces, `pieces` reads one, `tokenise` turns one into a shard, `shards`
makes stores of shards, `work` keeps what is finished for the next call if this one is killed, `workers` are the
processes, `pipeline` gives them their tasks, `manifest` says how the stores were made, and `run` is the call. Nothing
in here knows of mixtures or models; tasks are prepared in the same way as domains.
"""

from dynmix.mixture.prepare.manifest import check_tokenizer, read_manifest
from dynmix.mixture.prepare.pieces import PrepareError
from dynmix.mixture.prepare.run import prepare

__all__ = ["PrepareError", "check_tokenizer", "prepare", "read_manifest"]
