"""The adapter for Lightning's `Trainer`.

Knows Lightning's events and loaders; everything a boundary does is the controller's. State travels in Lightning's own
checkpoints. Imported only by those who use Lightning: `from dynmix.callbacks.lightning import MixtureCallback`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from dynmix.callbacks.loop import check_micro_batch
from dynmix.controller import MixtureController
from dynmix.mixers.base import Mixer
from dynmix.mixture.dataset import MixtureDataset
from dynmix.ranks import Ranks, on_every_rank

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
except ImportError as missing:
    raise ImportError("dynmix.callbacks.lightning needs Lightning: pip install 'dynmix[lightning]'") from missing


class MixtureCallback(Callback):
    """Decides the mixture of a `MixtureDataset` anew every `stage_steps` optimizer steps of a Lightning `Trainer`.

        callback = MixtureCallback(dataset, tasks=tasks, mixer=TiKMiXD(), stage_steps=500)
        loader = DataLoader(dataset, batch_size=32, sampler=callback.sampler)
        trainer = Trainer(max_steps=10_000, callbacks=[callback])
        trainer.fit(module, loader, ckpt_path="last")  # goes on exactly, in the middle of a stage too

    Its sampler reads in order, starts at the checkpoint's position, and deals the samples out to the ranks. (Lightning
    itself starts reading from the beginning when it resumes.)

    Args:
        dataset: what the loader reads, in one pass.
        tasks: name -> batches, examples or a token store: what the mixture is optimised for.
        mixer: decides the weights: a mixer, the name of one, or a mapping with its `name` and arguments.
        stage_steps: optimizer steps per stage.
        model: the attribute of the LightningModule that is the causal LM ("model", "net.lm"); "" for the module itself.
        output: folder for journal, config and snapshots; default `<trainer.default_root_dir>/dynmix`.
        options: further arguments of `dynmix.controller.MixtureController`.

    Raises (when training begins):
        ValueError: a loader or Trainer arguments under which steps would not be positions of the dataset, with the
            remedy.
    """

    def __init__(
        self,
        dataset: MixtureDataset,
        tasks: Mapping[str, Any],
        mixer: Mixer | str | Mapping[str, Any],
        stage_steps: int,
        *,
        model: str = "model",
        output: str | Path | None = None,
        **options: Any,
    ):
        if not isinstance(dataset, MixtureDataset):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}: this callback reads a MixtureDataset, by position; a "
                "MixtureStream is read in a loop of your own, with MixtureHook"
            )
        self.dataset, self.model, self.output = dataset, model, output
        self.controller = MixtureController(dataset, tasks, mixer, stage_steps=stage_steps, output=output, **options)
        self.sampler = InOrderSampler(dataset)
        self.steps = 0
        self._over = False
        self._saving: int | None = None  # step of a checkpoint that is on the disk by the next batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where the run's files are, before a checkpoint's state comes in."""
        if stage == "fit":
            self.controller.write_to(self.output or Path(trainer.default_root_dir) / "dynmix")
            # What learns from the training loss has to see the first step.
            self.controller.watch(self._lm(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check how it will be read, and let the controller begin."""
        self._over = False
        if trainer.global_step == 0 < self.steps:
            raise ValueError(
                f"this callback has been told of {self.steps} steps, and the Trainer begins anew: pass fit the "
                "ckpt_path to go on from, or make dataset, callback and loader anew for another run"
            )
        if trainer.global_step != self.steps:
            raise ValueError(
                f"the checkpoint at step {trainer.global_step} holds no state of a MixtureCallback: it was saved by a "
                "run without one, and which samples that run took is not known here"
            )
        on_every_rank(lambda: self._plan(trainer))
        self._count_batches(trainer)
        self._log(trainer, self.controller.begin(self._lm(pl_module), self.steps))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Tell the controller when an optimizer step ended. Lightning saves its checkpoints after this.

        Raises:
            ValueError: in manual optimization, steps that do not take a batch each.
        """
        self._tell_saved()
        if trainer.global_step == self.steps:
            return  # gradients are accumulated
        self.steps = trainer.global_step
        batches, in_a_step = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.accumulate_grad_batches
        if -(-batches // in_a_step) != self.steps:
            raise ValueError(
                f"{self.steps} optimizer steps in {batches} batches, of which each takes {in_a_step}: in manual "
                "optimization call optimizer.step() once a batch, or let Lightning step and accumulate "
                "(automatic_optimization=True, accumulate_grad_batches=...)"
            )
        self._log(trainer, self.controller.step_ended(self._lm(pl_module), self.steps))
        if self.controller.why_over(self.steps):
            trainer.should_stop = True
        # A loop that is over closes its loggers before `on_train_end`.
        if trainer.should_stop or self.steps * self.controller.batch_size >= self.controller.total:
            self._finish(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the journal with the final task losses, if it was not yet."""
        self._finish(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that a checkpoint is being saved: Lightning writes it after this, and gives no sign when it is done."""
        self._saving = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the controller of the last checkpoint, too."""
        self._tell_saved()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able."""
        return {"steps": self.steps, "controller": self.controller.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.steps = int(state_dict["steps"])
        if self.steps:
            on_every_rank(lambda: self.controller.load_state_dict(state_dict["controller"]))
            self.sampler.position = self.steps * self.controller.batch_size

    def _tell_saved(self) -> None:
        if self._saving is not None:
            self.controller.saved(self._saving)
            self._saving = None

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._over:
            self._over = True
            self._log(trainer, self.controller.finish(self._lm(pl_module), self.steps))

    def _lm(self, module: LightningModule) -> nn.Module:
        try:
            return module.get_submodule(self.model)
        except AttributeError:
            children = [name for name, _ in module.named_children()]
            raise ValueError(
                f"model={self.model!r}: the {type(module).__name__} has no such module; name the causal LM in it, one "
                f'of {children}, or "" for itself'
            ) from None

    def _log(self, trainer: Trainer, logs: dict[str, float] | None) -> None:
        for logger in trainer.loggers if logs else ():
            logger.log_metrics(logs, step=trainer.global_step)  # type: ignore[arg-type]

    def _count_batches(self, trainer: Trainer) -> None:
        """Have Lightning count the batches from where the sampler goes on, which is the end of a step.

        It goes on from the checkpoint's count. Those may be batches of another size, or the last of them the first part
        of a step, whose gradients are gone: the first step would take too few, and all others would be shifted.
        """
        loop, batches = trainer.fit_loop.epoch_loop, self.steps * trainer.accumulate_grad_batches
        loop.batch_progress.current.increment_by(batches - loop.batch_progress.current.ready)
        # A checkpoint that was saved in `on_train_batch_end` lacks one, which the loop adds.
        loop.batch_progress.current.completed = batches - loop.restarted_on_train_batch_end

    def _plan(self, trainer: Trainer) -> None:
        """Check how it will be read, and say what a step takes and how many there are."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or loader.dataset is not self.dataset:
            raise ValueError("MixtureCallback: pass trainer.fit one DataLoader, of the dataset given to the callback")
        if loader.sampler is not self.sampler or loader.batch_size is None:
            raise ValueError(
                f"the loader reads through a {type(loader.sampler).__name__}: pass DataLoader(dataset, batch_size=..., "
                "sampler=callback.sampler), which reads in order (the mixture is shuffled already) and goes on where "
                "a checkpoint was saved"
            )
        replicas = getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas", trainer.world_size)
        if replicas != trainer.world_size:
            raise ValueError(
                f"{type(trainer.strategy).__name__} has {trainer.world_size} processes take the samples of {replicas}: "
                "in tensor parallelism several of them share samples, and a model that is split so is not measured "
                "rightly here; use DDP or FSDP"
            )
        if len(trainer.optimizers) > 1:
            raise ValueError(f"{len(trainer.optimizers)} optimizers: their steps would each count as one of the run")
        if any(isinstance(c, GradientAccumulationScheduler) and len(c.scheduling) > 1 for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("GradientAccumulationScheduler changes what a step is during the run: accumulate evenly")
        check_micro_batch(self.dataset, loader.batch_size * trainer.world_size)
        batch_size = loader.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
        one_pass = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        if trainer.max_steps >= 0 and (epochs is None or trainer.max_steps <= one_pass):
            steps = trainer.max_steps
        else:
            steps = one_pass * (epochs or 1)
        if steps > one_pass:
            raise ValueError(
                f"the run takes {steps} steps of {batch_size} samples, and one pass of the loader has {one_pass}: pass "
                "Trainer(max_steps=...) and a dataset of num_samples for all of them; each domain is reshuffled on its "
                "own when it is read again"
            )
        self.controller.plan(batch_size=batch_size, max_steps=steps)


class InOrderSampler(DistributedSampler[int]):
    """Positions of a dataset in order, from `position` on, every rank's own; Lightning leaves such a sampler alone."""

    def __init__(self, dataset: MixtureDataset):
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)  # those of the run are not known yet
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        ranks = Ranks(shared=True)
        return iter(range(self.position + ranks.rank, len(self) * ranks.size, ranks.size))

    def __len__(self) -> int:
        return len(self.dataset) // Ranks(shared=True).size  # type: ignore[arg-type]
