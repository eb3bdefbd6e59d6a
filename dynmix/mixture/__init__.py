"""The data plane: which sequence of which domain stands at each position of the training stream. Knows no model.

The modules, in an order to read them in:

- The order, a pure function of seed and stages. `permutation` shuffles without a table, `quota` says which domain each
  draw is of, `order` at which position a draw stands. `weights`, `stages`, `limits` (`max_epochs`) and `roster` (names
  and sizes) make up a `schedule`, `packed` its state. `accounting` and `probe` ask it what was read and what is left.
- Documents of token ids: `documents`; of these kinds: `store`, `flat`, `arrow`, `view`. `files`, `folders` and `remote`
  find them, `text` makes them, `sources` opens whatever a domain may be given as; `distinct` finds repetitions in them.
- Sequences of one length: `sequences`; of documents by `packing` and `best_fit`, of others by `view` and `index`.
- Items, as a model takes them: `options`, `boundaries`, `rows`, `samples`.
- Readers of it all: `dataset`, with `reading`, `read_ahead` and `late` (domains that join); `stream`, with
  `domain_stream` and `items`. Both are `steered`, and tell other processes their `progress` in `shared` memory.

`prepare` makes token stores of raw text, before any of this.
"""
