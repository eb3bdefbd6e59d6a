"""Measurement: how one more unit of each domain moves each task's loss. Knows models; no mixture and no trainer.

The modules, in an order to read them in:

- A batch and its loss: `batch`. A model that is left as it was: `isolation`.
- What is measured: `layers` says which matrices a model has, `kinds` how modules that are no linear layers come to one,
  `one_pass` catches their inputs and output gradients, `capture` runs batches for them. `gradients` are made of these.
- Passes over sets of batches: `dealing` shares them among ranks, `probes` picks sequences, `sums` and `sets` keep what
  is found, where `storage` says. `losses` is such a pass, for the tasks' losses alone.
- Curvatures, listed in `curvature`: `base` says what one is; `adam`, `datainf`, `gauss_newton`; of Kronecker `factors`,
  with `factored` in common, `ekfac` and `kfac`, which are `carried` from stage to stage in a `tensor_file`.
- Influences: `group`, if asked in `low_rank`, and `sample`. What they hold at most: `memory`.
- In-run influence: `task_gradients` meet the training's own gradients in `in_run`, which finds the `scale` of the loss;
  a `tally` adds up their products by domain.
"""
