import textwrap


def test_ranks_whose_datasets_differ_do_not_train(tmp_path, processes):
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path

        import numpy as np
        import torch.distributed as dist
        from dynmix import MixtureController, MixtureDataset, MixtureStream, TokenStore
        from dynmix.dataset_state import check_ranks
        from tests.small import Bigram

        dist.init_process_group("gloo")
        rank, folder = dist.get_rank(), Path(sys.argv[1]) / str(dist.get_rank())
        stores = [TokenStore.write(folder / str(i), [np.arange(40) + n for n in range(i, i + 9)]) for i in range(2)]
        names = ["a", "b"]
        for what, order, seed, parts in [
            ("order", names[:: 1 - 2 * rank], 0, stores),
            ("seed", names, rank, stores),
            ("content", names, 0, stores[:: 1 - 2 * rank]),
            ("plan", names, 0, stores),
            ("none", names, 0, stores),
            ("unreadable", names, 0, stores),
        ]:
            data = MixtureDataset({n: parts for n in order}, num_samples=40, sequence_length=5, seed=seed)
            if what == "unreadable" and rank == 0:
                data.state_dict = lambda: 1 / 0
            other = rank if what == "plan" else 0
            loop = MixtureController(data, {"t": stores[0]}, "uniform", stage_steps=5 - other)
            loop.plan(batch_size=4, max_steps=10 - other)
            try:
                loop.begin(Bigram())
                print(f"<{rank} {what}: begun>", flush=True)
            except Exception as failure:
                print(f"<{rank} {what}: {type(failure).__name__}: {failure}>", flush=True)
        items = [{"input_ids": np.arange(40)}]
        try:
            check_ranks(MixtureStream({"a": items}, num_samples=9, sequence_length=5 + rank, world_size=1), {})
        except Exception as failure:
            print(f"<{rank} stream: {type(failure).__name__}: {failure}>", flush=True)
        dist.destroy_process_group()
        """)
    )
    status, printed = processes.run(script, tmp_path, ranks=2)
    assert status == 0, printed
    words = "ValueError: the dataset of rank 1 is not that of rank 0, as it was there and is here"
    for what, difference in (
        ("order", "the domains' order was ['a', 'b'] and is ['b', 'a']"),
        ("seed", "seed was 0 and is 1"),
        ("plan", "stage_steps was 5 and is 4; samples of the run was 40 and is 36"),
        ("stream", "sequence_length was 5 and is 6"),
        ("content", "domain 'a' has as many rows, but their content changed"),
    ):
        assert f"<1 {what}: {words}: {difference}" in printed
        assert f"<0 {what}: RuntimeError: another rank failed: {words}: {difference}" in printed
    assert "<0 none: begun>" in printed
    assert "<1 none: begun>" in printed
    assert "<0 unreadable: ZeroDivisionError: division by zero>" in printed
    assert "<1 unreadable: RuntimeError: another rank failed: ZeroDivisionError: division by zero>" in printed
