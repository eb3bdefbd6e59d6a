"""Dynamic data mixing: measure how each domain moves each task, and change the mixture exactly at stage boundaries.

The modules, in an order to read them in:

- What knows nothing of a run: `mixture`, which sequence stands where in the training stream; `influence`, how text
  moves tasks; `mixers`, which weights to take; `laws`, what a mixture is worth. Between measuring and deciding go the
  arrays of `observation` and, of a whole corpus, `scores`.
- The loop of a run, `controller`, and what it says that it joins: `timetable`, `measurement`, `in_run`, `sampling`,
  `decider`, `budget`, `ahead`, `record`, `run_folder`. An adapter in `callbacks` tells it when a step ended.
- What these need. To measure: `batches`, `drawn` (mixtures), `retry` (where memory runs out), `training_loss`, and
  `step_samples` (of which domain a sequence is). To regroup a corpus: `tasks`, read by `task_records`; `checkpoints`
  and `peaks`, where tasks are best; `scoring`, which makes the `scores`; `groups`, made of them. To keep files:
  `journal`, `snapshot`, `whole_file`, `alone` (in a folder), `trainer_checkpoint`. To agree: `ranks`, `dataset_state`.
- The command line, `cli` with `commands`, and what these call: `recipe`, a run in YAML; `proxies` and `fit`, laws from
  small runs; `inspection` and `saved_influence`, of files; the `demo`; `report`, of `report_rows` and `report_figures`;
  `tables` and `heatmap`. `shown` draws bars everywhere, and `harness` evaluates lm-eval's tasks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynmix.controller import MixtureController
    from dynmix.groups import open_groups
    from dynmix.in_run import InRun
    from dynmix.influence.curvature import EKFAC, KFAC, AdamDiagonal, DataInf, GaussNewton, Identity
    from dynmix.influence.group import group_influence
    from dynmix.influence.layers import Layers
    from dynmix.influence.sample import sample_influence
    from dynmix.mixers import Mixer, Proposal, Static, TiKMiXD
    from dynmix.mixers.automixer import AutoMixer
    from dynmix.mixers.tikmix_m import TiKMiXM
    from dynmix.mixture.dataset import MixtureDataset
    from dynmix.mixture.flat import FlatTokens
    from dynmix.mixture.schedule import MixtureSchedule
    from dynmix.mixture.store import TokenStore
    from dynmix.mixture.stream import MixtureStream
    from dynmix.mixture.view import DocumentView, RowView
    from dynmix.observation import Influence
    from dynmix.tasks import Task

__all__ = [
    "EKFAC",
    "KFAC",
    "AdamDiagonal",
    "AutoMixer",
    "DataInf",
    "DocumentView",
    "FlatTokens",
    "GaussNewton",
    "Identity",
    "InRun",
    "Influence",
    "Layers",
    "Mixer",
    "MixtureController",
    "MixtureDataset",
    "MixtureSchedule",
    "MixtureStream",
    "Proposal",
    "RowView",
    "Static",
    "Task",
    "TiKMiXD",
    "TiKMiXM",
    "TokenStore",
    "group_influence",
    "open_groups",
    "sample_influence",
]

_NAMES = {
    "controller": ["MixtureController"],
    "groups": ["open_groups"],
    "in_run": ["InRun"],
    "influence.curvature": ["EKFAC", "KFAC", "AdamDiagonal", "DataInf", "GaussNewton", "Identity"],
    "influence.group": ["group_influence"],
    "influence.layers": ["Layers"],
    "influence.sample": ["sample_influence"],
    "mixers": ["Mixer", "Proposal", "Static", "TiKMiXD"],
    "mixers.automixer": ["AutoMixer"],
    "mixers.tikmix_m": ["TiKMiXM"],
    "mixture.dataset": ["MixtureDataset"],
    "mixture.flat": ["FlatTokens"],
    "mixture.schedule": ["MixtureSchedule"],
    "mixture.store": ["TokenStore"],
    "mixture.stream": ["MixtureStream"],
    "mixture.view": ["DocumentView", "RowView"],
    "observation": ["Influence"],
    "tasks": ["Task"],
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and neither a mixer nor the report needs it.
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"dynmix.{module}"), name)
    raise AttributeError(f"module 'dynmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Without it a notebook completes `dynmix.` to the modules that happen to be loaded, and to no public name.
    return sorted({*globals(), *__all__})
