import textwrap

import pytest

from dynmix.ranks import from_rank_0, is_rank_0, on_every_rank


def test_alone_everything_is_done_here():
    assert is_rank_0()
    assert from_rank_0({"a": 1}) == {"a": 1}
    assert on_every_rank(lambda: 5) == 5
    with pytest.raises(OSError, match="disk full"):
        on_every_rank(lambda: (_ for _ in ()).throw(OSError("disk full")))


def test_two_ranks_agree_and_fail_together(processes, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent("""
        import torch.distributed as dist
        from dynmix.ranks import from_rank_0, is_rank_0, on_every_rank

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        assert is_rank_0() == (rank == 0)
        assert from_rank_0(rank + 5) == 5
        on_every_rank(lambda: None)

        def fail():
            if rank == 1:
                raise OSError("disk full")

        try:
            on_every_rank(fail)
        except Exception as failure:
            print(f"<{rank} {type(failure).__name__}: {failure}>", flush=True)
        dist.destroy_process_group()
        """)
    )
    status, printed = processes.run(script, ranks=2)
    assert status == 0, printed
    assert "<0 RuntimeError: another rank failed: OSError: disk full>" in printed
    assert "<1 OSError: disk full>" in printed
